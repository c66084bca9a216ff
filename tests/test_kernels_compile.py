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
KERNELS = sorted(p.relative_to(CSRC).as_posix() for p in CSRC.rglob("*.cu"))


@pytest.mark.skipif(NVCC is None, reason="there is no nvcc, neither in CUDA_HOME nor on PATH nor from the registry's wheels")
@pytest.mark.parametrize("build", [["80", "90", "100"], ["90", "-DDEEPEP_TRAIN_DEBUG"]], ids=["release", "debug"])
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_without_spills(name: str, build: list[str], tmp_path: Path) -> None:
    flags = ["-std=c++17", "-O3", "-Xptxas", "-v"]
    flags += [what if what.startswith("-") else f"-gencode=arch=compute_{what},code=sm_{what}" for what in build]
    assert NVCC is not None
    command = [NVCC, *flags, "-c", str(CSRC / name), "-o", str(tmp_path / "out.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert spills or "global" not in (CSRC / name).read_text(), "ptxas reported nothing"
    assert all(int(n) == 0 for sizes in spills for n in sizes), done.stderr
