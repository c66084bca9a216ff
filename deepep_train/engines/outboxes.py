"""Rows between CPU ranks of one machine: each puts what it sends where the others can read it, instead of through sockets.

An outbox is anonymous shared memory (memfd), which dies with the processes that use it. Every rank has two, used in turn. An
exchange is: fill one's outbox, meet, copy one's rows out of the others'. Whoever has left the next meeting knows that all have
entered it, so that all have done copying: an outbox may be filled again two exchanges later, and one meeting is enough. Where
outboxes are new, or larger than before, all meet once more when they have opened them: their owner may close them then.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import secrets
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from deepep_train.engines import processes
from deepep_train.errors import DeepEPError

_TOKEN_BYTES = 16


class _Box:
    """Shared memory of this process, `size` bytes."""

    def __init__(self, size: int) -> None:
        self.fd = os.memfd_create("deepep_train", os.MFD_CLOEXEC)
        self.is_new = True  # to the others
        try:
            os.ftruncate(self.fd, size)
            self.bytes = _mapped(self.fd, size)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Peers that have mapped it keep it."""
        os.close(self.fd)


class Outboxes:
    """This rank's outboxes and its view of the others'.

    Args:
        rank: of this process.
        pids: of all ranks' processes.
    """

    def __init__(self, rank: int, pids: Sequence[int]) -> None:
        self._rank, self._pids = rank, list(pids)
        self._boxes: list[_Box | None] = [None, None]
        self._theirs: dict[tuple[int, int], Tensor] = {}  # by rank, and which of the two
        self._turn = 0
        self._lock = threading.RLock()

    def room(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes], where the next exchange sends from; rows that are put here need not be copied."""
        with self._lock:
            box = self._boxes[self._turn]
            if box is None or box.bytes.numel() < num_bytes:
                size = max(num_bytes, mmap.PAGESIZE, 0 if box is None else 2 * box.bytes.numel())
                if box is not None:
                    box.close()
                    self._boxes[self._turn] = None
                box = self._boxes[self._turn] = _Box(size)
            return box.bytes[:num_bytes]

    def exchange(
        self, sent: Tensor, give: Sequence[int], take: Sequence[int], out: Tensor, meet: Callable[[Tensor], Tensor]
    ) -> None:
        """Send `sent`, uint8 [sum(give)] by destination; fill `out`, uint8 [sum(take)], by source. All counts in bytes.

        Args:
            meet: gives every rank its row, int64 [R, n] by destination -> [R, n] by source.

        Raises:
            DeepEPError: if another rank sends other counts than this one takes.
        """
        with self._lock:
            room, starts = self.room(sent.numel()), list(itertools.accumulate(give, initial=0))
            own, behind = starts[self._rank], starts[self._rank + 1]
            if sent.data_ptr() != room.data_ptr():
                room[:own].copy_(sent[:own])
                room[behind:].copy_(sent[behind:])
            which, box = self._turn, self._boxes[self._turn]
            assert box is not None
            self._turn ^= 1
            about = (int(box.is_new), box.fd, box.bytes.numel())
            heard = meet(torch.tensor([(*about, start, n) for start, n in zip(starts, give, strict=False)])).tolist()
            for source, (is_new, fd, size, *_) in enumerate(heard):
                if is_new and source != self._rank:
                    self._theirs[source, which] = _opened(self._pids[source], fd, size)
            if any(is_new for is_new, *_ in heard):
                meet(torch.zeros(len(give), 1, dtype=torch.int64))
                box.is_new = False
            counts = [n for *_, n in heard]
            if counts != list(take):
                raise DeepEPError(f"an exchange of rows: the ranks send {counts} bytes, rank {self._rank} takes {list(take)}")
            at = 0
            for source, (*_, first, n) in enumerate(heard):
                memory = sent if source == self._rank else self._theirs[source, which]
                out[at : at + n].copy_(memory[first : first + n])
                at += n

    def num_bytes(self) -> int:
        """Of this rank's memory."""
        return sum(box.bytes.numel() for box in self._boxes if box is not None)

    def close(self) -> None:
        with self._lock:
            for box in self._boxes:
                if box is not None:
                    box.close()
            self._boxes = [None, None]
            self._theirs.clear()


def connect(rank: int, gather: Callable[[Any], list[Any]]) -> Outboxes | None:
    """Outboxes if every rank can open every other's memory, on all ranks or on none.

    Args:
        gather: every rank's JSON-able object.
    """
    token, box = secrets.token_bytes(_TOKEN_BYTES), None
    with contextlib.suppress(OSError, AttributeError):  # no memfd here
        box = _Box(_TOKEN_BYTES)
        box.bytes.copy_(torch.frombuffer(bytearray(token), dtype=torch.uint8))
    try:
        mine = {"process": processes.identity(), "token": token.hex(), "fd": -1 if box is None else box.fd}
        everyone = gather(mine)
        can = all(_can_open(other, everyone[rank]) for other in everyone)
        if not all(gather(can)):
            return None
        return Outboxes(rank, [int(other["process"][2]) for other in everyone])
    finally:
        if box is not None:
            box.close()


def _can_open(other: dict[str, Any], mine: dict[str, Any]) -> bool:
    if other["fd"] < 0 or not other["process"] or other["process"][:2] != mine["process"][:2]:
        return False
    try:
        found = _opened(int(other["process"][2]), other["fd"], _TOKEN_BYTES)
    except (OSError, ValueError):
        return False
    return bytes(found.tolist()).hex() == other["token"]


def _opened(pid: int, fd: int, size: int) -> Tensor:
    here = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    try:
        return _mapped(here, size)
    finally:
        os.close(here)


def _mapped(fd: int, size: int) -> Tensor:
    with torch.inference_mode(False):  # it may be written to in any mode
        return torch.frombuffer(mmap.mmap(fd, size), dtype=torch.uint8)
