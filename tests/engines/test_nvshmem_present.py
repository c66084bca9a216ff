"""Finding NVSHMEM, with folders made for the purpose."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deepep_train.engines import nvshmem_present as nvshmem


def install(folder: Path, version: str, *, header: bool = True, library: str = "libnvshmem_host.so.3") -> Path:
    """What an installation of `version` has; without the header only what programs need to run."""
    (folder / "lib").mkdir(parents=True)
    if library:
        (folder / "lib" / library).write_bytes(b"\x7fELF\0NVSHMEM version of CUmodule %d\0NVSHMEM v" + version.encode() + b"\0")
    if header:
        (folder / "include" / "non_abi").mkdir(parents=True)
        names = zip(("MAJOR", "MINOR", "PATCH", "PACKAGE"), [*version.split("."), "0"], strict=True)
        text = "".join(f"#define NVSHMEM_VENDOR_{name}_VERSION {number}\n" for name, number in names)
        (folder / "include" / "non_abi" / "nvshmem_version.h").write_text(text)
    return folder


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder of packages on sys.path; NVSHMEM_DIR is not set."""
    monkeypatch.delenv("NVSHMEM_DIR", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "elsewhere"), str(tmp_path)])
    monkeypatch.setattr(nvshmem.sysconfig, "get_paths", lambda: {"purelib": str(tmp_path / "none")})
    return tmp_path


def test_nothing_is_found(site: Path) -> None:
    assert nvshmem.find() is None
    why = nvshmem.obstacle(None)
    for part in ("NVSHMEM_DIR is not set", "3.8 or later", "nvshmemx_qp_create", "nvidia-nvshmem-cu13"):
        assert part in why


def test_the_registrys_package(site: Path) -> None:
    folder = install(site / "nvidia" / "nvshmem", "3.8.0")
    found = nvshmem.find()
    assert found == (folder, "the registry's package", (3, 8, 0))
    assert nvshmem.obstacle(found) == ""


def test_nvshmem_dir_comes_first_and_alone(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site / "nvidia" / "nvshmem", "3.8.0")
    monkeypatch.setenv("NVSHMEM_DIR", str(install(site / "own", "3.10.2", library="libnvshmem_host.so")))
    found = nvshmem.find()
    assert found == (site / "own", "NVSHMEM_DIR", (3, 10, 2))
    assert nvshmem.obstacle(found) == ""
    monkeypatch.setenv("NVSHMEM_DIR", str(site / "gone"))
    assert f"NVSHMEM_DIR={site / 'gone'} is not a folder" in nvshmem.obstacle(nvshmem.find())


@pytest.mark.parametrize("header", [True, False])
def test_an_old_one_is_named_with_its_place_and_what_is_needed(site: Path, header: bool) -> None:
    folder = install(site / "nvidia" / "nvshmem", "3.7.12", header=header)
    why = nvshmem.obstacle(nvshmem.find())
    for part in (f"found NVSHMEM 3.7.12 in {folder}", "registry's package", "3.8 or later", "nvshmemx_qp_create"):
        assert part in why


def test_what_is_missing_is_named(site: Path) -> None:
    folder = install(site / "nvidia" / "nvshmem", "3.8.0")
    why = nvshmem.obstacle(nvshmem.find(), to_build=True)
    assert "lacks include/nvshmem.h, include/nvshmemx.h, lib/libnvshmem_device.a;" in why
    for name in ("include/nvshmem.h", "include/nvshmemx.h", "lib/libnvshmem_device.a"):
        (folder / name).touch()
    assert nvshmem.obstacle(nvshmem.find(), to_build=True) == ""
    (folder / "lib" / "libnvshmem_host.so.3").unlink()
    assert "lacks lib/libnvshmem_host.so.3;" in nvshmem.obstacle(nvshmem.find())


def test_a_library_that_does_not_say_its_version(site: Path) -> None:
    folder = install(site / "nvidia" / "nvshmem", "", header=False)
    assert f"{folder} (the registry's package) does not say" in nvshmem.obstacle(nvshmem.find())
    (folder / "lib" / "libnvshmem_host.so.3").write_bytes(b"")
    assert "does not say" in nvshmem.obstacle(nvshmem.find())


LIBRARY = """
const char *banner = "NVSHMEM v{0}.{1}.{2}";
void nvshmemx_vendor_get_version_info(int *major, int *minor, int *patch) {{ *major = {0}; *minor = {1}; *patch = {2}; }}
"""
LOAD = """
import ctypes, runpy, sys
there = runpy.run_path(sys.argv[3])
if sys.argv[1]:
    ctypes.CDLL(sys.argv[1], mode=int(sys.argv[2]))
try:
    there["load"](there["find"]())
    print("loaded")
except ImportError as error:
    print(error)
"""


def compile_library(folder: Path, version: str) -> Path:
    source = folder.with_suffix(".c")
    source.write_text(LIBRARY.format(*version.split(".")))
    (folder / "lib").mkdir(parents=True)
    path = folder / "lib" / "libnvshmem_host.so.3"
    subprocess.run(["cc", "-shared", "-fPIC", "-Wl,-soname,libnvshmem_host.so.3", source, "-o", path], check=True)
    return path


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_load_puts_the_right_one_first_or_says_why_not(tmp_path: Path) -> None:
    """An older one that was loaded before is harmless, as torch's is, unless it was loaded for all to see."""
    new, old = (compile_library(tmp_path / name, version) for name, version in (("new", "3.9.1"), ("old", "3.4.5")))

    def told(folder: Path, before: Path | str = "", mode: int = 0) -> str:
        command = [sys.executable, "-c", LOAD, str(before), str(mode), str(nvshmem.__file__)]
        environment = os.environ | {"NVSHMEM_DIR": str(folder)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    assert told(tmp_path / "new", old, ctypes.RTLD_LOCAL) == "loaded"
    why = told(tmp_path / "new", old, ctypes.RTLD_GLOBAL)
    assert why.startswith(f"NVSHMEM 3.4.5's symbols come before those of NVSHMEM 3.9.1 in {new.parents[1]} (NVSHMEM_DIR)")
    new.write_bytes(b"no library, but NVSHMEM v3.9.1")
    assert told(tmp_path / "new").startswith(f"NVSHMEM 3.9.1 in {new.parents[1]} (NVSHMEM_DIR) cannot be loaded: {new}: ")
    assert told(tmp_path / "old").startswith(f"found NVSHMEM 3.4.5 in {old.parents[1]} (NVSHMEM_DIR), but")


def test_setup_can_run_it_by_its_path_without_torch() -> None:
    code = (
        "import runpy, sys; sys.modules['torch'] = sys.modules['deepep_train'] = None\n"
        f"there = runpy.run_path({str(nvshmem.__file__)!r})\n"
        "print(there['obstacle'](there['find'](), to_build=True) or 'usable')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
