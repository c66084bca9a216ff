"""Exchanges through shared memory, against what everybody sent."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks

from deepep_train import DeepEPError
from deepep_train.engines import outboxes
from deepep_train.engines.peers import Peers

ROUNDS = 40


def rows_of(source: int, round_: int, size: int) -> list[torch.Tensor]:
    """What `source` sends to each rank: none, a few, or, in one round in ten, many rows."""
    g = torch.Generator().manual_seed(1000 * round_ + source)
    most = 3000 if round_ % 10 == 9 else 5
    counts = torch.randint(0, most, (size,), generator=g).tolist()
    return [torch.randint(0, 255, (n, 3), generator=g, dtype=torch.uint8) for n in counts]


def exchanges(rank: int, size: int, group: dist.ProcessGroup, is_shared: bool) -> int:
    peers = Peers(group, 30.0)
    if is_shared:
        peers.connect()
    assert (peers.outboxes is not None) == is_shared
    for round_ in range(ROUNDS):
        sent = [rows_of(r, round_, size) for r in range(size)]
        mine = torch.cat(sent[rank])
        if round_ % 2:  # rows that are put where they are sent from
            mine = peers.outgoing(mine.shape, mine).copy_(mine)
        give, take = [len(r) for r in sent[rank]], [len(s[rank]) for s in sent]
        got = peers.all_to_all_rows(mine, give, take, "exchange", spare=round_ % 3)
        want = torch.cat([*(s[rank] for s in sent), torch.zeros(round_ % 3, 3, dtype=torch.uint8)])
        assert torch.equal(got, want), round_
        if not round_ % 2:
            mine.fill_(77)  # the sender's memory is its own again, though others may still be reading
    return 0 if peers.outboxes is None else peers.outboxes.num_bytes()


@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.parametrize("size", [2, 4])
def test_rows_arrive(size: int, is_shared: bool) -> None:
    kept = run_ranks(size, exchanges, is_shared)
    assert all(n > 0 for n in kept) == is_shared


def late(rank: int, size: int, group: dist.ProcessGroup) -> list[int]:
    """Rank 0 gives its memory back as soon as it is through, while rank 1 takes long to open it."""
    peers = Peers(group, 30.0)
    peers.connect()
    if rank == 1:
        opened = outboxes._opened

        def slowly(*where: int) -> torch.Tensor:
            time.sleep(0.5)
            return opened(*where)

        outboxes._opened = slowly
    got = peers.all_to_all_rows(torch.full((2, 1), rank), [1, 1], [1, 1], "exchange")
    if rank == 0:
        assert peers.outboxes is not None
        peers.outboxes.close()
    return got.flatten().tolist()


def test_an_outbox_is_open_to_all_before_it_can_be_closed() -> None:
    assert run_ranks(2, late, fresh=True) == [[0, 1]] * 2


def refused(rank: int, size: int, group: dist.ProcessGroup) -> bool:
    if rank == 1:
        outboxes._can_open = lambda *_: False  # type: ignore[assignment]
    peers = Peers(group, 30.0)
    peers.connect()
    return peers.outboxes is None


def test_all_ranks_or_none() -> None:
    assert run_ranks(3, refused, fresh=True) == [True] * 3


def test_other_counts_than_expected_are_told() -> None:
    box = outboxes.Outboxes(0, [os.getpid()])
    sent = torch.ones(4, dtype=torch.uint8)
    with pytest.raises(DeepEPError, match=r"send \[4\] bytes, rank 0 takes \[3\]"):
        box.exchange(sent, [4], [3], torch.zeros(3, dtype=torch.uint8), lambda mine: mine)
    box.close()


def descriptors(rank: int, size: int, group: dist.ProcessGroup) -> list[int]:
    """Open files after each of some buffers' lives."""
    import deepep_train as dt

    found: list[Any] = []
    for _ in range(4):
        buffer = dt.Buffer(group)
        out = dt.dispatch(torch.ones(5, 4), torch.zeros(5, 1, dtype=torch.int64), None, buffer=buffer, num_experts=size)
        dt.combine(out.x, out.handle)
        buffer.destroy()
        found.append(len(os.listdir("/proc/self/fd")))
    return found


def test_buffers_leave_no_files_open() -> None:
    for found in run_ranks(2, descriptors):
        assert len(set(found[1:])) == 1, found
