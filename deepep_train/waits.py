"""Who keeps the others waiting: what the low-latency calls' wait statistics say."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_TIMES_OTHERS = 3.0  # a rank is slow if it is waited for so many times as long as the median rank,
_LEAST_NS = 20_000  # and at least so long a call


class Waits(NamedTuple):
    """Attributes:
    by_rank: for each rank, the mean nanoseconds a call that the other ranks waited for it.
    slow: ranks that stand out, the slowest first.
    """

    by_rank: list[float]
    slow: list[int]

    def __str__(self) -> str:
        each = ", ".join(f"{ns / 1e3:.1f}" for ns in self.by_rank)
        who = f"slow: rank {', '.join(map(str, self.slow))}" if self.slow else "no rank stands out"
        return f"us a call that the others waited for each rank: {each}; {who}"


def who_is_slow(wait_ns: Tensor, calls: int, group: dist.ProcessGroup | None = None) -> Waits:
    """Put together what every rank has counted; a collective call of the group.

    Args:
        wait_ns: int64 [R], `dispatch_wait_recv_cost_stats` or `combine_wait_recv_cost_stats` after `calls` calls.
    """
    mine = wait_ns.cpu()
    table = [mine]
    if dist.is_initialized() and mine.numel() > 1:
        everyone: list[Tensor | None] = [None] * mine.numel()
        dist.all_gather_object(everyone, mine, group=group)
        table = [t for t in everyone if t is not None]
    return judge(torch.stack(table), calls)


def judge(waited: Tensor, calls: int) -> Waits:
    """`waited`, int64 [R, R]: nanoseconds that each rank waited for each."""
    size = waited.size(0)
    others = waited.double() * (1 - torch.eye(size, dtype=torch.float64))
    by_rank = others.sum(0) / max(size - 1, 1) / max(calls, 1)
    least = max(_LEAST_NS, _TIMES_OTHERS * float(by_rank.median()))
    slow = [int(r) for r in by_rank.argsort(descending=True) if by_rank[r] > least]
    return Waits(by_rank.tolist(), slow)
