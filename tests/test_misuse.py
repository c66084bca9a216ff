"""Wrong arguments of `dispatch` and `combine`: every rank raises, naming the rank and the argument, and nothing breaks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from misuses import Misuse, Outcome, Scene, altered, outcomes
from torch.testing._internal.two_tensor import TwoTensor

import deepep_train as dt

FP8 = torch.float8_e4m3fn


def _x(change: Any, argument: str = "x", **how: Any) -> Misuse:
    return Misuse("dispatch", argument, lambda s: {"x": change(s)}, **how)


def _freed(t: torch.Tensor) -> torch.Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def _part_of_freed(t: torch.Tensor) -> torch.Tensor:
    whole = torch.cat([t, t])
    part = whole[len(t) :]
    whole.untyped_storage().resize_(0)
    return part


def _cut_short(t: torch.Tensor) -> torch.Tensor:
    t = t.t().contiguous().t()
    t.untyped_storage().resize_(t.untyped_storage().nbytes() - 1)
    return t


def _idx(change: Any, **how: Any) -> Misuse:
    return Misuse("dispatch", "topk_idx", lambda s: {"topk_idx": change(s)}, **how)


def _weights(change: Any, **how: Any) -> Misuse:
    return Misuse("dispatch", "topk_weights", lambda s: {"topk_weights": change(s)}, **how)


def _set(call: str, argument: str, value: Any, **how: Any) -> Misuse:
    return Misuse(call, argument, lambda s: {argument: value}, **how)


def _y(change: Any, argument: str = "y", **how: Any) -> Misuse:
    return Misuse("combine", argument, lambda s: {"y": change(s)}, **how)


def _bias(change: Any, **how: Any) -> Misuse:
    return Misuse("combine", "bias", lambda s: {"bias": change(s)}, **how)


def _too_few_rows(s: Scene) -> dict[str, Any]:
    """Rank 1 has room for one row less than arrive."""
    return {"layout": "expert", "alignment": 4, "num_worst_tokens": s.by_expert.x.size(0) - 1}


PAYLOAD = {
    "x is None": _x(lambda s: None),
    "x is a list of lists": _x(lambda s: s.x.tolist()),
    "x is a numpy array": _x(lambda s: s.x.numpy()),
    "x is a number": _x(lambda s: 1.0),
    "x is 1-D": _x(lambda s: s.x[0]),
    "x is 3-D": _x(lambda s: s.x.view(4, 2, 4)),
    "x is int64": _x(lambda s: s.x.long()),
    "x is bool": _x(lambda s: s.x > 0),
    "x is complex": _x(lambda s: s.x.to(torch.complex64)),
    "x is sparse": _x(lambda s: s.x.to_sparse()),
    "x is sparse CSR": _x(lambda s: s.x.to_sparse_csr()),
    "x is nested": _x(lambda s: torch.nested.nested_tensor([s.x, s.x[:1]], layout=torch.jagged)),
    "x has no memory of its own, as a DTensor": _x(lambda s: TwoTensor(s.x, s.x)),
    "x's storage was freed": _x(lambda s: _freed(s.x)),
    "x is a part of what was freed": _x(lambda s: _part_of_freed(s.x)),
    "x's storage was cut short": _x(lambda s: _cut_short(s.x)),
    "x is a negated view": _x(lambda s: torch._neg_view(s.x)),
    "x has no columns": _x(lambda s: s.x[:, :0]),
    "x is wrong on two ranks": _x(lambda s: s.x[0], ranks=(0, 2), size=3),
    "x is wrong on all ranks": _x(lambda s: None, ranks=(0, 1, 2), size=3),
    "x is on another device": _x(lambda s: s.x.to("meta")),
    "everything is on another device": Misuse(
        "dispatch", "x", lambda s: {"x": s.x.to("meta"), "topk_idx": s.idx.to("meta"), "topk_weights": s.w.to("meta")}
    ),
    "FP8 without scales": _x(lambda s: s.fp8[0]),
    "FP8 with scales None": _x(lambda s: (s.fp8[0], None), "x[1]"),
    "a triple": _x(lambda s: (*s.fp8, s.fp8[1])),
    "a pair of float32": _x(lambda s: (s.x, s.fp8[1]), "x[0]"),
    "a pair without data": _x(lambda s: (None, s.fp8[1]), "x[0]"),
    "FP8 data 1-D": _x(lambda s: (s.fp8[0][0], s.fp8[1]), "x[0]"),
    "FP8 data without columns": _x(lambda s: (s.fp8[0][:, :0], s.fp8[1]), "x[0]"),
    "FP8 with a scale row too few": _x(lambda s: (s.fp8[0], s.fp8[1][:3]), "x[1]"),
    "FP8 with scales in bfloat16": _x(lambda s: (s.fp8[0], s.fp8[1].bfloat16()), "x[1]"),
    "FP8 with scales 1-D": _x(lambda s: (s.fp8[0], s.fp8[1][:, 0]), "x[1]"),
    "FP8 with no scale per row": _x(lambda s: (s.fp8[0], s.fp8[1][:, :0]), "x[1]"),
    "FP8 with a list of scales": _x(lambda s: (s.fp8[0], [1.0] * 4), "x[1]"),
}
ROUTING = {
    "topk_idx is missing": _idx(lambda s: None),
    "topk_idx is a list": _idx(lambda s: s.idx.tolist()),
    "topk_idx is a numpy array": _idx(lambda s: np.zeros((4, 2), dtype=np.int64)),
    "topk_idx is int32": _idx(lambda s: s.idx.int()),
    "topk_idx is float": _idx(lambda s: s.idx.float()),
    "topk_idx is bool": _idx(lambda s: s.idx > 0),
    "topk_idx has no memory of its own": _idx(lambda s: TwoTensor(s.idx, s.idx)),
    "topk_idx is 1-D": _idx(lambda s: s.idx[:, 0]),
    "topk_idx is 3-D": _idx(lambda s: s.idx.unsqueeze(2)),
    "topk_idx is sparse": _idx(lambda s: s.idx.to_sparse()),
    "topk_idx is on another device": _idx(lambda s: s.idx.to("meta")),
    "topk_idx lacks a token": _idx(lambda s: s.idx[:3]),
    "topk_idx has no columns": _idx(lambda s: s.idx[:, :0]),
    "topk_idx has an expert too many": _idx(lambda s: altered(s.idx, at=(3, 1), value=s.num_experts)),
    "topk_idx has -2": _idx(lambda s: altered(s.idx, at=(0, 0), value=-2)),
    "topk_idx is out of range on two ranks": _idx(lambda s: s.idx + 99, ranks=(1, 2), size=3),
    "topk_weights are a list": _weights(lambda s: s.w.tolist()),
    "topk_weights are bfloat16": _weights(lambda s: s.w.bfloat16()),
    "topk_weights are float64": _weights(lambda s: s.w.double()),
    "topk_weights are 1-D": _weights(lambda s: s.w[:, 0]),
    "topk_weights lack a token": _weights(lambda s: s.w[:3]),
    "topk_weights lack a column": _weights(lambda s: s.w[:, :1]),
    "topk_weights are sparse": _weights(lambda s: s.w.to_sparse()),
    "topk_weights are on another device": _weights(lambda s: s.w.to("meta")),
}
NUMBERS = {
    **{
        f"{name}={value!r}": _set("dispatch", name, value)
        for name, values in {
            "num_experts": (None, "8", True, 8.0, 0, -8, 9, [8]),
            "layout": ("token", None, 3, ["rank"]),
            "alignment": (0, -1, 2.0, None, True, "16"),
            "num_worst_tokens": (-1, 8.0, None, "8", True, 2**64, 10**15),
        }.items()
        for value in values
    },
    "num_worst_tokens is too small on one rank": _set("dispatch", "num_worst_tokens", 1),
    "num_worst_tokens is too small for padded experts": Misuse(
        "dispatch", "num_worst_tokens", _too_few_rows, others=lambda s: {"layout": "expert", "alignment": 4}
    ),
}
HANDLES = {
    "handle of another buffer": Misuse("redispatch", "handle", lambda s: {"handle": s.foreign.handle}),
    "handle is a string": _set("redispatch", "handle", "a handle"),
    "handle is a short tuple": Misuse("redispatch", "handle", lambda s: {"handle": tuple(s.out.handle)[:5]}),
    "handle is a tuple of None": _set("redispatch", "handle", (None,) * 6),
    "handle and topk_idx": Misuse("redispatch", "topk_idx", lambda s: {"topk_idx": s.idx}),
    "handle and topk_weights": Misuse("redispatch", "topk_weights", lambda s: {"topk_weights": s.w}),
    "handle and another alignment": _set("redispatch", "alignment", 16),
    "handle and num_worst_tokens": _set("redispatch", "num_worst_tokens", 100),
    "handle and another layout": _set("redispatch", "layout", "expert"),
    "handle and num_experts": Misuse("redispatch", "num_experts", lambda s: {"num_experts": s.num_experts}),
    "handle for another number of tokens": Misuse("redispatch", "x", lambda s: {"x": s.x[:3]}),
    "handle and no tensor": _set("redispatch", "x", None),
}
COMBINE = {
    "y is None": _y(lambda s: None),
    "y is a list": _y(lambda s: s.out.x.tolist()),
    "y is a pair": _y(lambda s: (s.out.x, s.out.x)),
    "y is int32": _y(lambda s: s.out.x.int()),
    "y is FP8": _y(lambda s: s.out.x.to(FP8)),
    "y is 1-D": _y(lambda s: s.out.x[:, 0]),
    "y lacks a row": _y(lambda s: s.out.x[1:]),
    "y has a row too many": _y(lambda s: torch.cat([s.out.x, s.out.x[:1]])),
    "y has no columns": _y(lambda s: s.out.x[:, :0]),
    "y is sparse": _y(lambda s: s.out.x.to_sparse()),
    "y is wrong on two ranks": _y(lambda s: s.out.x[1:], ranks=(0, 1), size=3),
    "y has rows of the other layout": Misuse("combine", "y", lambda s: {"y": s.out.x, "handle": s.by_expert.handle}),
    "bias is a string": _bias(lambda s: "bias"),
    "bias is a number": _bias(lambda s: 1.0),
    "bias has the rows of y": _bias(lambda s: torch.cat([s.x, s.x])),
    "bias has another dtype": _bias(lambda s: s.x.double()),
    "bias has another width": _bias(lambda s: s.x[:, :1]),
    "bias is a triple": _bias(lambda s: (s.x, s.x, s.x)),
    "bias has a wrong second": _bias(lambda s: (s.x, s.x[:2])),
    "bias is sparse": _bias(lambda s: s.x.to_sparse()),
}
DISAGREEMENTS = {
    "num_experts": _set("dispatch", "num_experts", 24, size=3),
    "hidden": _x(lambda s: s.x[:, :4], "hidden", size=3),
    "hidden, with no tokens": Misuse(
        "dispatch", "hidden", lambda s: {"x": s.x[:0, :4], "topk_idx": s.idx[:0], "topk_weights": s.w[:0]}, size=3
    ),
    "dtype": _x(lambda s: s.x.half(), "dtype", size=3, ranks=(2,)),
    "a pair on one rank": _x(lambda s: s.fp8, "dtype", size=3),
    "dtype of scales": _x(lambda s: (s.fp8[0], s.fp8[1].int()), "scales dtype", size=3, others=lambda s: {"x": s.fp8}),
    "number of scales": _x(lambda s: (s.fp8[0], s.fp8[1][:, :1]), "scales per row", size=3, others=lambda s: {"x": s.fp8}),
    "layout": _set("dispatch", "layout", "expert", size=3, ranks=(0,)),
    "alignment": _set("dispatch", "alignment", 16, size=3),
    "top_k": Misuse("dispatch", "top_k", lambda s: {"topk_idx": s.idx[:, :1], "topk_weights": s.w[:, :1]}, size=3),
    "weights on some ranks only": Misuse("dispatch", "topk_weights given", lambda s: {"topk_weights": None}, size=3),
    "combine: hidden": _y(lambda s: s.out.x[:, :2], "hidden", size=3),
    "combine: dtype": _y(lambda s: s.out.x.double(), "dtype", size=3),
    "combine: layouts": Misuse("combine", "layout", lambda s: {"y": s.by_expert.x, "handle": s.by_expert.handle}, size=3),
    "combine: other handles": Misuse("combine", "handle", lambda s: {"y": s.shorter.x, "handle": s.shorter.handle}, size=3),
    "combine: other handles with the same counts": Misuse("combine", "handle", lambda s: {"handle": s.flipped.handle}, size=3),
    "a handle: other handles": Misuse("redispatch", "handle", lambda s: {"x": s.x[:2], "handle": s.shorter.handle}, size=3),
    "combine instead of dispatch": Misuse(
        "any", "operation", lambda s: {"call": lambda: dt.combine(s.out.x, s.out.handle)}, size=3
    ),
    "a cached dispatch instead of a fresh one": Misuse(
        "any", "operation", lambda s: {"call": lambda: dt.dispatch(s.x, buffer=s.buffer, handle=s.out.handle)}, size=3
    ),
    "V1's dispatch without top-k": Misuse(
        "any", "top_k", lambda s: {"call": lambda: s.buffer.dispatch(s.x, **s.layout)}, size=3
    ),
}
MISUSES = PAYLOAD | ROUTING | NUMBERS | HANDLES | COMBINE
MISUSES |= {f"ranks disagree: {name}": misuse for name, misuse in DISAGREEMENTS.items()}


@pytest.mark.parametrize("name", MISUSES)
def test_every_rank_raises_and_the_buffer_survives(name: str) -> None:
    misuse, seen = outcomes(__name__, name)
    assert [outcome.kind for outcome in seen] == [misuse.error] * misuse.size, seen
    for outcome in seen:
        assert outcome.argument == misuse.argument
        assert misuse.argument in outcome.text
        assert outcome.ranks == misuse.ranks
        for rank in misuse.ranks:
            assert f"rank {rank}" in outcome.text


def test_there_are_many() -> None:
    assert len(MISUSES) >= 60


def test_messages_are_short_and_say_what_was_expected_and_what_came() -> None:
    def text(name: str) -> str:
        outcome: Outcome = outcomes(__name__, name)[1][0]
        assert "\n" not in outcome.text
        return outcome.text

    assert "float32 tensor of shape [8]" in text("x is 1-D")
    assert "9 must be divisible by the group's 2 ranks" in text("num_experts=9")
    assert "[-1, 8)" in text("topk_idx has -2")
    assert "'rank' or 'expert'" in text("layout='token'")
    assert "pair (data, scales)" in text("FP8 without scales")
    assert "num_worst_tokens=1 but" in text("num_worst_tokens is too small on one rank")


# Without a buffer there is nobody to ask: these raise where they are made.


@pytest.mark.parametrize("buffer", [None, "buffer", object()], ids=["None", "string", "object"])
def test_dispatch_without_a_buffer(buffer: object) -> None:
    with pytest.raises(dt.ArgumentError, match="buffer") as caught:
        dt.dispatch(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64), buffer=buffer, num_experts=1)  # type: ignore[arg-type]
    assert caught.value.argument == "buffer"


@pytest.mark.parametrize("handle", [None, "handle", (torch.ones(1),) * 6, ()], ids=["None", "string", "tuple", "empty"])
def test_combine_without_a_handle(handle: object) -> None:
    with pytest.raises(dt.ArgumentError, match="handle") as caught:
        dt.combine(torch.ones(1, 1), handle)  # type: ignore[arg-type]
    assert caught.value.argument == "handle"


def _another_buffer(rank: int, size: int, group: dist.ProcessGroup) -> tuple[str, tuple[int, ...]]:
    buffers = dt.Buffer(group, timeout=6), dt.Buffer(group, timeout=6)
    with pytest.raises(dt.ArgumentError) as caught:
        dt.dispatch(torch.ones(2, 4), torch.zeros(2, 1, dtype=torch.int64), buffer=buffers[rank == 1], num_experts=size)
    return str(caught.value), caught.value.ranks


def test_ranks_that_use_different_buffers_are_told() -> None:
    for text, ranks in run_ranks(3, _another_buffer):
        assert "disagree on buffer" in text and ranks == (1,)
