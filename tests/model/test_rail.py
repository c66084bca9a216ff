"""The rdma engine's protocol (docs/rdma.md): spin searches all interleavings of its model."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

MODEL = Path(__file__).parent / "rail.pml"

pytestmark = [
    pytest.mark.skipif(shutil.which("spin") is None, reason="spin is not installed (Debian's package spin)"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="spin's verifier needs gcc"),
]


def search(where: Path, *defines: str) -> tuple[int, str]:
    """Errors that an exhaustive search finds, and what it prints."""
    spin = ["spin", "-a", *(f"-D{d}" for d in defines), str(MODEL)]
    subprocess.run(spin, cwd=where, check=True, capture_output=True, text=True, timeout=60)
    compiler = ["gcc", "-O2", "-w", "-DSAFETY", "-DCOLLAPSE", "-o", "pan", "pan.c"]
    subprocess.run(compiler, cwd=where, check=True, capture_output=True, text=True, timeout=60)
    out = subprocess.run(
        ["./pan", "-m100000", "-w24"], cwd=where, check=False, capture_output=True, text=True, timeout=200
    ).stdout
    found = re.search(r"errors: (\d+)", out)
    assert found, out
    assert "max search depth too small" not in out and "out of memory" not in out, out
    return int(found.group(1)), out


def test_every_interleaving_is_safe(tmp_path: Path) -> None:
    """Two rounds; rank 0's first token goes to any ranks."""
    errors, out = search(tmp_path, "ANY=1")
    assert errors == 0, out
    unreached = re.findall(r"^\s+\S+\.pml:\d+, state \d+, \"(?!-end-)(.+)\"$", out, re.MULTILINE)
    assert not unreached, f"the search never came to {unreached}"


def test_a_third_round_is_like_the_second(tmp_path: Path) -> None:
    errors, out = search(tmp_path, "ANY=0", "ROUNDS=3")
    assert errors == 0, out


@pytest.mark.parametrize(
    ("broken", "violated"),
    [
        ("NO_READY", r"unread"),  # a slot is overwritten before it was read
        ("ONE_SLOT", r"ready"),  # what was said of an exchange is overwritten before it is read
        ("EARLY_SIGNAL", r"recv"),  # a row is read before it came
        ("NO_ARRIVED", r"recv"),
        ("NO_QUIET", r"recv"),  # what a put reads is overwritten before it has left
        ("NO_MEETING", r"opened"),  # rows are stored where no tensor is yet
        ("NO_FINISH", r"place"),  # the receiver reads what has not come
        ("NO_RELEASE", r"shown"),  # rows are summed that their owner has overwritten
    ],
)
def test_a_protocol_broken_on_purpose_is_found_out(tmp_path: Path, broken: str, violated: str) -> None:
    errors, out = search(tmp_path, "ANY=1", broken)
    assert errors > 0
    assert re.search(r"pan:1: assertion violated .*" + violated, out), out
