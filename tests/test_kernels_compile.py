"""Every kernel compiles for Hopper without spilling registers. Needs nvcc and no GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
KERNELS = sorted(p.relative_to(CSRC).as_posix() for p in CSRC.rglob("*.cu"))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc on PATH")
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_without_spills(name: str, tmp_path: Path) -> None:
    flags = ["-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas", "-v"]
    command = ["nvcc", *flags, "-c", str(CSRC / name), "-o", str(tmp_path / "out.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert spills or "global" not in (CSRC / name).read_text(), "ptxas reported nothing"
    assert all(int(n) == 0 for sizes in spills for n in sizes), done.stderr
