"""N ranks as streams of one process, also under the sanitizers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("in_process.py")
ROOT = SCRIPT.parents[2]


def run(*arguments: str, before: tuple[str, ...] = (), seconds: int = 150) -> str:
    environment = os.environ | {"CUDA_MODULE_LOADING": "EAGER", "CUDA_DEVICE_MAX_CONNECTIONS": "32"}
    environment |= {"CUDA_MPS_PIPE_DIRECTORY": "/nonexistent"}
    environment["PYTHONPATH"] = ":".join((str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")))
    command = [*before, sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=seconds, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout + done.stderr


@pytest.mark.parametrize("size", ["1", "2", "4", "8", "12"])
def test_ranks_as_streams(size: str) -> None:
    assert "fine" in run(size, "16")


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="there is no compute-sanitizer on PATH")
@pytest.mark.parametrize("size", ["1", "2"])
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizers_find_nothing(tool: str, size: str) -> None:
    text = run(size, "16", before=("compute-sanitizer", "--tool", tool, "--error-exitcode", "9"), seconds=250)
    assert re.search(r"ERROR SUMMARY: 0 errors|0 hazards", text), text[-2000:]
