"""What the ranks of the GPU tests do: every function runs on every rank, in processes that live as long as the session."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import harness
import pytest
import torch
import torch.distributed as dist
from draws import Exchange
from harness import assert_same_bits
from reference import Given, Rows
from torch import Tensor

import deepep_train as dt
from deepep_train import engines

# Buffers take 2 GiB unless told to take more, and these tests make dozens of them, some of whose memory is kept for ever.
engines.DEFAULT_ARENA_BYTES = 64 << 20
engines.DEFAULT_RAIL_BYTES = 32 << 20
TOKENS, HIDDEN, TOP_K, LOCAL_EXPERTS = 96, 512, 4, 4
_buffers: dict[tuple[str, int, int | None], dt.Buffer] = {}


def device_of(rank: int) -> torch.device:
    """Ranks are spread over the GPUs there are; CUDA_VISIBLE_DEVICES=0 puts all of them on one."""
    return torch.device("cuda", rank % torch.cuda.device_count())


ONLY_RANKS = int(os.environ.get("DEEPEP_TRAIN_ONLY_RANKS", "0"))  # with as many GPUs: what has one for each of its ranks


def run_ranks(size: int, fn: Callable[..., Any], *args: Any, **how: Any) -> list[Any]:
    """`harness.run_ranks` with every rank's GPU as its current device."""
    if ONLY_RANKS not in (0, size):
        pytest.skip(f"DEEPEP_TRAIN_ONLY_RANKS={ONLY_RANKS}, and these are {size}")
    return harness.run_ranks(size, _on_its_gpu, fn, *args, **how)


def _on_its_gpu(rank: int, size: int, group: dist.ProcessGroup, fn: Callable[..., Any], *args: Any) -> Any:
    torch.cuda.set_device(device_of(rank))
    return fn(rank, size, group, *args)


def buffer_of(group: dist.ProcessGroup, engine: str = "nvlink", num_local_ranks: int | None = None) -> dt.Buffer:
    """One per process, engine and mesh: making an arena takes longer than most tests."""
    key = (engine, group.size(), num_local_ranks)
    if key not in _buffers:
        timeout = float(os.environ.get("DEEPEP_TRAIN_TEST_TIMEOUT", "30"))  # longer with sanitizers
        _buffers[key] = dt.Buffer(group, engine=engine, timeout=timeout, num_local_ranks=num_local_ranks)
    return _buffers[key]


def layout_of(buffer: dt.Buffer, topk_idx: Tensor, num_experts: int) -> dict[str, Any]:
    """What `get_dispatch_layout` counts, as V1's `dispatch` takes it."""
    names = ("num_tokens_per_rank", "num_tokens_per_rdma_rank", "num_tokens_per_expert", "is_token_in_rank")
    return dict(zip(names, buffer.get_dispatch_layout(topk_idx, num_experts)[:4], strict=True))


def to(value: Any, device: str) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(to(v, device) for v in value)
    return value.to(device) if isinstance(value, Tensor) else value


def inputs(rank: int, size: int, seed: int, tokens: int = TOKENS, hidden: int = HIDDEN) -> tuple[Tensor, Tensor, Tensor]:
    """x, topk_idx, topk_weights on the CPU; some picks are -1."""
    g = torch.Generator().manual_seed(1000 * seed + rank)
    x = torch.randn(tokens, hidden, generator=g).to(torch.bfloat16)
    idx = torch.rand(tokens, size * LOCAL_EXPERTS, generator=g).topk(TOP_K, 1).indices
    idx[torch.rand(tokens, TOP_K, generator=g) < 0.1] = -1
    return x, idx, torch.rand(tokens, TOP_K, generator=g)


def capture_and_replay(buffer: dt.Buffer, rank: int, size: int, group: dist.ProcessGroup, layout: str, fresh: bool) -> None:
    """A dispatch, `fresh` with num_worst_tokens or along a handle, and its combine in a CUDA graph, which is replayed with
    other rows and, if fresh, other routings; each time bit for bit what calls outside of graphs give. Destroys the buffer."""
    graph, z = _replayed(buffer, rank, size, layout, fresh)
    gc.collect()  # handles; their tables' memory is overwritten
    others = [torch.full((n,), 1 << 29, dtype=torch.int32, device="cuda") for n in (64, 4096, 1 << 18) for _ in range(64)]
    dist.barrier(group)  # a rank whose buffer is destroyed may say that it is gone to one that still looks at the last call
    buffer.destroy()
    others += [torch.full_like(t, 1 << 29) for t in others]
    graph.replay()  # of a destroyed buffer: defined, and NaN
    torch.cuda.synchronize()
    assert z.isnan().all() and all((t == 1 << 29).all() for t in others)


def _replayed(buffer: dt.Buffer, rank: int, size: int, layout: str, fresh: bool) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """The graph, and combine's output in it."""
    x, idx, w = (t.cuda() for t in inputs(rank, size, 9))
    how: dict[str, Any] = {"buffer": buffer, "num_experts": size * LOCAL_EXPERTS, "layout": layout, "alignment": 4}
    first = dt.dispatch(x, idx, w, **how)

    def work() -> tuple[dt.Dispatched, Tensor]:
        if fresh:
            out = dt.dispatch(x, idx, w, num_worst_tokens=2048, **how)
        else:
            out = dt.dispatch(x, buffer=buffer, handle=first.handle)
        return out, dt.combine(out.x, out.handle if fresh else first.handle)

    work()  # loads every kernel
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, z = work()
    for seed in (10, 11, 12):
        new_x, new_idx, new_w = inputs(rank, size, seed)
        x.copy_(new_x)
        if fresh:
            idx.copy_(new_idx)
            w.copy_(new_w)
        for _ in range(2):
            graph.replay()
        expected = dt.dispatch(x, idx, w, **how) if fresh else dt.dispatch(x, buffer=buffer, handle=first.handle)
        n = expected.x.size(0)
        assert_same_bits(out.x[:n], expected.x)
        handle = expected.handle if fresh else first.handle
        assert_same_bits(z, dt.combine(expected.x, handle))
        assert (out.x.size(0) > n) == fresh
        if fresh:
            assert out.x[n:].count_nonzero() == 0
            assert out.tokens_per_expert.tolist() == expected.tokens_per_expert.tolist()
            assert_same_bits(out.topk_weights[:n], expected.topk_weights)
            assert out.topk_weights[n:].count_nonzero() == 0
            if layout == "rank":
                assert_same_bits(out.topk_idx[:n], expected.topk_idx)
                assert (out.topk_idx[n:] == -1).all()
    torch.cuda.synchronize()
    return graph, z


@dataclass(frozen=True)
class Got:
    """What one rank's calls returned, on the CPU."""

    x: Rows
    topk_idx: Tensor | None
    topk_weights: Tensor | None
    tokens_per_expert: list[int]
    z: Tensor
    z_visible: Tensor
    again: Rows


def exchange(
    rank: int,
    size: int,
    group: dist.ProcessGroup,
    cases: list[Exchange],
    given: list[list[Given]],
    ys: list[list[Tensor]],
    biases: list[list[Any]],
    worst: list[list[int]],
    engine: str = "nvlink",
    num_local_ranks: int | None = None,
) -> list[Got]:
    """Dispatch, combine from any memory and from peer-visible memory, and dispatch again along the handle."""
    buffer = buffer_of(group, engine, num_local_ranks)
    results = []
    for case, g, y, bias, bound in zip(cases, given, ys, biases, worst, strict=True):
        mine = g[rank]
        how = {"num_experts": case.num_experts, "layout": case.layout, "alignment": case.alignment}
        x, idx, weights = to((mine.x, mine.topk_idx, mine.topk_weights), "cuda")
        out = dt.dispatch(x, idx, weights, buffer=buffer, num_worst_tokens=bound[rank], **how)
        y_here, bias_here = to(y[rank], "cuda"), to(bias[rank], "cuda")
        z = dt.combine(y_here, out.handle, bias=bias_here)
        visible = buffer.empty_like(y_here)
        visible.copy_(y_here)
        z_visible = dt.combine(visible, out.handle, bias=bias_here)
        again = dt.dispatch(x, buffer=buffer, handle=out.handle)
        buffer.check()
        got = (out.x, out.topk_idx, out.topk_weights, out.tokens_per_expert.tolist(), z, z_visible, again.x)
        results.append(Got(*to(got, "cpu")))
    torch.cuda.synchronize()
    buffer.check()
    return results
