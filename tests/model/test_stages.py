"""The rdma engine's exchanges in stages (docs/rdma.md): spin searches all interleavings of their model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from searching import NEEDED, assert_nothing_unreached, search

MODEL = "stages.pml"
pytestmark = NEEDED


def test_every_interleaving_is_safe(tmp_path: Path) -> None:
    errors, out = search(MODEL, tmp_path)
    assert errors == 0, out
    assert_nothing_unreached(out)


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
    errors, out = search(MODEL, tmp_path, broken)
    assert errors > 0
    assert re.search(r"pan:1: assertion violated .*" + violated, out), out
