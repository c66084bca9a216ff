"""NVSHMEM's memory for low-latency calls across nodes: taken once, and used again when all ranks have finished with it.

To give memory back to NVSHMEM is a collective call, which `Buffer.destroy` is not. So what a destroyed buffer had is kept
here, for the process, as NVSHMEM serves one group of ranks as long as it lives. A block is used again if every rank of the
group offers it in the same round, and a rank offers it only when all its own launches through it have ended. A launch ends
behind the quiet of its puts and flags, so nothing is then on its way, from whatever rank to whatever rank. No order of
destroying, and no equal history, is assumed: blocks have names that all ranks were told in the round that took them, and
a rank that has missed something does not offer, so that the others take new memory with it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch


class Block(NamedTuple):
    """Attributes:
    name: the same on all ranks, and no other block's.
    address: in this process.
    """

    name: int
    num_bytes: int
    address: int


_lock = threading.Lock()
_given_back: list[tuple[Block, torch.cuda.Event]] = []  # the event: behind all of this rank's uses


def give_back(block: Block, behind: torch.cuda.Event) -> None:
    """Nothing on this rank uses the block any more once `behind` is over, replays of graphs included."""
    with _lock:
        _given_back.append((block, behind))


@contextmanager
def offered() -> Iterator[dict[int, Block]]:
    """The blocks that this rank has finished with, by name. Whoever uses one takes it out; until the end nobody else is offered
    them, so that rounds of two threads cannot choose the same."""
    with _lock:
        mine = [(block, behind) for block, behind in _given_back if behind.query()]
        names = {block.name for block, _ in mine}
        _given_back[:] = [kept for kept in _given_back if kept[0].name not in names]
    idle = {block.name: block for block, _ in mine}
    try:
        yield idle
    finally:
        with _lock:
            _given_back.extend(kept for kept in mine if kept[0].name in idle)


def choose(offers: Sequence[Sequence[Sequence[int]]], num_bytes: int) -> int | None:
    """The name of the smallest block of at least `num_bytes` that all ranks offer, the same on all; None: there is none.

    Args:
        offers: of every rank, (name, bytes) of each block.
    """
    everyones = set.intersection(*({(size, name) for name, size in offer} for offer in offers))
    fitting = sorted((size, name) for size, name in everyones if size >= num_bytes)
    return fitting[0][1] if fitting else None
