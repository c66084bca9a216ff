"""The low-latency calls' puts, flags and answers between nodes (docs/low_latency.md): spin searches all interleavings."""

from __future__ import annotations

from pathlib import Path

import pytest
from searching import NEEDED, assert_found_out, assert_nothing_unreached, assert_safe

MODEL = "low_latency.pml"
pytestmark = NEEDED


def test_every_interleaving_is_safe(tmp_path: Path) -> None:
    assert_nothing_unreached(assert_safe(MODEL, tmp_path))


@pytest.mark.parametrize(
    ("broken", "violated"),
    [
        ("EARLY_FLAG", r"slot|came"),  # what it announces has not come
        ("LATE_FLAG", r"unsummed"),  # one of before counts as an answer after beginning anew
        ("NO_TAKEN", r"unread"),  # a slot is overwritten before it was read
        ("NO_PULLED", r"unsummed"),  # a row that has come back is overwritten before it was summed
    ],
)
def test_a_protocol_broken_on_purpose_is_found_out(tmp_path: Path, broken: str, violated: str) -> None:
    assert_found_out(MODEL, tmp_path, violated, broken)
