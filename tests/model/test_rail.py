"""The rdma engine's protocol (docs/rdma.md): spin searches all interleavings of its model."""

from __future__ import annotations

from pathlib import Path

import pytest
from searching import NEEDED, assert_found_out, assert_nothing_unreached, assert_safe

MODEL = "rail.pml"
pytestmark = NEEDED


def test_every_interleaving_is_safe(tmp_path: Path) -> None:
    """Two rounds; rank 0's first token goes to any ranks."""
    assert_nothing_unreached(assert_safe(MODEL, tmp_path, "ANY=1"))


def test_a_third_round_is_like_the_second(tmp_path: Path) -> None:
    assert_safe(MODEL, tmp_path, "ANY=0", "ROUNDS=3")


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
    assert_found_out(MODEL, tmp_path, violated, "ANY=1", broken)
