"""Wrong arguments of DeepEP V1's calls, of `Buffer` itself, and of the calls that ask no other rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from misuses import Misuse, altered, outcomes
from torch.testing._internal.two_tensor import TwoTensor

from deepep_train import ArgumentError, Buffer, Config, DeepEPError, EventOverlap


def _v1(argument: str, change: Callable, call: str = "v1 dispatch", **how: Any) -> Misuse:
    return Misuse(call, argument, lambda s: {argument: change(s)}, **how)


def _new(argument: str, value: Any, **how: Any) -> Misuse:
    return Misuse("buffer", argument, lambda s: {argument: value}, **how)


def _with(part: int, change: Callable) -> Callable:
    """The handle as a plain tuple with one of its tensors changed."""
    return lambda s: tuple(change(t) if i == part else t for i, t in enumerate(s.out.handle))


COUNTS = {
    "counts per rank are missing": _v1("num_tokens_per_rank", lambda s: None),
    "counts per rank are a list": _v1("num_tokens_per_rank", lambda s: s.layout["num_tokens_per_rank"].tolist()),
    "counts per rank are int64": _v1("num_tokens_per_rank", lambda s: s.layout["num_tokens_per_rank"].long()),
    "counts per rank lack a rank": _v1("num_tokens_per_rank", lambda s: s.layout["num_tokens_per_rank"][:1]),
    "counts per rank are wrong": _v1("num_tokens_per_rank", lambda s: s.layout["num_tokens_per_rank"] + 1),
    "counts per expert are missing": _v1("num_tokens_per_expert", lambda s: None),
    "counts per expert are int64": _v1("num_tokens_per_expert", lambda s: s.layout["num_tokens_per_expert"].long()),
    "counts per expert are others": _v1("num_tokens_per_expert", lambda s: s.layout["num_tokens_per_expert"] + 1),
    "counts per expert are 2-D": _v1("num_tokens_per_expert", lambda s: s.layout["num_tokens_per_expert"].view(2, -1)),
    "counts per expert do not divide": Misuse(
        "v1 dispatch", "num_experts", lambda s: {"num_tokens_per_expert": s.layout["num_tokens_per_expert"][:-1]}
    ),
    "is_token_in_rank is missing": _v1("is_token_in_rank", lambda s: None),
    "is_token_in_rank is int32": _v1("is_token_in_rank", lambda s: s.layout["is_token_in_rank"].int()),
    "is_token_in_rank lacks a token": _v1("is_token_in_rank", lambda s: s.layout["is_token_in_rank"][1:]),
    "is_token_in_rank lacks a rank": _v1("is_token_in_rank", lambda s: s.layout["is_token_in_rank"][:, 1:]),
    "no layout at all": Misuse("v1 dispatch", "num_tokens_per_rank", lambda s: dict.fromkeys(s.layout)),
}
DISPATCH = {
    "x is int32": _v1("x", lambda s: s.x.int()),
    "FP8 without scales": _v1("x", lambda s: s.fp8[0]),
    "topk_idx is int32": _v1("topk_idx", lambda s: s.idx.int()),
    "topk_idx is out of range": _v1("topk_idx", lambda s: altered(s.idx, at=(1, 1), value=99)),
    "topk_weights without topk_idx": Misuse("v1 dispatch", "topk_weights", lambda s: {"topk_idx": None}),
    "topk_weights are float16": _v1("topk_weights", lambda s: s.w.half()),
    "expert_alignment=0": _v1("expert_alignment", lambda s: 0),
    "expert_alignment='16'": _v1("expert_alignment", lambda s: "16"),
    "num_worst_tokens=-1": _v1("num_worst_tokens", lambda s: -1),
    "num_worst_tokens=1.5": _v1("num_worst_tokens", lambda s: 1.5),
    "num_worst_tokens is too small": _v1("num_worst_tokens", lambda s: 2),
    "num_worst_tokens is too small on two ranks": _v1("num_worst_tokens", lambda s: 1, ranks=(0, 2), size=3),
    "config is a string": _v1("config", lambda s: "fast"),
    "allocate_on_comm_stream alone": _v1("allocate_on_comm_stream", lambda s: True),
    "previous_event is a string": _v1("previous_event", lambda s: "event"),
    "another number of experts": Misuse(
        "v1 dispatch",
        "num_experts",
        lambda s: {"num_tokens_per_expert": torch.nn.functional.pad(s.layout["num_tokens_per_expert"], (0, 12))},
        size=3,
    ),
    "another alignment": Misuse("v1 dispatch", "alignment", lambda s: {"expert_alignment": 8}, size=3),
}
HANDLES = {
    "cached: handle of another buffer": _v1("handle", lambda s: s.foreign.handle, "v1 cached"),
    "cached: handle is a dict": _v1("handle", lambda s: {"plan": 1}, "v1 cached"),
    "cached: handle lacks a tensor": _v1("handle", lambda s: tuple(s.out.handle)[1:], "v1 cached"),
    "cached: handle whose counts fall": _v1("handle", _with(0, lambda t: t.flip(0).contiguous()), "v1 cached"),
    "cached: handle with another send_head": _v1("handle", _with(5, lambda t: t + 1), "v1 cached"),
    "cached: handle with more rows than were received": _v1("handle", _with(3, lambda t: t[:0]), "v1 cached"),
    "cached: handle has None inside": _v1("handle", lambda s: (None, *s.out.handle[1:]), "v1 cached"),
    "cached: handle is shuffled": _v1("handle", lambda s: tuple(s.out.handle)[::-1], "v1 cached"),
    "cached: topk_idx": _v1("topk_idx", lambda s: s.idx, "v1 cached"),
    "cached: topk_weights": _v1("topk_weights", lambda s: s.w, "v1 cached"),
    "cached: counts beside the handle": _v1("num_tokens_per_rank", lambda s: s.layout["num_tokens_per_rank"], "v1 cached"),
    "cached: a mask beside the handle": _v1("is_token_in_rank", lambda s: s.layout["is_token_in_rank"], "v1 cached"),
    "cached: x lacks a token": _v1("x", lambda s: s.x[1:], "v1 cached"),
    "cached: another hidden size": Misuse("v1 cached", "hidden", lambda s: {"x": s.x[:, 1:]}, size=3),
    "cached: allocate_on_comm_stream alone": _v1("allocate_on_comm_stream", lambda s: True, "v1 cached"),
    "combine: handle of another buffer": _v1("handle", lambda s: s.foreign.handle, "v1 combine"),
    "combine: handle is None": _v1("handle", lambda s: None, "v1 combine"),
    "combine: x lacks a row": _v1("x", lambda s: s.out.x[1:], "v1 combine"),
    "combine: x is int8": _v1("x", lambda s: s.out.x.to(torch.int8), "v1 combine"),
    "combine: topk_weights lack a row": _v1("topk_weights", lambda s: s.out.topk_weights[1:], "v1 combine"),
    "combine: topk_weights are bfloat16": _v1("topk_weights", lambda s: s.out.topk_weights.bfloat16(), "v1 combine"),
    "combine: topk_weights lack a column": _v1("topk_weights", lambda s: s.out.topk_weights[:, :1], "v1 combine"),
    "combine: bias is a triple": _v1("bias", lambda s: (s.x,) * 3, "v1 combine"),
    "combine: bias has another dtype": _v1("bias", lambda s: s.x.half(), "v1 combine"),
    "combine: weights on one rank only": Misuse(
        "v1 combine", "weights per token", lambda s: {"topk_weights": s.out.topk_weights}, size=3
    ),
    "combine: config is a string": _v1("config", lambda s: "fast", "v1 combine"),
    "combine: previous_event is a string": _v1("previous_event", lambda s: "event", "v1 combine"),
    "combine: allocate_on_comm_stream alone": _v1("allocate_on_comm_stream", lambda s: True, "v1 combine"),
}
CONSTRUCTOR = {
    f"Buffer: {name}={value!r}": _new(name, value)
    for name, values in {
        "num_nvl_bytes": (-1, "1", None, 1.5, True),
        "num_rdma_bytes": (-1, 2.0),
        "num_qps_per_rank": (0, None),
        "timeout": (0, -1.0, "5", None, True, float("nan"), float("inf")),
        "num_local_ranks": (0, 3, "1", 1.0),
        "engine": ("magic", None, 7),
        "low_latency_mode": ("yes", object),
    }.items()
    for value in values
} | {
    "Buffer: an engine that cannot be had": Misuse("buffer", "engine", lambda s: {"engine": "nvlink"}, error="DeepEPError"),
    "Buffer: ranks disagree on low_latency_mode": _new("low_latency_mode", True, size=3),
    "Buffer: ranks disagree on num_local_ranks": _new("num_local_ranks", 1, size=3),
}
MISUSES = COUNTS | DISPATCH | HANDLES | CONSTRUCTOR


@pytest.mark.parametrize("name", MISUSES)
def test_every_rank_raises_and_the_buffer_survives(name: str) -> None:
    misuse, seen = outcomes(__name__, name)
    assert [outcome.kind for outcome in seen] == [misuse.error] * misuse.size, seen
    for outcome in seen:
        assert misuse.argument in outcome.text
        for rank in misuse.ranks:
            assert f"rank {rank}" in outcome.text
        if misuse.error == "ArgumentError":
            assert outcome.argument == misuse.argument
            assert outcome.ranks == misuse.ranks


# Calls that ask no other rank -------------------------------------------------------------------------------------------

IDX = torch.tensor([[0, 1], [2, -1]])
LOCAL: dict[str, tuple[str, Callable[[Buffer], Any]]] = {
    "layout: topk_idx is a list": ("topk_idx", lambda b: b.get_dispatch_layout(IDX.tolist(), 4)),
    "layout: topk_idx is int32": ("topk_idx", lambda b: b.get_dispatch_layout(IDX.int(), 4)),
    "layout: topk_idx is 1-D": ("topk_idx", lambda b: b.get_dispatch_layout(IDX[0], 4)),
    "layout: topk_idx has no memory of its own": ("topk_idx", lambda b: b.get_dispatch_layout(TwoTensor(IDX, IDX), 4)),
    "layout: topk_idx is too large": ("topk_idx", lambda b: b.get_dispatch_layout(IDX, 2)),
    "layout: topk_idx is below -1": ("topk_idx", lambda b: b.get_dispatch_layout(IDX - 1, 4)),
    "layout: num_experts is 0": ("num_experts", lambda b: b.get_dispatch_layout(IDX, 0)),
    "layout: num_experts is None": ("num_experts", lambda b: b.get_dispatch_layout(IDX, None)),
    "layout: allocate_on_comm_stream alone": (
        "allocate_on_comm_stream",
        lambda b: b.get_dispatch_layout(IDX, 4, allocate_on_comm_stream=True),
    ),
    "layout: allocate_on_comm_stream without async_finish": (
        "allocate_on_comm_stream",
        lambda b: b.get_dispatch_layout(IDX, 4, previous_event=EventOverlap(), allocate_on_comm_stream=True),
    ),
    "layout: previous_event is a number": ("previous_event", lambda b: b.get_dispatch_layout(IDX, 4, previous_event=3)),
    "odd number of SMs": ("new_num_sms", lambda b: b.set_num_sms(21)),
    "no SMs": ("new_num_sms", lambda b: b.set_num_sms(0)),
    "SMs as text": ("new_num_sms", lambda b: b.set_num_sms("20")),
    "config for no ranks": ("num_ranks", lambda b: b.get_dispatch_config(0)),
    "config for half a rank": ("num_ranks", lambda b: b.get_combine_config(0.5)),
    "Config: negative": ("num_sms", lambda b: Config(-2)),
    "Config: a float": ("num_max_nvl_chunked_send_tokens", lambda b: Config(20, 6.0)),
    "Config: send above recv": ("num_max_nvl_chunked_send_tokens", lambda b: Config(20, 300, 256)),
    "Config: RDMA send above recv": ("num_max_rdma_chunked_send_tokens", lambda b: Config(20, 6, 256, 128, 128)),
    "raw buffer: offset beyond the end": ("offset", lambda b: b.get_local_buffer_tensor(torch.uint8, offset=129)),
    "raw buffer: offset not aligned": ("offset", lambda b: b.get_local_buffer_tensor(torch.float32, offset=2)),
    "raw buffer: negative offset": ("offset", lambda b: b.get_local_buffer_tensor(torch.uint8, offset=-1)),
    "raw buffer: too large": ("size", lambda b: b.get_local_buffer_tensor(torch.float32, torch.Size([33]))),
    "empty: negative size": ("shape", lambda b: b.empty((-1, 4), torch.float32)),
    "empty: a number": ("shape", lambda b: b.empty(16, torch.float32)),  # type: ignore[arg-type]
    "empty: dtype by name": ("dtype", lambda b: b.empty((2, 4), "bf16")),  # type: ignore[arg-type]
    "empty: no device": ("device", lambda b: b.empty((2, 4), torch.float32, "gpu")),
    "empty_like a list": ("t", lambda b: b.empty_like([1])),  # type: ignore[arg-type]
    "group is a string": ("group", lambda b: Buffer("world")),  # type: ignore[arg-type]
    "group is a list of ranks": ("group", lambda b: Buffer([0, 1])),  # type: ignore[arg-type]
    "an MPI communicator": ("comm", lambda b: Buffer(comm=object())),
}


@pytest.mark.parametrize("name", LOCAL)
def test_calls_that_ask_nobody_raise_where_they_are_made(name: str) -> None:
    argument, call = LOCAL[name]
    with pytest.raises(ArgumentError, match=argument) as caught:
        call(Buffer(num_nvl_bytes=128))
    assert caught.value.argument == argument
    assert Buffer.num_sms == 20


def test_errors_can_be_caught_by_what_they_are() -> None:
    """An ArgumentError is the library's own error, a ValueError and a RuntimeError."""
    for kind in (DeepEPError, ValueError, RuntimeError):
        with pytest.raises(kind):
            Config(num_sms=-1)


def test_a_config_says_what_it_accepts() -> None:
    """0 SMs stand for what the buffer takes."""
    assert Config(num_sms=0).num_sms == 0
    with pytest.raises(ArgumentError, match="num_sms must be an int from 0 on, got -1"):
        Config(num_sms=-1)
    with pytest.raises(ArgumentError, match="send_tokens must be an int from 1 on, got 0"):
        Config(20, 0)


def test_memory_of_a_gpu_that_is_not_there_is_an_argument_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ArgumentError, match="no CUDA device, got 'cuda'") as caught:
        Buffer().empty((1, 1), torch.float32, "cuda")
    assert caught.value.argument == "device"
