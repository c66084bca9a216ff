"""Which rank the wait statistics name."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from harness import run_ranks

from deepep_train.waits import judge, who_is_slow


def test_a_rank_that_all_others_wait_for_stands_out() -> None:
    waited = torch.full((4, 4), 5_000 * 10)
    waited[:, 2] = 400_000 * 10
    waited[2] = 1_000 * 10  # it comes last, so it waits for nobody
    waits = judge(waited, 10)
    assert waits.slow == [2] and waits.by_rank[2] == 400_000
    assert "slow: rank 2" in str(waits)


def test_what_a_rank_waits_for_itself_and_small_differences_do_not_count() -> None:
    waited = torch.full((3, 3), 2_000)
    waited[1, 1] = 10**9
    waited[:, 0] = 12_000
    assert judge(waited, 1).slow == []


def _gathered(rank: int, size: int, group: dist.ProcessGroup) -> Any:
    mine = torch.tensor([0, 900_000])
    return list(who_is_slow(mine, 3, group))


def test_all_ranks_hear_the_same() -> None:
    first, second = run_ranks(2, _gathered)
    assert first == second == [[0.0, 300_000.0], [1]]
