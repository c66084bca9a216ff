"""Ranks that fail, and ranks that hang."""

from __future__ import annotations

import time

import pytest
import torch.distributed as dist

from deepep_train import DeepEPError
from deepep_train.cli.launch import run_ranks


def only_rank_1_fails() -> None:
    if dist.get_rank() == 1:
        raise RuntimeError("the bridge is out")
    time.sleep(300)


def waits_for_ever() -> None:
    time.sleep(300)


def test_a_failing_rank_ends_the_others(capfd: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    with pytest.raises(DeepEPError, match="rank 1 failed first"):
        run_ranks(2, only_rank_1_fails, deadline=120.0, device="cpu")
    assert time.monotonic() - start < 100
    assert "[rank 1] RuntimeError: the bridge is out" in capfd.readouterr().err


def test_the_deadline_ends_all_ranks(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DeepEPError, match=r"ranks \[0, 1\] had not finished after 15 s"):
        run_ranks(2, waits_for_ever, deadline=15.0, device="cpu")
    assert "waits_for_ever" in capfd.readouterr().err  # where they were
