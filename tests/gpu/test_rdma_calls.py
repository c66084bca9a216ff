"""The rdma engine's calls for which no CPU waits, along a handle or with num_worst_tokens: in CUDA graphs, and when ranks do
not fit together, which the kernels find out."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import assert_same_bits
from in_place import check_writes
from shared import LOCAL_EXPERTS, buffer_of, capture_and_replay, inputs, layout_of, run_ranks
from test_nvlink_streams import spin
from test_rdma import USABLE
from torch import Tensor

import deepep_train as dt

pytestmark = USABLE
TIMEOUT = 20.0  # which no test here may come near


def meshes(*of: tuple[int, int]) -> pytest.MarkDecorator:
    """Ranks, and how many of them are a node."""
    return pytest.mark.parametrize("mesh", of, ids=lambda m: f"{m[0] // m[1]}x{m[1]}")


MESHES = meshes((4, 2), (8, 4), (2, 1), (4, 1))


def made(buffer: dt.Buffer, rank: int, size: int, seed: int, **how: Any) -> tuple[Tensor, Tensor, Tensor, dt.Dispatched]:
    x, idx, w = (t.cuda() for t in inputs(rank, size, seed))
    return x, idx, w, dt.dispatch(x, idx, w, buffer=buffer, num_experts=size * LOCAL_EXPERTS, **how)


def graphs(rank: int, size: int, group: dist.ProcessGroup, local: int, layout: str, fresh: bool) -> None:
    buffer = dt.Buffer(group, num_nvl_bytes=32 << 20, engine="rdma", num_local_ranks=local, timeout=TIMEOUT)
    x, idx, w = (t.cuda() for t in inputs(rank, size, 9))
    with pytest.raises(dt.ArgumentError, match="capture needs num_worst"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        dt.dispatch(x, idx, w, buffer=buffer, num_experts=size * LOCAL_EXPERTS)
    buffer.check()
    capture_and_replay(buffer, rank, size, group, layout, fresh)


@pytest.mark.parametrize("fresh", [False, True], ids=["cached", "num_worst_tokens"])
@pytest.mark.parametrize("layout", ["rank", "expert"])
@MESHES
def test_graphs_capture_and_replay(mesh: tuple[int, int], layout: str, fresh: bool) -> None:
    run_ranks(mesh[0], graphs, mesh[1], layout, fresh, timeout=90)


def written_to(rank: int, size: int, group: dist.ProcessGroup, local: int) -> None:
    x, idx, w = (t.cuda() for t in inputs(rank, size, 40))
    check_writes(buffer_of(group, "rdma", local), x, idx, w, size * LOCAL_EXPERTS)


@meshes((4, 2), (2, 1))
def test_results_may_be_written_to(mesh: tuple[int, int]) -> None:
    run_ranks(mesh[0], written_to, mesh[1])


def unwaiting(rank: int, size: int, group: dist.ProcessGroup, local: int, layout: str) -> float:
    """Dispatches with num_worst_tokens while the GPU is busy for 400 ms: what torch would wait for raises, what else there is
    would take as long. The results are those of a dispatch that waits."""
    buffer = buffer_of(group, "rdma", local)
    x, idx, w = (t.cuda() for t in inputs(rank, size, 6))
    how: dict[str, Any] = {"buffer": buffer, "num_experts": size * LOCAL_EXPERTS, "layout": layout, "alignment": 8}
    expected = dt.dispatch(x, idx, w, **how)
    z = dt.combine(expected.x, expected.handle)
    first = dt.dispatch(x, idx, w, num_worst_tokens=1500, **how)  # loads every kernel, and leaves memory in caches
    dt.combine(first.x, first.handle)
    del first
    torch.cuda.synchronize()
    dist.barrier(group)
    spin(400)
    torch.cuda.set_sync_debug_mode("error")
    try:
        began = time.monotonic()
        out = dt.dispatch(x, idx, w, num_worst_tokens=1500, **how)
        got_z = dt.combine(out.x, out.handle)
        seconds = time.monotonic() - began
    finally:
        torch.cuda.set_sync_debug_mode("default")
    n = expected.x.size(0)
    assert out.x.size(0) == 1500
    assert_same_bits(out.x[:n], expected.x)
    assert out.x[n:].count_nonzero() == 0
    assert_same_bits(out.topk_weights[:n], expected.topk_weights)
    assert_same_bits(got_z, z)
    assert out.tokens_per_expert.is_cuda
    assert out.tokens_per_expert.tolist() == expected.tokens_per_expert.tolist()
    copied = tuple(t.clone() for t in out.handle)
    if layout == "rank":
        assert_same_bits(buffer.dispatch(x, handle=copied)[0], out.x)
        assert_same_bits(buffer.combine(out.x, copied)[0], z)
    buffer.check()
    return seconds


@pytest.mark.parametrize("layout", ["rank", "expert"])
@MESHES
def test_no_cpu_waits_with_num_worst_tokens(mesh: tuple[int, int], layout: str) -> None:
    assert max(run_ranks(mesh[0], unwaiting, mesh[1], layout)) < 0.2


def rebuilt(rank: int, size: int, group: dist.ProcessGroup, local: int) -> None:
    """Plain tuples of what dispatch returned, and copies of it, do what the handle does."""
    buffer = buffer_of(group, "rdma", local)
    x, _, _, out = made(buffer, rank, size, 3)
    z = dt.combine(out.x, out.handle)
    for handle in (tuple(out.handle), tuple(t.clone() for t in out.handle)):
        assert_same_bits(buffer.dispatch(x, handle=handle)[0], out.x)
        assert_same_bits(buffer.combine(out.x, handle)[0], z)


@MESHES
def test_rebuilt_handles(mesh: tuple[int, int]) -> None:
    run_ranks(mesh[0], rebuilt, mesh[1])


def misused(rank: int, size: int, group: dist.ProcessGroup, local: int) -> None:
    """A fresh dispatch that is wrong on one rank raises the same on all of them, and the buffer goes on."""
    buffer = buffer_of(group, "rdma", local)
    x, idx, w, out = made(buffer, rank, size, 3)
    num_experts, one = size * LOCAL_EXPERTS, rank == 1
    how: dict[str, Any] = {"buffer": buffer, "num_experts": num_experts}

    def told(match: str, *given: Any, **also: Any) -> None:
        with pytest.raises(dt.ArgumentError, match=match):
            dt.dispatch(*given, **how | also)

    told("rank 1: topk_idx must lie in", x, idx + num_experts if one else idx, w)
    told("rank 1: x must be", x[:, None] if one else x, idx, w)
    told("disagree on num_experts", x, idx, w, num_experts=2 * num_experts if one else num_experts)
    told("disagree on hidden", x[:, :64] if one else x, idx, w)
    layout = layout_of(buffer, idx, num_experts)
    for name, text in (("num_tokens_per_rdma_rank", "rdma_rank"), ("num_tokens_per_expert", "per_expert")):
        with pytest.raises(dt.ArgumentError, match=f"rank 1: num_tokens_.*{text}"):
            buffer.dispatch(x, **layout | {name: layout[name] + one}, topk_idx=idx, topk_weights=w)
    assert_same_bits(dt.dispatch(x, idx, w, **how).x, out.x)


@MESHES
def test_a_fresh_dispatch_that_is_wrong_on_one_rank(mesh: tuple[int, int]) -> None:
    run_ranks(mesh[0], misused, mesh[1])


# Ranks that do not fit together: in processes of their own, since NVSHMEM's memory is not given back ------------------------


def ends_soon(work: Callable[[], Any], match: str = "") -> str:
    """Calls until one raises, which must be long before the deadline."""
    began = time.monotonic()
    with pytest.raises(dt.DeepEPError, match=match) as caught:
        while time.monotonic() - began < 2 * TIMEOUT:
            work()
            torch.cuda.synchronize()
    assert time.monotonic() - began < TIMEOUT / 2, caught.value
    return str(caught.value)


def all_or_one(rank: int, size: int, group: dist.ProcessGroup, local: int, operation: str) -> None:
    """If all ranks' arguments are wrong nothing has happened; if one's are, all hear of it."""
    buffer = dt.Buffer(group, num_nvl_bytes=32 << 20, engine="rdma", num_local_ranks=local, timeout=TIMEOUT)
    x, _, _, out = made(buffer, rank, size, 3)
    z = dt.combine(out.x, out.handle)

    def right() -> None:
        if operation == "dispatch":
            assert_same_bits(dt.dispatch(x, buffer=buffer, handle=out.handle).x, out.x)
        else:
            assert_same_bits(dt.combine(out.x, out.handle), z)

    def wrong() -> None:
        with pytest.raises(dt.ArgumentError, match="must be"):
            if operation == "dispatch":
                dt.dispatch(x[:, None], buffer=buffer, handle=out.handle)
            else:
                dt.combine(out.x[:, None], out.handle)

    for _ in range(2):
        wrong()
        right()
    buffer.check()

    def go_on() -> None:
        if operation == "dispatch":
            dt.dispatch(x, buffer=buffer, handle=out.handle)
        else:
            dt.combine(out.x, out.handle)

    if rank == 1:
        wrong()
    text = ends_soon(go_on)
    expected = ("refused to take part", "has failed", *(["another call"] if rank == 1 else []))
    assert any(part in text for part in expected), text


@pytest.mark.parametrize("operation", ["dispatch", "combine"])
@meshes((4, 2), (4, 1))
def test_wrong_arguments_of_cached_calls(mesh: tuple[int, int], operation: str) -> None:
    run_ranks(mesh[0], all_or_one, mesh[1], operation, fresh=True, timeout=60)


def unbounded(rank: int, size: int, group: dist.ProcessGroup, local: int, how: str) -> None:
    """With num_worst_tokens what is wrong on one rank fails all ranks' buffers, long before the deadline."""
    buffer = dt.Buffer(group, num_nvl_bytes=32 << 20, engine="rdma", num_local_ranks=local, timeout=TIMEOUT)
    x, idx, w, _ = made(buffer, rank, size, 3)
    made(buffer, rank, size, 3, num_worst_tokens=4096)
    dt.dispatch(x, idx, w, buffer=buffer, num_experts=size * LOCAL_EXPERTS, layout="expert", num_worst_tokens=4096)
    buffer.check()
    torch.cuda.synchronize()
    one, bound = rank == 1, 4096
    began = time.monotonic()
    if how == "overflow":
        bound = 1 if one else 4096
    elif how == "mixed":
        bound = 0 if one else 4096
    elif how == "index":
        idx = idx + size * LOCAL_EXPERTS if one else idx
    elif how == "room":
        x, idx, w = (t.repeat(200, 1) for t in (x, idx, w)) if one else (x, idx, w)
        bound = 20000
    if how in ("mixed", "arguments") and one:
        with pytest.raises(dt.ArgumentError, match="must be" if how == "arguments" else "are wrong or differ"):
            dt.dispatch(x[:, None] if how == "arguments" else x, idx, w, buffer=buffer, num_experts=size * LOCAL_EXPERTS)
    else:
        experts = size * LOCAL_EXPERTS
        for layout in ("rank", "expert"):  # the next one hears of the first, if it is not too early
            with suppress(dt.ArgumentError):
                out = dt.dispatch(x, idx, w, buffer=buffer, num_experts=experts, layout=layout, num_worst_tokens=bound)
                torch.cuda.synchronize()
                assert out.x.isnan().all()
                assert not out.tokens_per_expert.any()
    torch.cuda.synchronize()
    texts = {
        "overflow": "rank 1: num_worst_tokens=1 but",
        "room": "pass num_rdma_bytes=",
        "index": "topk_idx of rank 1 has an index outside",
    }
    with pytest.raises(dt.ArgumentError, match=texts.get(how, "are wrong or differ")):
        buffer.check()
    assert time.monotonic() - began < TIMEOUT / 2


@pytest.mark.parametrize("how", ["overflow", "mixed", "index", "arguments", "room"])
@meshes((4, 2), (4, 1))
def test_num_worst_tokens_that_is_wrong_on_one_rank(mesh: tuple[int, int], how: str) -> None:
    run_ranks(mesh[0], unbounded, mesh[1], how, fresh=True, timeout=60)


def astray(rank: int, size: int, group: dist.ProcessGroup, local: int, how: str) -> None:
    """The last rank is in another call than the others."""
    buffer = dt.Buffer(group, num_nvl_bytes=32 << 20, engine="rdma", num_local_ranks=local, timeout=TIMEOUT)
    x, _, _, out = made(buffer, rank, size, 3)
    _, _, _, other = made(buffer, rank, size, 4)
    dt.combine(other.x, other.handle)
    is_astray = rank == size - 1

    def work() -> None:
        if how == "handles":
            dt.dispatch(x, buffer=buffer, handle=(other if is_astray else out).handle)
        elif how == "fresh" and is_astray:
            made(buffer, rank, size, 5)
        elif is_astray:
            dt.combine(out.x, out.handle)
        else:
            dt.dispatch(x, buffer=buffer, handle=out.handle)

    text = ends_soon(work)
    assert "another call" in text or "has failed" in text or "refused to take part" in text, text


@pytest.mark.parametrize("how", ["handles", "operations", "fresh"])
@meshes((4, 2), (4, 1))
def test_ranks_in_different_calls(mesh: tuple[int, int], how: str) -> None:
    run_ranks(mesh[0], astray, mesh[1], how, fresh=True, timeout=60)
