"""The protocol of docs/rdma.md, state by state: spin searches all interleavings of the models of its dispatch and combine."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent

pytestmark = [
    pytest.mark.skipif(shutil.which("spin") is None, reason="spin is not installed (Debian's package spin)"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="spin's verifier needs gcc"),
]

# Rows of both ways at once have too many interleavings to search; see the models for why one way stands for both.
ALWAYS = {"forwarding": ("ONE_WAY", "ANY=1", "ROUNDS=3"), "combining": ("ANY=1", "ROUNDS=3")}


def search(where: Path, model: str, *defines: str) -> tuple[int, str]:
    """Errors that an exhaustive search finds, and what it prints."""
    spin = ["spin", "-a", *(f"-D{d}" for d in (*ALWAYS[model], *defines)), str(HERE / f"{model}.pml")]
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


@pytest.mark.parametrize("slots", [1, 2], ids=lambda n: f"{n} slots")
@pytest.mark.parametrize("model", ALWAYS)
def test_every_interleaving_is_safe(tmp_path: Path, model: str, slots: int) -> None:
    """All routings of one rank's tokens. With 2 slots for 2 tokens no row waits for one of its own round."""
    errors, out = search(tmp_path, model, f"W={slots}")
    assert errors == 0, out
    unreached = re.findall(r"^\s+\S+\.pml:\d+, state \d+, \"(?!-end-)(.+)\"$", out, re.MULTILINE)
    assert not unreached, f"the search never came to {unreached}"


@pytest.mark.parametrize(
    "model,broken,violated",
    [
        ("forwarding", "NO_CREDIT", r"slot_row"),  # a slot is written before it was read
        ("forwarding", "EARLY_SIGNAL", r"row!=0"),  # a row is read before it came
        ("forwarding", "ONE_COUNT_SLOT", r"counted"),  # counts are overwritten by those of the next round
        ("forwarding", "NO_OPEN", r"opened"),  # rows are stored where no tensor is yet
        ("forwarding", "NO_DONE", r"place"),  # the receiver reads what has not come
        ("forwarding", "LOST_CREDIT", r"invalid end state"),  # a sender waits for ever
        ("combining", "NO_CREDIT", r"slot_row"),
        ("combining", "EARLY_SIGNAL", r"slot_row"),
        ("combining", "NO_READY", r"rows"),  # rows are summed that are not there yet
        ("combining", "NO_RELEASE", r"rows"),  # or that the next round has overwritten
        ("combining", "LOST_CREDIT", r"invalid end state"),
    ],
)
def test_a_protocol_broken_on_purpose_is_found_out(tmp_path: Path, model: str, broken: str, violated: str) -> None:
    errors, out = search(tmp_path, model, broken)
    assert errors > 0
    assert re.search(r"pan:1: .*" + violated, out), out


def test_dispatch_both_ways_at_once_ends_in_random_runs() -> None:
    for seed in range(20):
        command = ["spin", f"-n{seed}", "-u200000", "-DANY=4", str(HERE / "forwarding.pml")]
        out = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60).stdout
        assert "timeout" not in out and "violated" not in out, out
        assert re.search(r"^13 processes created", out, re.MULTILINE), out
