"""The rdma engine's exchanges in stages (docs/rdma.md): spin searches all interleavings of their model."""

from __future__ import annotations

from pathlib import Path

import pytest
from searching import NEEDED, assert_found_out, assert_nothing_unreached, assert_safe

MODEL = "stages.pml"
pytestmark = NEEDED


def test_every_interleaving_is_safe(tmp_path: Path) -> None:
    assert_nothing_unreached(assert_safe(MODEL, tmp_path))


@pytest.mark.parametrize(
    ("broken", "violated"),
    [
        ("NO_EVENT", r"recv"),  # passed on before it came
        ("NO_JOIN", r"recv"),  # summed before all has come back
        ("NO_FORK", r"unread"),  # a segment is overwritten before it was read
        ("NO_READY", r"unread"),
    ],
)
def test_a_protocol_broken_on_purpose_is_found_out(tmp_path: Path, broken: str, violated: str) -> None:
    assert_found_out(MODEL, tmp_path, violated, broken)
