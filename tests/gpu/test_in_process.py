"""N ranks as streams of one process, also under the sanitizers; and the machine code's intended instructions."""

from __future__ import annotations

import importlib.util
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
    environment |= {"CUDA_MPS_PIPE_DIRECTORY": "/nonexistent", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    command = [*before, sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=seconds, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout + done.stderr


@pytest.mark.parametrize("size", ["1", "2", "4", "8"])
def test_ranks_as_streams(size: str) -> None:
    assert "fine" in run(size, "5")


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="there is no compute-sanitizer on PATH")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizers_find_nothing(tool: str) -> None:
    # One rank: whether the sanitizers let kernels of several ranks run at once has not been found out yet.
    text = run("1", "1", before=("compute-sanitizer", "--tool", tool, "--error-exitcode", "9"), seconds=300)
    assert re.search(r"ERROR SUMMARY: 0 errors|0 hazards", text), text[-2000:]


@pytest.mark.skipif(shutil.which("cuobjdump") is None, reason="there is no cuobjdump on PATH")
def test_machine_code() -> None:
    """On one GPU a single L2 hides wrong memory orders, so the instructions themselves are looked at."""
    spec = importlib.util.find_spec("deepep_train._C")
    assert spec is not None
    assert spec.origin is not None
    command = ["cuobjdump", "--dump-sass", "-arch", "sm_90a", spec.origin]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    bodies = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)", sass, re.S))
    for name in ("dispatch_kernel", "combine_kernel", "expand_kernel", "reduce_kernel"):
        body = "\n".join(text for symbol, text in bodies.items() if name in symbol)
        assert "UBLKCP" in body, f"{name} does not use the bulk copy engine"
        assert ".CONSTANT" not in body, f"{name} reads through the non-coherent path"
    for name in ("dispatch_kernel", "combine_kernel", "count_kernel"):
        body = "\n".join(text for symbol, text in bodies.items() if name in symbol)
        assert re.search(r"LD\S*\.STRONG\.SYS", body), f"{name} polls no flag with .sys scope"
        assert re.search(r"ST\S*\.STRONG\.SYS", body), f"{name} raises no flag with .sys scope"
        assert re.search(r"MEMBAR\S*\.SYS", body), f"{name} has no fence before its flags"
