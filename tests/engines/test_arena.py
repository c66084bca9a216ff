"""What the arena does when it runs full, over a model of torch's cache. Needs a build with kernels, no GPU."""

from __future__ import annotations

import importlib.util
import random
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deepep_train.engines.arena_sizes import SEGMENT, segment_bytes, size_class

if importlib.util.find_spec("deepep_train._C") is None:
    pytest.skip("the package was built without nvcc, so it has no kernels", allow_module_level=True)

from deepep_train.engines import arena
from deepep_train.engines.arena import Arena, ArenaFull

MIB = 1 << 20


class Cache:
    """Stands for torch's pool in a heap of so many bytes: what tensors leave behind is kept as it is, for others that fit."""

    def __init__(self, heap: int) -> None:
        self.left, self.kept, self.refusals = heap, [], 0  # type: ignore[var-annotated]

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        need = segment_bytes(torch.Size(shape).numel() * dtype.itemsize)
        found = min((size for size in self.kept if size >= need), default=0)
        if found:
            self.kept.remove(found)
        elif need <= self.left:
            self.left -= need
        else:
            self.refusals += 1
            raise torch.OutOfMemoryError
        t = torch.empty(shape, dtype=dtype)
        weakref.finalize(t.untyped_storage(), self.kept.append, found or need)
        return t

    def take_back(self) -> None:
        self.left += sum(self.kept)
        self.kept.clear()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An arena over a cache; both, by the bytes for tensors beside staging."""

    def make(heap: int) -> tuple[Arena, Cache]:
        total = -(-heap * 4 // 3 // (2 * MIB)) * 2 * MIB
        cache = Cache(total)
        monkeypatch.setattr(arena, "_Pool", lambda device: SimpleNamespace(give_up=lambda: None))
        monkeypatch.setattr(Arena, "_allocating", lambda self: nullcontext())
        monkeypatch.setattr(Arena, "_allocate", lambda self, *what: cache.allocate(*what))
        monkeypatch.setattr(Arena, "_rotate", lambda self: cache.take_back())
        comm: Any = SimpleNamespace(base=0, bytes=total, used=0, peak=0)
        return Arena(comm, torch.device("cpu")), cache

    yield make


def land(memory: Arena, num_bytes: int) -> Tensor:
    """One operation's rows, as the engine asks for them: at once, and with all means where there is no room at once."""
    memory.begin_operation()
    wanted = [((num_bytes // 1024, 512), torch.bfloat16)]
    landings = memory.land_quickly(wanted) or memory.land(wanted)
    memory.watch(landings)
    assert landings[0] is not None
    assert landings[0].tensor.shape == wanted[0][0]
    assert landings[0].tensor._base is None
    return landings[0].tensor


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
    assert memory.num_taken_back == 0  # which would make no room
    assert memory.num_staged <= 200 * (2 + 2 + 2)  # of 8 rows and 8 gradients: what has no room, and twice as often at most
    assert cache.refusals <= 200 * 16 / 64 + 20


def test_what_is_in_the_way_is_taken_back_once_copies_have_cost_as_much(made: Any) -> None:
    memory, _ = made(150 * MIB)
    steps(memory, 4, 24 * MIB, 20)
    assert memory.num_staged == 0
    due = -(-arena._TAKE_BACK_AFTER * memory.num_bytes // (36 * MIB))  # copies of 36 MiB, larger than all that is kept
    for n in range(2 * due):
        land(memory, 36 * MIB)
        assert memory.num_staged == min(n + 1, due)
        assert memory.num_taken_back == int(n >= due)


def test_what_staging_does_not_hold_is_found_at_once(made: Any) -> None:
    memory, _ = made(90 * MIB)  # staging has 30
    kept = [land(memory, 20 * MIB) for _ in range(4)]
    del kept
    t = land(memory, 60 * MIB)
    assert (memory.num_staged, memory.num_taken_back) == (0, 1)
    with pytest.raises(ArenaFull):
        land(memory, 60 * MIB)
    del t
    land(memory, 60 * MIB)
    assert memory.num_staged == 0


def test_memory_that_comes_back_uncounted_is_found(made: Any) -> None:
    """`resize_`, which no death of a tensor tells of, and which torch gets back at once."""
    memory, cache = made(60 * MIB)
    kept = [land(memory, 19 * MIB) for _ in range(3)]
    land(memory, 19 * MIB)
    assert memory.num_staged == 1
    cache.kept.append(20 * MIB)
    for _ in range(arena._ASK_AGAIN):
        land(memory, 19 * MIB)
    assert memory.num_staged <= arena._ASK_AGAIN
    del kept


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
