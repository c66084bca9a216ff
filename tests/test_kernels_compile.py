"""Every kernel compiles without spills, for all that setup.py builds by default and as a debug build. Needs nvcc, no GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
KERNELS = sorted(p.relative_to(CSRC).as_posix() for p in CSRC.rglob("*.cu"))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc on PATH")
@pytest.mark.parametrize("build", [["80", "90a", "100"], ["90a", "-DDEEPEP_TRAIN_DEBUG"]], ids=["release", "debug"])
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_without_spills(name: str, build: list[str], tmp_path: Path) -> None:
    flags = ["-std=c++17", "-O3", "-Xptxas", "-v"]
    flags += [what if what.startswith("-") else f"-gencode=arch=compute_{what},code=sm_{what}" for what in build]
    command = ["nvcc", *flags, "-c", str(CSRC / name), "-o", str(tmp_path / "out.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert spills or "global" not in (CSRC / name).read_text(), "ptxas reported nothing"
    assert all(int(n) == 0 for sizes in spills for n in sizes), done.stderr
