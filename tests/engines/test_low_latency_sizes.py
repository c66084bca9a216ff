"""The memory that low-latency calls are said to need, against what the engine takes. Needs a build with kernels, no GPU."""

from __future__ import annotations

import importlib.util
import re
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

if importlib.util.find_spec("deepep_train._C") is None:
    pytest.skip("the package was built without nvcc, so it has no kernels", allow_module_level=True)

from deepep_train import _C, Buffer, DeepEPError, engines  # type: ignore[attr-defined]
from deepep_train.engines import low_latency_sizes as sizes
from deepep_train.engines import nvlink, rdma
from deepep_train.engines.arena import ArenaFull
from deepep_train.engines.low_latency_arguments import LIMITS, Shape
from deepep_train.engines.low_latency_space import Space
from deepep_train.engines.low_latency_spaces import Spaces
from deepep_train.engines.peers import Peers

PAGE = 2 << 20


def up(value: int, multiple: int) -> int:
    return (value + multiple - 1) // multiple * multiple


def segment(num_bytes: int) -> int:
    """What torch's caching allocator asks for (c10/cuda/CUDACachingAllocator.cpp, get_allocation_size)."""
    num_bytes = up(num_bytes, 512)
    return PAGE if num_bytes <= 1 << 20 else 20 << 20 if num_bytes < 10 << 20 else up(num_bytes, PAGE)


def heap(arena_bytes: int) -> int:
    """What an arena of this size has for tensors: csrc/common/arena.cpp, and staging."""
    control = _C.Communicator.control_bytes()
    total = up(arena_bytes + control, PAGE)
    return total - up(control, 512) - segment(total // 4)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[Shape, int]:
    """With the number of ranks."""
    ranks = draw(st.integers(1, 64))
    experts = ranks * draw(st.integers(1, LIMITS.num_experts // ranks))
    hidden = 128 * draw(st.integers(1, LIMITS.hidden // 128))
    tokens = draw(st.one_of(st.integers(1, 300), st.integers(1, LIMITS.max_tokens)))
    return Shape(tokens, hidden, experts, draw(st.integers(1, LIMITS.top_k))), ranks


def taken(shape: Shape, ranks: int) -> list[int]:
    """The tensors that the engine takes out of the arena for a shape."""
    p = _C.low_latency.Common()
    p.num_ranks = p.num_local = ranks
    p.max_tokens, p.hidden, p.num_experts, p.top_k = shape
    rows = shape.num_experts // ranks * ranks * shape.max_tokens
    return [_C.low_latency.space_bytes(p), *2 * [rows * shape.hidden * 2]]


@given(shapes())
def test_a_space_has_the_bytes_that_are_counted(drawn: tuple[Shape, int]) -> None:
    counted, has = sizes.space_bytes(*drawn), taken(*drawn)[0]
    assert has <= counted < has + (32 << 10)


@given(shapes(), st.integers(2 << 30, 40 << 30))
def test_the_hint_holds_one_shape_besides(drawn: tuple[Shape, int], arena_bytes: int) -> None:
    shape, ranks = drawn
    hint = Buffer.get_low_latency_rdma_size_hint(shape.max_tokens, shape.hidden, ranks, shape.num_experts)
    needed = sum(map(segment, taken(shape, ranks)))
    assert heap(arena_bytes + hint) - heap(arena_bytes) >= needed
    # Not much more than a shape of the most choices needs.
    assert hint <= 1.4 * sum(map(segment, taken(shape._replace(top_k=16), ranks))) + (100 << 20)


def test_limits_are_the_kernels() -> None:
    kernels = _C.low_latency
    assert LIMITS[1:] == (kernels.max_hidden, kernels.max_experts, kernels.max_top_k)


class SmallArena:
    """Has room for `left` tensors, and remembers what it was asked for."""

    num_bytes = 3 << 30

    def __init__(self, left: int = 9) -> None:
        self.left, self.asked = left, []  # type: ignore[var-annotated]

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        self.asked.append(torch.Size(shape).numel() * dtype.itemsize)
        if self.left == 0:
            raise ArenaFull(self.asked[-1])
        self.left -= 1
        return torch.empty(shape, dtype=dtype)

    def offset(self, _: torch.Tensor) -> int:
        return 0


SHAPE = Shape(8, 256, 12, 3)


def spaces(arena: SmallArena, monkeypatch: pytest.MonkeyPatch) -> Spaces:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(synchronize=lambda: None))
    return Spaces(Peers(None, 5.0), arena, [0], lambda: nullcontext(0), torch.device("cpu"), None)  # type: ignore[arg-type]


def test_nothing_else_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    arena = SmallArena()
    made = spaces(arena, monkeypatch)
    space = made.of(SHAPE, None)
    for slots in (0, 1, 0, 1):
        made.combine_buffer(space, slots)
    assert arena.asked == taken(SHAPE, 1)


@pytest.mark.parametrize("left", [0, 1, 2])
def test_a_full_arena_says_how_large_it_must_be(left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = spaces(SmallArena(left), monkeypatch)

    def ask() -> Space:
        space = made.of(SHAPE, None)
        made.combine_buffer(space, 0)
        made.combine_buffer(space, 1)
        return space

    with pytest.raises(DeepEPError, match="pass num_nvl_bytes=") as caught:
        ask()
    (need,) = re.findall(r"num_nvl_bytes=(\d+)", str(caught.value))
    hint = Buffer.get_low_latency_rdma_size_hint(SHAPE.max_tokens, SHAPE.hidden, 1, SHAPE.num_experts)
    assert int(need) == SmallArena.num_bytes + hint


@pytest.mark.parametrize(
    "name, mode, arena, rail",
    [
        ("nvlink", False, 0, 0),
        ("nvlink", True, 1 << 30, 0),
        ("low_latency", False, 1 << 30, 0),
        ("rdma", False, 0, 1 << 30),
        ("rdma", True, 1 << 30, 32 << 20),
    ],
)
def test_bytes_are_counted_once(name: str, mode: bool, arena: int, rail: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sized: dict[str, Any] = {}
    monkeypatch.setattr(engines, "DEFAULT_ARENA_BYTES", 2 << 30)  # which tests/gpu makes smaller
    monkeypatch.setattr(engines, "DEFAULT_RAIL_BYTES", 32 << 20)
    monkeypatch.setattr(nvlink, "NvlinkEngine", lambda _, arena_bytes, *__: sized.update(arena=arena_bytes, rail=0))
    monkeypatch.setattr(rdma, "RdmaEngine", lambda _, __, ___, ____, arena, rail, *_____: sized.update(arena=arena, rail=rail))
    group: Any = SimpleNamespace(size=lambda: 4, rank=lambda: 0)
    monkeypatch.setattr(engines, "Peers", lambda *_: None)
    engines.create(name, group, 5.0, 2, None, 0, 1 << 30, lambda: 0, 0, mode)
    assert sized == {"arena": (2 << 30) + arena, "rail": rail}
