"""What stands for the GPU, the arena and the kernels in tests of what the low-latency engine does on the CPU side.

Needs a build with kernels, no GPU; conftest.py has the fixtures where there is one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from deepep_train.engines import low_latency, low_latency_blocks
from deepep_train.engines.low_latency import LowLatency
from deepep_train.engines.peers import Peers


class Memory:
    """Stands for the arena."""

    def __init__(self) -> None:
        self.given: list[Tensor] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        self.given.append(torch.empty(shape, dtype=dtype))
        return self.given[-1]

    def offset(self, t: Tensor) -> int:
        return t.data_ptr()

    def holds(self, t: Tensor) -> bool:
        return any(t.data_ptr() == other.data_ptr() for other in self.given)


class Kernels:
    """Remembers what would have been launched, and which peers were to be forgotten, in which shapes."""

    def __init__(self) -> None:
        self.launched: list[tuple[str, int]] = []
        self.forgotten: list[tuple[int, int]] = []

    def __getattr__(self, name: str) -> Any:
        def launch(p: Any, *how: int) -> None:
            self.launched.append((name, p.set))
            if name == "forget" and ctypes.c_int32.from_address(p.mask + 4 * how[0]).value:  # as the kernel
                self.forgotten.append((how[0], p.max_tokens))

        phases = ("dispatch_send", "dispatch_receive", "combine_send", "combine_receive", "combine_slices", "forget")
        return launch if name in phases else getattr(low_latency_c, name)


low_latency_c = low_latency._C.low_latency


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    fake = Kernels()
    monkeypatch.setattr(low_latency, "_C", type("C", (), {"low_latency": fake}))
    for name, value in {"current_stream": lambda *_: Stream(), "is_current_stream_capturing": lambda: False}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(low_latency_blocks, "_given_back", [])
    return fake


class Stream:
    def synchronize(self) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    __hash__ = object.__hash__


class Event:
    """`is_over`: of all of them."""

    is_over = True

    def record(self, _: Stream) -> None:
        pass

    def query(self) -> bool:
        return self.is_over


@contextmanager
def ordered() -> Iterator[int]:
    yield 0


@pytest.fixture
def engine(kernels: Kernels) -> LowLatency:
    arena: Any = Memory()
    return LowLatency(Peers(None, 5.0), arena, [0], 4, True, ordered, torch.device("cpu"))


X, IDX, WEIGHTS = torch.zeros(3, 512, dtype=torch.bfloat16), torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2)
BUFFER = object()


def dispatch(engine: LowLatency, with_hook: bool = False, x: Tensor = X, idx: Tensor = IDX, **how: Any) -> Any:
    given = {"max_tokens": 4, "num_experts": 5, "use_fp8": True, "round_scale": False, "use_ue8m0": False} | how
    given = {"async_finish": False} | given
    stats = {"cumulative_stats": None, "wait_stats": None}
    return engine.dispatch(BUFFER, x, idx, **{**stats, **given}, with_hook=with_hook)


def combine(engine: LowLatency, handle: Any, y: Tensor | None = None, with_hook: bool = False, **how: Any) -> Any:
    y = torch.zeros(5, 4, 512, dtype=torch.bfloat16) if y is None else y
    given = {"use_logfmt": False, "zero_copy": False, "out": None, "wait_stats": None, "async_finish": False} | how
    return engine.combine(BUFFER, y, IDX, WEIGHTS, handle, **given, with_hook=with_hook)
