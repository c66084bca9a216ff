"""What the arena does when it runs full, over a model of torch's cache. Needs a build with kernels, no GPU."""

from __future__ import annotations

import importlib.util
import random
import weakref
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deepep_train.engines.arena_sizes import SEGMENT, bytes_to_receive, segment_bytes, size_class

if importlib.util.find_spec("deepep_train._C") is None:
    pytest.skip("the package was built without nvcc, so it has no kernels", allow_module_level=True)

from deepep_train.engines import arena
from deepep_train.engines.arena import Arena, ArenaFull

MIB = 1 << 20


class Cache:
    """Stands for torch's pool in a heap of so many bytes: what tensors leave behind is kept as it is, for others of the same
    stream that fit. What is in use when all is taken back stays out of reach until the next time."""

    def __init__(self, heap: int) -> None:
        self.left, self.refusals, self.stream, self.pool = heap, 0, 0, 0
        self.kept: list[tuple[int, int, int]] = []  # pool, stream, bytes
        self.capturing = False

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        need = segment_bytes(torch.Size(shape).numel() * dtype.itemsize)
        mine = [size for pool, stream, size in self.kept if (pool, stream) == (self.pool, self.stream) and size >= need]
        size = min(mine, default=need)
        if mine:
            self.kept.remove((self.pool, self.stream, size))
        elif need <= self.left:
            self.left -= need
        else:
            self.refusals += 1
            raise torch.OutOfMemoryError
        t = torch.empty(shape, dtype=dtype)
        weakref.finalize(t.untyped_storage(), self.kept.append, (self.pool, self.stream, size))
        return t

    def take_back(self) -> None:
        self.left += sum(size for _, _, size in self.kept)
        self.kept.clear()
        self.pool += 1


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An arena over a cache; both, by the bytes for tensors beside staging."""

    def make(heap: int) -> tuple[Arena, Cache]:
        total = -(-heap * 4 // 3 // (2 * MIB)) * 2 * MIB
        cache = Cache(total)

        def allocating(self: Arena) -> Any:
            self._capturing = cache.capturing
            return nullcontext()

        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: cache.capturing)
        monkeypatch.setattr(arena, "_Pool", lambda device: SimpleNamespace(give_up=lambda: None))
        monkeypatch.setattr(Arena, "_allocating", allocating)
        monkeypatch.setattr(Arena, "_allocate", lambda self, *what: cache.allocate(*what))
        monkeypatch.setattr(Arena, "_stream", lambda self: cache.stream)
        monkeypatch.setattr(Arena, "_rotate", lambda self: cache.take_back())
        comm: Any = SimpleNamespace(base=0, bytes=total, used=0, peak=0)
        return Arena(comm, torch.device("cpu")), cache

    return make


def land(memory: Arena, *num_bytes: int) -> Any:
    """One operation's tensors, as the engine asks for them: at once, and with all means where there is no room at once."""
    memory.begin_operation()
    wanted = [((n // 1024, 512), torch.bfloat16) for n in num_bytes]
    landings = None if torch.cuda.is_current_stream_capturing() else memory.land_quickly(wanted)
    landings = landings or memory.land(wanted)
    memory.watch(landings)
    tensors = [one.tensor for one in landings if one]
    assert [t.shape for t in tensors] == [shape for shape, _ in wanted]
    assert all(t._base is None for t in tensors)
    return tensors if len(tensors) > 1 else tensors[0]


def steps(memory: Arena, layers: int, mean: int, count: int) -> None:
    """Training: what layers receive lives until their backward, where gradients come to about as many rows."""
    draw = random.Random(1)
    for _ in range(count):
        around = int(mean * draw.uniform(0.99, 1.01))
        kept = [land(memory, int(around * draw.uniform(0.998, 1.002))) for _ in range(layers)]
        while kept:
            gradient = land(memory, kept[-1].nbytes)
            del gradient
            kept.pop()


@pytest.mark.parametrize("mean", [32 * MIB, 3 * 16 * MIB, 57 * MIB])
def test_sizes_that_change_a_little_need_no_copies(made: Any, mean: int) -> None:
    memory, cache = made(6 * mean * 11 // 10)
    steps(memory, 5, mean, 100)
    assert (memory.num_staged, memory.num_taken_back, cache.refusals) == (0, 0, 0)


def test_more_than_fits_is_copied_and_torch_is_rarely_asked_in_vain(made: Any) -> None:
    memory, cache = made(6 * 35 * MIB)
    steps(memory, 8, 32 * MIB, 200)
    # Of 8 rows and 8 gradients: what has no room, and a little more.
    assert 200 * 2 <= memory.num_staged <= 200 * 6
    assert cache.refusals <= 200 * 16 / arena._ASK_AGAIN + 20
    arenas = memory.num_staged * 32 * MIB / memory.num_bytes
    assert memory.num_taken_back <= arenas / arena._TAKE_BACK_AFTER
    staged = memory.num_staged
    steps(memory, 8, 32 * MIB, 200)  # taking back has stranded nothing
    assert memory.num_staged - staged <= 1.1 * staged


def test_what_is_in_the_way_is_taken_back_once_copies_have_cost_as_much(made: Any) -> None:
    memory, _ = made(150 * MIB)
    steps(memory, 4, 24 * MIB, 20)
    assert memory.num_staged == 0
    due = -(-arena._TAKE_BACK_AFTER * memory.num_bytes // (36 * MIB))  # copies of 36 MiB, larger than all that is kept
    for n in range(2 * due):
        land(memory, 36 * MIB)
        assert memory.num_staged == min(n + 1, due)
        assert memory.num_taken_back == int(n >= due)


def test_it_is_taken_back_when_few_tensors_live(made: Any) -> None:
    memory, cache = made(150 * MIB)
    steps(memory, 4, 24 * MIB, 3)
    due = -(-arena._TAKE_BACK_AFTER * memory.num_bytes // (36 * MIB))
    kept = [land(memory, 24 * MIB) for _ in range(4)]
    for _ in range(due + 5):
        land(memory, 36 * MIB)
    assert memory.num_taken_back == 0
    kept.clear()
    land(memory, 36 * MIB)
    assert memory.num_taken_back == 1
    # Not that late, if they never get fewer: what was shrunk by `resize_` counts as alive.
    cache.kept[:] = [(cache.pool, 1, size) for _, _, size in cache.kept]
    kept = [land(memory, 24 * MIB) for _ in range(4)]
    for _ in range(arena._AT_THE_LATEST * due + 5):
        land(memory, 36 * MIB)
    assert memory.num_taken_back == 2


def test_a_capture_takes_nothing_back_and_no_more_than_it_needs(made: Any) -> None:
    memory, cache = made(96 * MIB)
    memory._copied = 99 * memory.num_bytes
    cache.capturing = True
    kept = [land(memory, 24 * MIB).untyped_storage().nbytes() for _ in range(4)]
    assert kept == [24 * MIB] * 4
    assert (memory.num_staged, memory.num_taken_back, cache.left) == (0, 0, 0)  # and all of it is kept for replays
    assert memory.was_captured
    result = weakref.ref(land(memory, 24 * MIB).untyped_storage())
    assert memory.num_staged == 1
    is_kept = result() is not None
    assert not is_kept
    with pytest.raises(ArenaFull):
        land(memory, 48 * MIB)
    assert memory.num_taken_back == 0


@pytest.mark.parametrize("rows", [[185], [190], [60, 125], [100, 60, 20, 8]])
def test_what_fits_exactly_is_not_refused(made: Any, rows: list[int]) -> None:
    memory, _ = made(192 * MIB)
    land(memory, *(n * MIB for n in rows))
    land(memory, *(n * MIB for n in rows))


def test_staging_is_taken_once(made: Any) -> None:
    """Rows that lay in staging when there was no room for what comes with them, and torch's cache was taken back."""
    memory, cache = made(72 * MIB)
    kept = [land(memory, 24 * MIB) for _ in range(2)]
    cache.stream = 1
    land(memory, 19 * MIB)
    assert (memory.num_staged, cache.left) == (0, 0)
    cache.stream = 0
    land(memory, 20 * MIB, 2 * MIB)
    assert memory.num_staged == 2
    land(memory, 23 * MIB, 5 * MIB // 2)
    del kept


def test_tensors_of_one_operation_are_beside_each_other(made: Any) -> None:
    memory, _ = made(72 * MIB)
    land(memory, 48 * MIB, 24 * MIB)  # the second is staged
    staged = memory.num_staged
    for _ in range(40):
        land(memory, 24 * MIB)
    assert memory.num_staged == staged


def test_what_has_no_room_on_one_stream_may_have_on_another(made: Any) -> None:
    memory, cache = made(72 * MIB)
    steps(memory, 2, 22 * MIB, 2)
    cache.stream = 1
    land(memory, 20 * MIB)
    assert memory.num_staged == 1
    cache.stream = 0
    steps(memory, 2, 22 * MIB, 20)
    assert memory.num_staged == 1


def test_what_callers_hold_is_live(made: Any) -> None:
    memory, cache = made(72 * MIB)
    held = memory.empty((48 * MIB,), torch.uint8)
    land(memory, 24 * MIB)
    assert memory.num_staged == 1
    del held
    cache.take_back()
    cache.pool -= 1
    land(memory, 24 * MIB)
    assert memory.num_staged == 1


def test_what_staging_does_not_hold_is_found_at_once(made: Any) -> None:
    memory, _ = made(90 * MIB)  # staging has 30
    kept = [land(memory, 20 * MIB) for _ in range(4)]
    del kept
    t = land(memory, 60 * MIB)
    assert (memory.num_staged, memory.num_taken_back) == (0, 1)
    with pytest.raises(ArenaFull) as caught:
        land(memory, 60 * MIB)
    assert caught.value.num_bytes == 60 * MIB
    with pytest.raises(ArenaFull):
        memory.temporary((60 * MIB,), torch.uint8)
    land(memory, 20 * MIB)
    assert memory.num_staged == 0
    del t
    assert memory.temporary((60 * MIB,), torch.uint8).untyped_storage().nbytes() == 60 * MIB
    land(memory, 60 * MIB)
    assert memory.num_staged == 0


def test_memory_that_comes_back_uncounted_is_found(made: Any) -> None:
    """`resize_`, which no death of a tensor tells of, and which torch gets back at once."""
    memory, cache = made(60 * MIB)
    kept = [land(memory, 19 * MIB) for _ in range(3)]
    land(memory, 19 * MIB)
    assert memory.num_staged == 1
    cache.kept.append((cache.pool, 0, 20 * MIB))
    for _ in range(arena._ASK_AGAIN + 1):
        land(memory, 19 * MIB)
    assert memory.num_staged <= arena._ASK_AGAIN + 1
    staged = memory.num_staged
    for _ in range(3 * arena._ASK_AGAIN):
        land(memory, 19 * MIB)
    assert memory.num_staged == staged
    del kept


@given(st.lists(st.integers(SEGMENT, 1 << 34), min_size=1, max_size=20))
def test_an_arena_for_received_tensors_holds_them(sizes: list[int]) -> None:
    heap = bytes_to_receive(sum(sizes)) * 3 // 4
    assert sum(map(size_class, sizes)) <= heap <= 1.1 * sum(sizes) + 2


@given(st.integers(1, 1 << 44))
def test_size_classes(n: int) -> None:
    assert n <= size_class(n) <= n * 1.1 + 2
    assert size_class(n) <= size_class(n + 1)


@given(st.integers(20, 40), st.sampled_from([1, 3, 5, 7, 9]), st.floats(-0.02, 0.02))
def test_likely_means_lie_within_a_class(power: int, odd: int, part: float) -> None:
    """Balanced routing makes rows of about a power of two bytes, or of a small multiple of one."""
    n = odd << power
    assert size_class(int(n * (1 + part))) == size_class(n)


def test_small_tensors_are_not_made_larger(made: Any) -> None:
    memory, _ = made(100 * MIB)
    assert land(memory, MIB).untyped_storage().nbytes() == MIB
    large = land(memory, SEGMENT)
    assert large.untyped_storage().nbytes() == size_class(SEGMENT) > large.nbytes
