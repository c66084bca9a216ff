"""N ranks as streams of one process; and the sanitizers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

STREAMS, PROCESSES, LOW_LATENCY, LOW_LATENCY_PROCESSES, DESTROY = (
    Path(__file__).with_name(f"{name}.py")
    for name in ("in_process", "two_processes", "low_latency_in_process", "low_latency_two_processes", "destroy_in_process")
)
ROOT = STREAMS.parents[2]


def run(*arguments: str, before: tuple[str, ...] = (), seconds: int = 150, loading: str = "EAGER") -> str:
    """Threads must not load kernels while others' wait for theirs; processes may, and do not load all of torch's."""
    environment = os.environ | {"CUDA_MODULE_LOADING": loading, "CUDA_DEVICE_MAX_CONNECTIONS": "32"}
    environment |= {"CUDA_MPS_PIPE_DIRECTORY": "/nonexistent"}
    environment.pop("DEEPEP_TRAIN_ONLY_RANKS", None)  # of tests, not of these scripts
    environment["PYTHONPATH"] = ":".join(
        (str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "gpu"), os.environ.get("PYTHONPATH", ""))
    )
    command = [*before, sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=seconds, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout + done.stderr


@pytest.mark.parametrize("size", ["1", "2", "4", "8", "12"])
def test_ranks_as_streams(size: str) -> None:
    assert "fine" in run(str(STREAMS), size, "16")


@pytest.mark.parametrize("size", ["1", "2", "4", "8"])
def test_low_latency_ranks_as_streams(size: str) -> None:
    """Round trips; then a soak, graphs, late hooks and a rank that is masked and comes back."""
    assert "fine" in run(str(LOW_LATENCY), size, "12", "1000" if size != "1" else "0")


def test_a_late_rank_finds_the_memory_of_a_destroyed_buffer() -> None:
    assert "fine" in run(str(DESTROY))


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="there is no compute-sanitizer on PATH")
@pytest.mark.parametrize("script", ["one rank", "two ranks", "low latency", "low latency, two ranks"])
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizers_find_nothing(tool: str, script: str) -> None:
    """Several ranks must be processes here: while one thread waits for its stream, the sanitizer lets no other of the process
    launch, and the stream's kernel may wait for just that one's."""
    before = ("compute-sanitizer", "--target-processes", "all", "--tool", tool, "--error-exitcode", "9")
    if script == "one rank":
        text = run(str(STREAMS), "1", "16", before=before, seconds=250)
    elif script == "low latency":
        text = run(str(LOW_LATENCY), "1", "12", before=before, seconds=250)
    elif script == "low latency, two ranks":
        text = run(str(LOW_LATENCY_PROCESSES), before=before, seconds=250, loading="LAZY")
    else:
        text = run(str(PROCESSES), before=before, seconds=250, loading="LAZY")
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)  # of all processes together
    assert summaries and set(summaries) == {"0"}, text[-2000:]
    assert "fine" in text
