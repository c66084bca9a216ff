"""The exchanges of a fresh dispatch, rows before words (docs/rdma.md): spin searches all interleavings of their model."""

from __future__ import annotations

from pathlib import Path

import pytest
from searching import NEEDED, assert_found_out, assert_nothing_unreached, assert_safe

MODEL = "words.pml"
pytestmark = NEEDED


def test_every_interleaving_is_safe(tmp_path: Path) -> None:
    assert_nothing_unreached(assert_safe(MODEL, tmp_path))


@pytest.mark.parametrize(
    ("broken", "violated"),
    [
        ("NO_OFFSET", r"unread"),  # words overwrite rows that have not been passed on
        ("NO_READY", r"unread"),
        ("ROWS_LAST", r"unread"),  # the next exchange's do
    ],
)
def test_a_protocol_broken_on_purpose_is_found_out(tmp_path: Path, broken: str, violated: str) -> None:
    assert_found_out(MODEL, tmp_path, violated, broken)
