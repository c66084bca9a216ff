"""Finding NVSHMEM, with folders made for the purpose."""

from __future__ import annotations

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


def test_what_torch_has_loaded_counts(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVSHMEM_DIR", str(install(site / "own", "3.8.0")))
    found = nvshmem.find()
    old = install(site / "nvidia" / "nvshmem", "3.4.5") / "lib" / "libnvshmem_host.so.3"
    for library, obstacle in (
        (None, ""),
        (site / "own" / "lib" / "libnvshmem_host.so.3", ""),
        (old, "has loaded NVSHMEM 3.4.5"),
    ):
        monkeypatch.setattr(nvshmem, "loaded", lambda library=library: library)
        why = nvshmem.obstacle_in_process(found)
        assert (obstacle in why) if obstacle else why == ""
    assert str(old) in why and f"before NVSHMEM 3.8.0 in {site / 'own'}" in why
    assert nvshmem.obstacle_in_process(None) == nvshmem.obstacle(None)


def test_setup_can_run_it_by_its_path_without_torch() -> None:
    code = (
        "import runpy, sys; sys.modules['torch'] = sys.modules['deepep_train'] = None\n"
        f"there = runpy.run_path({str(nvshmem.__file__)!r})\n"
        "print(there['obstacle'](there['find'](), to_build=True) or 'usable')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
