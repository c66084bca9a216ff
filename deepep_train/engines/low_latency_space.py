"""The memory that low-latency calls of one shape go through, as the CPU sees it, and what a dispatch leaves for its combine."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

from deepep_train import _C  # type: ignore[attr-defined]
from deepep_train.engines.low_latency_arguments import Shape, not_a_handle
from deepep_train.engines.low_latency_blocks import Block
from deepep_train.engines.low_latency_sizes import SETS
from deepep_train.errors import ArgumentError, DeepEPError
from deepep_train.handle import OfBuffer


class _Life:
    """Lives as long as a handle: there are no weak references to tuples."""


class KernelHandle(OfBuffer):
    """V1's tuple: src_info int32 [L, R*M], layout_range int64 [L, R], M, hidden, num_experts; and what combine needs.

    Attributes:
        set, number: which slots it came through, and which use of them it is.
        pick_index: int32 [T, K], each pick's number among this rank's picks of its expert.
        stream: the id of the one that the dispatch was made on, whose memory `pick_index` is.
        life: see `_Life`.
    """

    space: Space
    buffer: Any
    set: int
    number: int
    pick_index: Tensor
    stream: int
    life: _Life

    def __new__(cls, items: tuple, space: Space, buffer: Any, slots: int, number: int, pick_index: Tensor) -> KernelHandle:
        self = super().__new__(cls, items)
        self.space, self.buffer, self.set, self.number, self.pick_index = space, buffer, slots, number, pick_index
        self.life = _Life()
        return self


def handle_of(buffer: Any, handle: Any) -> KernelHandle:
    """The handle, if it may still be combined through."""
    if not isinstance(handle, KernelHandle) or handle.buffer is not buffer:
        raise not_a_handle(handle)
    if handle.space.numbers[handle.set] != handle.number:
        raise ArgumentError("handle is of a result whose slots a later low_latency_dispatch has taken", "handle")
    return handle


class Waiting:
    """A hook that is to be called, and may be once; `name`: of its call."""

    def __init__(self, name: str) -> None:
        self.name = name


class Space:
    """The memory, of every rank, through which calls of one shape go; see csrc/low_latency/space.cuh.

    Args:
        memory: this rank's, uint8.
        addresses: int64 [R], every rank's, as this process maps them; 0 for those of other nodes.
        block: where in NVSHMEM's memory it lies; None: it lies in the arena.

    Attributes:
        was_captured: whether a CUDA graph, which may be replayed at any time, has calls through it.
        shown: what the last zero-copy combine of the slots is read from: by peers, until their next dispatch through the slots
            is here, whatever the caller drops.
    """

    def __init__(self, shape: Shape, memory: Tensor, addresses: Tensor, block: Block | None) -> None:
        self.shape, self.memory, self.addresses, self.block = shape, memory, addresses, block
        self.was_captured = self._is_closed = False
        self.combine_buffers: list[Tensor | None] = [None] * SETS
        self.shown: list[Tensor | None] = [None] * SETS
        self.numbers = [0] * SETS  # of the slots' newest dispatch; none comes back, so no old handle fits a new one
        self.forget()

    def forget(self) -> None:
        """No call has been made, as far as this process knows."""
        self.numbers = [number + 1 for number in self.numbers]
        self.waiting: list[Waiting | None] = [None] * SETS
        self._lives: list[weakref.ref[_Life] | None] = [None] * SETS
        self.are_over = [True] * SETS  # whether the newest result of the slots has been combined
        self._next = 0

    def close(self) -> None:
        """A graph that is replayed from now on does nothing."""
        self._is_closed = True
        at = _C.low_latency.closed_offset()
        self.memory[at : at + 4].fill_(1)

    def check_open(self) -> None:
        """Hooks may outlive the buffer."""
        if self._is_closed:
            raise DeepEPError("the buffer of this low-latency call has been destroyed")

    def take(self) -> int:
        """The slots for the next dispatch; `follow` makes them so."""
        slots, life = self._next, self._lives[self._next]
        if life is not None and life() is not None and not self.are_over[slots]:
            raise DeepEPError(
                f"low_latency_dispatch: the result of the dispatch before the last is alive, and this one needs its slots, as "
                f"there are {SETS} in turn; combine it, or drop its handle, before"
            )
        self.check_hook(slots)
        return slots

    def check_hook(self, slots: int) -> None:
        if (waiting := self.waiting[slots]) is not None:
            raise DeepEPError(f"the hook of an earlier {waiting.name} through the same slots has not been called")

    def follow(self, slots: int, handle: KernelHandle) -> None:
        self._lives[slots], self.are_over[slots] = weakref.ref(handle.life), False
        self._next = (slots + 1) % SETS
