"""Makes a wrong call on some ranks of a group and tells what every rank saw of it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from harness import run_ranks, same_bits
from torch import Tensor

import deepep_train as dt


@dataclass(frozen=True)
class Misuse:
    """A call of `call` (a key of `CALLS`) with the good arguments, some of them replaced on the wrong `ranks`.

    Attributes:
        argument: what the error must name, in `.argument` and in its text.
        change: the arguments to replace, by name.
        others: for ranks that are right, but not with the good arguments.
        error: name of the exception's class.
        nodes: how many nodes the ranks stand for.
    """

    call: str
    argument: str
    change: Callable[[Scene], dict[str, Any]]
    ranks: tuple[int, ...] = (1,)
    size: int = 2
    others: Callable[[Scene], dict[str, Any]] = field(default=lambda s: {})
    error: str = "ArgumentError"
    nodes: int = 1


@dataclass(frozen=True)
class Outcome:
    """What one rank saw: the exception's class (None: the call went through), text and attributes."""

    kind: str | None
    text: str = ""
    argument: str | None = None
    ranks: tuple[int, ...] | None = None


class Scene:
    """One rank with a buffer, good arguments of every call, and handles in both layouts."""

    def __init__(self, rank: int, size: int, group: dist.ProcessGroup, nodes: int = 1) -> None:
        self.rank, self.size, self.group = rank, size, group
        self.buffer, self.other = (dt.Buffer(group, timeout=6, num_local_ranks=size // nodes) for _ in "ab")
        self.num_experts = 4 * size
        g = torch.Generator().manual_seed(rank)
        self.x = torch.randn(4, 8, generator=g)
        self.idx = torch.tensor([[0, self.num_experts - 1], [1, 4], [-1, 5], [6, 2]])
        self.w = torch.rand(4, 2, generator=g)
        self.fp8 = (self.x.to(torch.float8_e4m3fn), torch.ones(4, 3))
        self.fresh = {"x": self.x, "topk_idx": self.idx, "topk_weights": self.w, "buffer": self.buffer}
        self.fresh["num_experts"] = self.num_experts
        self.out = dt.dispatch(**self.fresh)
        self.by_expert = dt.dispatch(**self.fresh, layout="expert", alignment=4)
        self.shorter = dt.dispatch(**(self.fresh | {"topk_idx": self.idx[:2], "topk_weights": None, "x": self.x[:2]}))
        self.flipped = dt.dispatch(**(self.fresh | {"topk_idx": self.idx.flip(0)}))  # with the same counts
        self.foreign = dt.dispatch(**(self.fresh | {"buffer": self.other}))
        *layout, _ = self.buffer.get_dispatch_layout(self.idx, self.num_experts)
        names = ("num_tokens_per_rank", "num_tokens_per_rdma_rank", "num_tokens_per_expert", "is_token_in_rank")
        self.layout = dict(zip(names, layout, strict=True))

    def works(self) -> bool:
        """Whether the buffer still gives what it gave."""
        out = dt.dispatch(**self.fresh)
        z = dt.combine(out.x, self.out.handle)
        twice = self.layout["is_token_in_rank"].sum(1, keepdim=True) * self.x
        return same_bits(out.x, self.out.x) and torch.allclose(z, twice)


def _v1_dispatch(s: Scene, **changes: Any) -> Any:
    good = {"x": s.x, **s.layout, "topk_idx": s.idx, "topk_weights": s.w}
    return s.buffer.dispatch(**(good | changes))


def _new_buffer(s: Scene, **changes: Any) -> dt.Buffer:
    return dt.Buffer(**({"group": s.group, "timeout": 6} | changes))


CALLS: dict[str, Callable[..., Any]] = {
    "dispatch": lambda s, **changes: dt.dispatch(**(s.fresh | changes)),
    "redispatch": lambda s, **changes: dt.dispatch(**({"x": s.x, "buffer": s.buffer, "handle": s.out.handle} | changes)),
    "combine": lambda s, **changes: dt.combine(**({"y": s.out.x, "handle": s.out.handle} | changes)),
    "any": lambda s, call=None, **_: (call or (lambda: dt.dispatch(**s.fresh)))(),
    "v1 dispatch": _v1_dispatch,
    "v1 cached": lambda s, **changes: s.buffer.dispatch(**({"x": s.x, "handle": s.out.handle} | changes)),
    "v1 combine": lambda s, **changes: s.buffer.combine(**({"x": s.out.x, "handle": s.out.handle} | changes)),
    "v1 layout": lambda s, **changes: s.buffer.get_dispatch_layout(
        **({"topk_idx": s.idx, "num_experts": s.num_experts} | changes)
    ),
    "buffer": _new_buffer,
}


def attempt(rank: int, size: int, group: dist.ProcessGroup, module: str, name: str) -> Outcome:
    """Runs `module.MISUSES[name]`, then makes sure that the buffer was not harmed."""
    misuse: Misuse = importlib.import_module(module).MISUSES[name]
    scene = Scene(rank, size, group, misuse.nodes)
    changes = (misuse.change if rank in misuse.ranks else misuse.others)(scene)
    outcome = Outcome(None)
    try:
        CALLS[misuse.call](scene, **changes)
    except Exception as error:  # noqa: BLE001 - which one it is, is the question
        seen = (getattr(error, "argument", None), getattr(error, "ranks", None))
        outcome = Outcome(type(error).__name__, str(error), *seen)
    try:
        works = scene.works()
    except Exception as error:
        raise AssertionError(f"the buffer was unusable after {outcome}") from error
    assert works, f"the buffer gave other results after {outcome}"
    return outcome


def outcomes(module: str, name: str) -> tuple[Misuse, list[Outcome]]:
    misuse: Misuse = importlib.import_module(module).MISUSES[name]
    return misuse, run_ranks(misuse.size, attempt, module, name, timeout=30)


def altered(t: Tensor, **how: Any) -> Tensor:
    """A copy with one element changed: `altered(idx, at=(0, 0), value=9)`."""
    t = t.clone()
    t[how["at"]] = how["value"]
    return t
