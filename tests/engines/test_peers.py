"""The roll call after a failure: who does not answer is whom all wait for."""

from __future__ import annotations

import torch.distributed as dist
from harness import run_ranks

from deepep_train.engines.base import Prepared
from deepep_train.engines.peers import Peers


def after_different_calls(rank: int, size: int, group: dist.ProcessGroup, silent: int) -> list[int] | None:
    peers = Peers(group, 5.0, number=1000 + silent)
    for _ in range(rank):
        peers.describe("dispatch", Prepared(lambda: None))
    return None if rank == silent else peers.roll_call()


def test_ranks_that_noticed_in_different_calls_find_each_other() -> None:
    for silent in (3, 0):
        said = run_ranks(4, after_different_calls, silent)
        assert said == [None if rank == silent else [silent] for rank in range(4)]
