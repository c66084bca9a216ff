"""Which NVSHMEM is here, and whether the rdma engine can be built with it and run on it.

Standard library only: setup.py runs this file by its path, where neither torch nor this package can be imported.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

MINIMUM = (3, 8)
NEEDED = "the rdma engine needs NVSHMEM 3.8 or later for its queue pairs (nvshmemx_qp_create)"
REMEDY = "install nvidia-nvshmem-cu13 (or -cu12, as torch's CUDA) 3.8 or later, or point NVSHMEM_DIR at such a build"

_HOST = "libnvshmem_host.so"
_VERSION_HEADER = "include/non_abi/nvshmem_version.h"
_TO_BUILD = ("include/nvshmem.h", "include/nvshmemx.h", "lib/libnvshmem_device.a")

Version = tuple[int, int, int]


class Found(NamedTuple):
    """A folder that should hold NVSHMEM's `include` and `lib`; `origin` says how it was found."""

    folder: Path
    origin: str
    version: Version | None

    def __str__(self) -> str:
        return f"NVSHMEM {shown(self.version)} in {self.folder} ({self.origin})"


def find() -> Found | None:
    """NVSHMEM_DIR if it is set, and nothing else then; or the registry's package, which is nvidia/nvshmem on sys.path."""
    if named := os.environ.get("NVSHMEM_DIR"):
        return Found(Path(named), "NVSHMEM_DIR", version_in(Path(named)))
    for site in [*sys.path, sysconfig.get_paths()["purelib"]]:
        folder = Path(site or ".") / "nvidia" / "nvshmem"
        if folder.is_dir():
            return Found(folder, "the registry's package", version_in(folder))
    return None


def obstacle(found: Found | None, to_build: bool = False) -> str:
    """Why the rdma engine cannot run with what `find` found or, `to_build`, be compiled with it; "" if it can."""
    if found is None:
        return f"no NVSHMEM: NVSHMEM_DIR is not set and no nvidia/nvshmem is on sys.path; {NEEDED}: {REMEDY}"
    if not found.folder.is_dir():
        return f"{found.origin}={found.folder} is not a folder; {NEEDED}: {REMEDY}"
    missing = [] if host_library(found.folder) else [f"lib/{_HOST}.3"]
    missing += [name for name in _TO_BUILD if to_build and not (found.folder / name).is_file()]
    if missing:
        return f"{found} lacks {', '.join(missing)}; {NEEDED}: {REMEDY}"
    if found.version is None:
        return f"{found.folder} ({found.origin}) does not say which NVSHMEM it is; {NEEDED}: {REMEDY}"
    if found.version < MINIMUM:
        return f"found {found}, but {NEEDED}: {REMEDY}"
    return ""


def load(found: Found | None) -> None:
    """Put the host library where the engine's extension finds its symbols; before the extension is imported.

    torch's CUDA builds load the registry package's library when they are imported, whatever NVSHMEM_DIR says, and what is
    linked to a library of that name gets the one that is there already. So the extension is not linked to it. Opened by its
    path the right one comes beside torch's, whose symbols are not global.

    Raises:
        ImportError: names what was found and what is needed, or whose symbols come first in this process.
    """
    if why := obstacle(found):
        raise ImportError(why)
    assert found is not None
    numbers = [ctypes.c_int() for _ in range(3)]
    try:
        ctypes.CDLL(str(host_library(found.folder)), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(None).nvshmemx_vendor_get_version_info(*map(ctypes.byref, numbers))
    except (OSError, AttributeError) as error:  # it is broken, or what it needs is not there
        raise ImportError(f"{found} cannot be loaded: {error}; {NEEDED}: {REMEDY}") from error
    version = (numbers[0].value, numbers[1].value, numbers[2].value)
    if version < MINIMUM:
        raise ImportError(f"NVSHMEM {shown(version)}'s symbols come before those of {found} (LD_PRELOAD?), but {NEEDED}")


def host_library(folder: Path) -> Path | None:
    """The library that programs load. The registry's package has it under its versioned name only."""
    return next((path for name in (f"{_HOST}.3", _HOST) if (path := folder / "lib" / name).is_file()), None)


def version_in(folder: Path) -> Version | None:
    """By its header or, where only libraries are installed, by the text that the library prints."""
    header = folder / _VERSION_HEADER
    if header.is_file():
        numbers = dict(re.findall(r"#define NVSHMEM_VENDOR_(MAJOR|MINOR|PATCH)_VERSION (\d+)", header.read_text()))
        if len(numbers) == 3:
            return int(numbers["MAJOR"]), int(numbers["MINOR"]), int(numbers["PATCH"])
    library = host_library(folder)
    if library is None or library.stat().st_size == 0:
        return None
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        match = re.search(rb"NVSHMEM v(\d+)\.(\d+)\.(\d+)", content)
        return (int(match[1]), int(match[2]), int(match[3])) if match else None


def shown(version: Version | None) -> str:
    return "of unknown version" if version is None else ".".join(map(str, version))
