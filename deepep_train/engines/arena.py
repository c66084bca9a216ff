"""Memory that peers can reach: torch tensors out of one communicator's arena."""

from __future__ import annotations

import ctypes
import functools
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from deepep_train import _C  # type: ignore[attr-defined]
from deepep_train.engines.arena_sizes import SEGMENT, STAGING_SHARE, size_class
from deepep_train.errors import DeepEPError

T = TypeVar("T")
Wanted = Sequence[tuple[Sequence[int], torch.dtype] | None]
_ASK_AGAIN = 64  # operations that are answered from memory until torch is asked again
_LARGE = 1 << 20  # bytes: tensors that are counted while they live
# What torch caches of the arena is taken back for the sake of room when copies out of staging have cost about as much since it
# was last, in arenas' worth of bytes. In a small Megatron model it frees some 10 of torch's blocks, wherever they are, in
# 2 ms, which are then asked of CUDA again in as much, and the GPU runs out of work meanwhile (docs/performance.md).
_TAKE_BACK_AFTER = 8
# It is done when few tensors live, for what lives then is out of reach until the next time; no later than so many times that.
_AT_THE_LATEST = 4


class ArenaFull(Exception):
    """Neither the heap nor staging has room for `num_bytes` more."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__(num_bytes)
        self.num_bytes = num_bytes


class Landing(NamedTuple):
    """Where peers put a tensor: `visible` in the arena, and `tensor` for the caller, to be copied to if it is not the same."""

    visible: Tensor
    tensor: Tensor


class _InPool:
    """This thread's allocations come out of the arena. A class: a context made of a generator costs 2 us, in every call."""

    def __init__(self, arena: Arena) -> None:
        self._comm, self._torchs = arena._comm, torch.cuda.use_mem_pool(arena._held[-1].torchs, arena._device)

    def __enter__(self) -> None:
        self._comm.enter_pool()
        try:
            self._torchs.__enter__()
        except BaseException:
            self._comm.leave_pool()
            raise

    def __exit__(self, *error: Any) -> None:
        try:
            self._torchs.__exit__(*error)
        finally:
            self._comm.leave_pool()


def _bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


@functools.lru_cache(maxsize=1)
def _allocator() -> torch.cuda.memory.CUDAPluggableAllocator:
    """One for the process, never freed: torch calls it whenever the last tensor of a pool dies. It holds no state."""
    return torch.cuda.memory.CUDAPluggableAllocator(_C.__file__, "deepep_train_allocate", "deepep_train_release")


class _Pool:
    """One of torch's, whose object is never destroyed: its destructor ends the process (an assertion of torch 2.11) if any pool
    of the device is in use or a graph is being captured, and the garbage collector may run just then. What is left of it is a
    few hundred bytes. `give_up` may be called at any time, on any thread."""

    def __init__(self, device: torch.device) -> None:
        with torch.cuda.device(device):
            self.torchs = torch.cuda.MemPool(_allocator().allocator())
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.torchs))
        self._device, self._id, self._is_given_up = device.index, self.torchs.id, False

    def give_up(self) -> None:
        """What is free of it goes back with torch's next `empty_cache`, or when torch runs out of memory."""
        if not self._is_given_up:
            self._is_given_up = True
            torch._C._cuda_releasePool(self._device, self._id)


def _give_up_last(pools: list[_Pool]) -> None:
    pools[-1].give_up()


def _count_death(arena: weakref.ref[Arena], num_bytes: int) -> None:
    if (alive := arena()) is not None:
        alive.count_death(num_bytes)


class Arena:
    """See the module. Not thread-safe: the engine's lock covers it.

    Args:
        comm: the communicator whose memory this is.
        device: of the memory.
    """

    def __init__(self, comm: _C.Communicator, device: torch.device) -> None:
        self._comm = comm
        self._base, self._end = comm.base, comm.base + comm.bytes
        self._device = device
        self._held = [_Pool(device)]  # a list of one: it outlives this object, as its finalizer's
        weakref.finalize(self, _give_up_last, self._held).atexit = False
        self._aside: torch.cuda.Stream | None = None
        self._capturing = False
        self._captured: list[Any] = []  # what CUDA graphs use lives as long as the buffer
        self._live = 0  # bytes of large tensors
        self._landing = 0  # bytes of those that this operation has taken and that are not watched yet
        self._died: deque[int] = deque()  # of large tensors, not yet taken off: whichever thread drops a tensor appends
        self._full: dict[tuple[int, int], int] = {}  # by stream and class: the fewest live bytes beside which none had room
        self._was_known_full = False  # in this operation
        self._known_full = 0  # operations in which it was
        self._copied = 0  # bytes, since torch's cache was last taken back
        self._fewest = 0  # live bytes at any landing since then
        self.num_staged = 0  # tensors that had to be copied
        self.num_taken_back = 0  # times that torch's cache was
        self._staged = 0
        staging = (comm.bytes // STAGING_SHARE,)
        self._staging = self._insist(lambda: self._from_heap(staging, torch.uint8, is_last=True))

    @property
    def num_bytes(self) -> int:
        return self._comm.bytes

    def holds(self, t: Tensor) -> bool:
        return self._base <= t.data_ptr() < self._end

    def offset(self, t: Tensor | None) -> int:
        """Of the tensor's first byte in the arena."""
        return 0 if t is None or not t.numel() else t.data_ptr() - self._base

    def too_small(self, rank: int, num_bytes: int) -> DeepEPError:
        """What its owner is told when `num_bytes` of an operation's did not fit."""
        have, need = self._comm.bytes, self._comm.bytes + STAGING_SHARE * num_bytes
        return DeepEPError(
            f"the arena of rank {rank} is full: {num_bytes} bytes more do not fit into its {have}, nor into staging, a quarter "
            f"of it; pass num_nvl_bytes={need} or more to Buffer, or keep fewer received tensors alive"
        )

    def too_small_for(self, rank: int, num_bytes: int) -> DeepEPError:
        """What the caller of `empty` is told."""
        have = self._comm.bytes
        need = have + 2 * max(num_bytes, SEGMENT)  # a quarter of which is staging again
        return DeepEPError(
            f"the arena of rank {rank} is full: a tensor of {num_bytes} bytes does not fit beside what lives in its {have}; "
            f"pass num_nvl_bytes={need} or more to Buffer, or keep fewer tensors alive"
        )

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor out of the heap; raises `ArenaFull`."""
        t = self._insist(lambda: self._from_heap(shape, dtype, is_last=True))
        self._watch(t)
        return t

    def temporary(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor for this operation only: staging if it fits, else out of the heap; raises `ArenaFull`."""
        found = self._from_staging(shape, dtype)
        return self.empty(shape, dtype) if found is None else found

    def land(self, wanted: Wanted) -> list[Landing | None]:
        """For each (shape, dtype): a place for peers to write to; out of the heap, or staging where that is full."""
        if self._is_due():
            self._take_back()
        landings = self._attempt(lambda: self._land(wanted))
        if landings is None:
            landings = self._attempt(lambda: self._land(wanted, may_stage=True))
        if landings is None:
            landings = self._insist(lambda: self._land(wanted, may_stage=True, is_last=True))
        # The copies' targets lie outside the arena, so they are made outside its pool.
        for i, landing in enumerate(landings):
            if landing is not None and landing.visible.numel() and self._is_staged(landing.visible):
                landings[i] = Landing(landing.visible, torch.empty_like(landing.visible))
                self.num_staged += 1
                self._copied += landing.visible.nbytes
        return landings

    def ahead(self) -> AbstractContextManager[None]:
        """Enters the pool before it is known how large the tensors will be: a CPU that waits for that has the time. To be left
        soon: torch takes a pool in use for a capture, and gives back nothing that it caches, whichever thread runs short."""
        return self._allocating()

    def land_quickly(self, wanted: Wanted) -> list[Landing | None] | None:
        """`land`, within `ahead`; None where it would take more than the room that is there at once."""
        if self._is_due():
            return None
        try:
            return self._land(wanted)
        except ArenaFull:
            return None

    def watch(self, landings: Sequence[Landing | None]) -> None:
        """To be called after `land`, when there is time."""
        for landing in landings:
            if landing is not None:
                self._watch(landing.visible)
        self._landing = 0

    def begin_operation(self) -> None:
        """Staging is free again: operations follow each other."""
        self._staged = self._landing = 0
        if self._was_known_full:
            self._was_known_full = False
            self._known_full += 1
            if self._known_full % _ASK_AGAIN == 0:
                self._full.clear()

    def stats(self) -> dict[str, int]:
        return {
            "arena": self._comm.bytes,
            "arena used": self._comm.used,
            "arena peak": self._comm.peak,
            "staging": self._staging.numel(),
            "tensors staged": self.num_staged,
            "caches taken back": self.num_taken_back,
        }

    @property
    def was_captured(self) -> bool:
        return bool(self._captured)

    def keep(self, used: Any) -> None:
        """A graph is being captured that uses this."""
        self._captured.append(used)

    # Inside ------------------------------------------------------------------------------------------------------------

    def _land(self, wanted: Wanted, may_stage: bool = False, is_last: bool = False) -> list[Landing | None]:
        landings: list[Landing | None] = []
        self._landing = 0
        for one in wanted:
            if one is None:
                landings.append(None)
                continue
            try:
                # What a graph keeps is never left for another.
                tensor = self._from_heap(*one, is_last, may_be_larger=not (is_last or self._capturing))
                self._landing += self._counted(tensor)
            except ArenaFull:
                staged = self._from_staging(*one) if may_stage else None
                if staged is None:
                    self._landing = 0
                    raise
                tensor = staged
            landings.append(Landing(tensor, tensor))
        return landings

    def _attempt(self, make: Callable[[], T]) -> T | None:
        try:
            return self._make(make)
        except ArenaFull:
            return None

    def _insist(self, make: Callable[[], T]) -> T:
        """`make`, where there is no other way; once more, if there was no room, after taking back what torch caches."""
        try:
            return self._make(make)
        except ArenaFull:
            if self._capturing:
                raise
        self._take_back()
        return self._make(make)

    def _make(self, make: Callable[[], T]) -> T:
        staged = self._staged
        try:
            with self._allocating():
                made = make()
        except ArenaFull:
            self._staged = staged
            raise
        if self._capturing:
            # As it is now: `land` goes on to put copies' targets into its list, which are the graph's own.
            self._captured.append(tuple(made) if isinstance(made, list) else made)
        return made

    def _is_due(self) -> bool:
        """Whether it is time to take back what torch caches, which cannot be done in a capture."""
        self._count_dead()
        self._fewest = min(self._fewest, self._live)
        after = _TAKE_BACK_AFTER * self._comm.bytes
        if self._copied < after or torch.cuda.is_current_stream_capturing():
            return False
        return self._live <= self._fewest + self._comm.bytes // 16 or self._copied >= _AT_THE_LATEST * after

    def _take_back(self) -> None:
        self._rotate()
        self._full.clear()
        self._copied, self._fewest = 0, self._live
        self.num_taken_back += 1

    def _allocating(self) -> AbstractContextManager[None]:
        self._capturing = torch.cuda.is_current_stream_capturing()
        return self._allocating_aside() if self._capturing else _InPool(self)

    @contextmanager
    def _allocating_aside(self) -> Iterator[None]:
        """A capture takes every allocation on its streams into its own pool, so memory for it is asked for on another."""
        self._aside = self._aside or torch.cuda.Stream(self._device)
        with torch.cuda.stream(self._aside), _InPool(self):
            yield

    def _from_heap(
        self, shape: Sequence[int], dtype: torch.dtype, is_last: bool = False, may_be_larger: bool = False
    ) -> Tensor:
        """`is_last`: torch is asked, whatever is known; `may_be_larger`: the memory, not the tensor."""
        size = _bytes(shape, dtype)
        kind = size_class(size)
        self._count_dead()
        if not is_last and self._full and self._is_known_full(kind):
            # A refusal of torch's is slow, and some versions flush all caches before it.
            self._was_known_full = True
            raise ArenaFull(size)
        try:
            if may_be_larger and size >= SEGMENT // 2:  # smaller ones share torch's segments
                t = self._allocate((-(-kind // dtype.itemsize),), dtype).resize_(tuple(shape))  # no view, as t[:n] would be
            else:
                t = self._allocate(shape, dtype)
        except torch.OutOfMemoryError:
            beside, key = self._live + self._landing, (self._stream(), kind)
            self._full[key] = min(beside, self._full.get(key, beside))
            raise ArenaFull(size) from None
        if _C.is_debug:
            t.view(-1).view(torch.uint8).fill_(0xFF)
        return t

    def _is_known_full(self, kind: int) -> bool:
        stream, beside = self._stream(), self._live + self._landing
        return any(on == stream and kind >= full and beside >= live for (on, full), live in self._full.items())

    def _stream(self) -> int:
        """What torch caches is one stream's."""
        return int(torch.cuda.current_stream(self._device).cuda_stream)

    def _allocate(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        t = torch.empty(tuple(shape), dtype=dtype, device=self._device)
        if self.holds(t) or not t.numel():
            return t
        # The caller's own `use_mem_pool` is around this and comes first; it is its thread's alone.
        del t
        made: list[Any] = []
        stream = torch.cuda.current_stream(self._device)

        def elsewhere() -> None:
            try:
                with torch.cuda.stream(stream), _InPool(self):
                    made.append(torch.empty(tuple(shape), dtype=dtype, device=self._device))
            except Exception as error:  # noqa: BLE001 - raised below
                made.append(error)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        if isinstance(made[0], Exception):
            raise made[0]
        if not self.holds(made[0]):
            raise DeepEPError("torch gave memory that peers cannot reach; is another memory pool in use around this call?")
        return made[0]

    def _rotate(self) -> None:
        """Take back what torch caches of this memory: it gives nothing back of a pool that is in use, so another pool follows.

        What tensors still use stays theirs until they die; then it is torch's cache of a pool that nobody has, which only
        `empty_cache` gives back, as it does all else that torch caches. The synchronization is why this is done only when there
        is no room: the memory may next be used on another stream than before.
        """
        given_up = self._held[-1]
        self._held[:] = [_Pool(self._device)]
        given_up.give_up()
        torch.cuda.empty_cache()
        self._comm.begin_settling()  # what other threads release after this may still be in use
        torch.cuda.synchronize(self._device)
        self._comm.settle()

    def _watch(self, t: Tensor) -> None:
        """Large tensors are counted while they live; it is the storage that counts, which views keep alive."""
        if num_bytes := self._counted(t):
            self._live += num_bytes
            # Of this arena by a weak reference: what it keeps for graphs would else keep it, and so itself, for ever.
            weakref.finalize(t.untyped_storage(), _count_death, weakref.ref(self), num_bytes).atexit = False

    def _counted(self, t: Tensor) -> int:
        return 0 if t.nbytes < _LARGE or self._is_staged(t) else t.untyped_storage().nbytes()

    def count_death(self, num_bytes: int) -> None:
        """May be called on any thread, and by the garbage collector within any method of this object."""
        self._died.append(num_bytes)

    def _count_dead(self) -> None:
        while self._died:
            self._live -= self._died.popleft()

    def _from_staging(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
        size = _bytes(shape, dtype)
        if self._staged + size > self._staging.numel():
            return None
        part = self._staging[self._staged : self._staged + size].view(dtype).view(tuple(shape))
        self._staged = -(-(self._staged + size) // 512) * 512
        return part

    def _is_staged(self, t: Tensor) -> bool:
        start = self._staging.data_ptr()
        return start <= t.data_ptr() < start + self._staging.numel()
