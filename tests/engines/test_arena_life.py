"""When an arena's memory is freed: its C++ on a CPU (arena_on_cpu.cpp). What a GPU shows: tests/gpu/destroy_in_process.py."""

from __future__ import annotations

import subprocess
from pathlib import Path

from needs import ROOT, need_nvcc


def test_memory_is_freed_when_nobody_can_reach_it(tmp_path: Path) -> None:
    program = tmp_path / "arena"
    command = [need_nvcc(), "-std=c++17", "-cudart", "none", str(ROOT / "tests/arena_on_cpu.cpp"), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == ""
