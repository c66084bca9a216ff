"""Every kernel compiles without spills, for all that setup.py builds by default and as a debug build. Needs nvcc, no GPU."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import setup

NVCC = setup.find_nvcc()
CSRC = Path(__file__).parents[1] / "csrc"
NVSHMEM = None if NVCC is None else setup.nvshmem()
# Only what includes NVSHMEM's headers needs them; functions of those spill a little, so our kernels are looked at by name.
OVER_NVSHMEM = ("rdma/low_latency.cu", "rdma/rail.cu")
KERNELS = sorted(p.relative_to(CSRC).as_posix() for p in CSRC.rglob("*.cu"))


@pytest.mark.skipif(NVCC is None, reason="there is no nvcc, neither in CUDA_HOME nor on PATH nor from the registry's wheels")
@pytest.mark.parametrize("build", [["80", "90", "100"], ["90", "-DDEEPEP_TRAIN_DEBUG"]], ids=["release", "debug"])
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_without_spills(name: str, build: list[str], tmp_path: Path) -> None:
    if name in OVER_NVSHMEM:
        pytest.skip("see test_compiles_with_nvshmem")
    flags = ["-std=c++17", "-O3", "-Xptxas", "-v"]
    flags += [what if what.startswith("-") else f"-gencode=arch=compute_{what},code=sm_{what}" for what in build]
    assert NVCC is not None
    command = [NVCC, *flags, "-c", str(CSRC / name), "-o", str(tmp_path / "out.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert spills or "global" not in (CSRC / name).read_text(), "ptxas reported nothing"
    assert all(int(n) == 0 for sizes in spills for n in sizes), done.stderr


@pytest.mark.skipif(NVSHMEM is None, reason="there is no NVSHMEM 3.8 or later, neither in NVSHMEM_DIR nor from the registry")
@pytest.mark.parametrize("name", OVER_NVSHMEM)
def test_compiles_with_nvshmem(name: str, tmp_path: Path) -> None:
    assert NVCC is not None
    assert NVSHMEM is not None
    flags = ["-std=c++17", "-O3", "-Xptxas", "-v", "-gencode=arch=compute_90,code=sm_90", *setup.with_nvshmem(NVCC, NVSHMEM)]
    command = [NVCC, *flags, "-c", str(CSRC / name), "-o", str(tmp_path / "out.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ours = re.findall(
        r"Function properties for \S*deepep_train\S*_kernel\S*\n.*?(\d+) bytes spill stores, (\d+) bytes spill", done.stderr
    )
    assert ours, "ptxas reported nothing"
    assert all(n == "0" for sizes in ours for n in sizes), done.stderr
