"""What a test needs of the machine: without it the test is skipped, in CI (`.ci/run`) it fails, for there it must be."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def need(found: object, reason: str) -> None:
    """`reason`: what is missing unless `found`."""
    if found:
        return
    if os.environ.get("DEEPEP_TRAIN_CI") == "1":
        pytest.fail(f"{reason}; DEEPEP_TRAIN_CI=1 says that it must be here", pytrace=False)
    pytest.skip(reason)


def setup_py() -> ModuleType:
    """setup.py without its call of `setup`."""
    spec = importlib.util.spec_from_file_location("deepep_train_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def need_nvcc() -> str:
    found = setup_py().find_nvcc()
    need(found, "there is no nvcc, neither in CUDA_HOME nor on PATH nor from the registry's wheels")
    return found


def need_nvshmem() -> Path:
    """3.8 or later, to compile with."""
    found = setup_py().nvshmem()
    need(found, "there is no NVSHMEM 3.8 or later, neither in NVSHMEM_DIR nor from the registry (.ci/nvshmem.sh installs it)")
    return found


def need_built(name: str) -> str:
    """The file of an extension of the package."""
    spec = importlib.util.find_spec(f"deepep_train.{name}")
    need(spec, f"the package was built without deepep_train.{name}: setup.py says why")
    assert spec is not None and spec.origin is not None
    return spec.origin


def need_cuobjdump() -> str:
    """On PATH, or triton's, which comes with torch."""
    triton = importlib.util.find_spec("triton")
    place = Path(triton.origin).parent / "backends" / "nvidia" / "bin" if triton is not None and triton.origin else Path()
    found = shutil.which("cuobjdump") or shutil.which(place / "cuobjdump")
    need(found, "there is no cuobjdump, neither on PATH nor beside triton")
    assert found is not None
    return found
