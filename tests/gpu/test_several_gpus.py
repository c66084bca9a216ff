"""One GPU a rank: NCCL beside and below, and a current device that is not the buffer's. The other tests here spread their ranks
over the GPUs by themselves."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import shared
import torch
import torch.distributed as dist
from harness import assert_same_bits
from shared import LOCAL_EXPERTS, inputs, run_ranks
from test_nvlink_streams import spin, step
from test_nvlink_surroundings import ROUNDS, pair
from torch import Tensor

import deepep_train as dt

GPUS = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(GPUS < 2, reason=f"needs at least 2 GPUs, torch sees {GPUS}")


def own_gpu(rank: int, size: int, group: dist.ProcessGroup) -> tuple[str, int, dict[str, int]]:
    buffer = shared.buffer_of(group)
    out = dt.dispatch(torch.ones(3, 8, device="cuda"), torch.zeros(3, 1, device="cuda").long(), buffer=buffer, num_experts=size)
    return buffer.engine, out.x.device.index, buffer._engine._default_sms


def test_every_rank_has_a_gpu_of_its_own() -> None:
    found = run_ranks(GPUS, own_gpu)
    assert [engine for engine, _, _ in found] == ["nvlink"] * GPUS
    assert [device for _, device, _ in found] == list(range(GPUS))
    assert all(sms == found[0][2] for *_, sms in found)


# NCCL -------------------------------------------------------------------------------------------------------------------


def nccl_beside(rank: int, size: int, group: dist.ProcessGroup) -> None:
    """Another thread sums tensors over NCCL all the while, on its own stream."""
    buffer = shared.buffer_of(group)
    other = dist.new_group(backend="nccl")
    expected = [pair(buffer, rank, size, seed) for seed in range(4)]
    dist.all_reduce(torch.zeros(1, device="cuda"), group=other)  # makes NCCL's communicator
    torch.cuda.synchronize()
    device, sums = torch.cuda.current_device(), []

    def traffic() -> None:
        torch.cuda.set_device(device)
        with torch.cuda.stream(torch.cuda.Stream()):
            for i in range(ROUNDS):
                t = torch.full((1 << 22,), float(rank + i), device="cuda")
                dist.all_reduce(t, group=other)
                sums.append((t == sum(range(size)) + size * i).all())
            torch.cuda.current_stream().synchronize()

    thread = threading.Thread(target=traffic)
    thread.start()
    for i in range(2 * ROUNDS):
        for got, want in zip(pair(buffer, rank, size, i % 4), expected[i % 4], strict=True):
            assert_same_bits(got, want)
    thread.join()
    assert len(sums) == ROUNDS
    assert all(bool(fits) for fits in sums)
    dist.destroy_process_group(other)


@pytest.mark.parametrize("connections", ["8", "32"])
def test_nccl_traffic_beside(connections: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 is CUDA's default: streams that share a hardware queue may wait for each other."""
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", connections)
    run_ranks(GPUS, nccl_beside, fresh=True, timeout=120)


def over_nccl(rank: int, size: int, group: dist.ProcessGroup, engine: str, backend: str) -> None:
    """The same bits, gradients included, as on CPUs over gloo; and errors that every rank hears of."""
    buffer = dt.Buffer(dist.new_group(backend=backend), num_nvl_bytes=32 << 20, engine=engine, timeout=30)
    collective = shared.buffer_of(group, "collective")
    for seed, layout in enumerate(("rank", "expert")):
        ours = step(buffer, "cuda", rank, size, seed, layout)
        theirs = step(collective, "cpu", rank, size, seed, layout)
        for a, b in zip(ours, theirs, strict=True):
            assert_same_bits(a, b, layout)
    x, idx, w = (t.cuda() for t in inputs(rank, size, 40))
    with pytest.raises(dt.ArgumentError, match=r"rank 1: topk_idx must lie in"):
        dt.dispatch(x, idx + (999 if rank == 1 else 0), w, buffer=buffer, num_experts=size * LOCAL_EXPERTS)
    buffer.destroy()


@pytest.mark.parametrize("backend", ["nccl", "cpu:gloo,cuda:nccl"])
@pytest.mark.parametrize("engine", ["nvlink", "collective"])
def test_over_nccl(engine: str, backend: str) -> None:
    run_ranks(GPUS, over_nccl, engine, backend, timeout=120)


# The current device -----------------------------------------------------------------------------------------------------


def elsewhere(rank: int, size: int, group: dist.ProcessGroup) -> None:
    """The buffer's work is ordered by the current stream of its own device, whichever device is current."""
    buffer, own = shared.buffer_of(group), shared.device_of(rank)
    x, idx, w = (t.cuda() for t in inputs(rank, size, 41))
    experts = size * LOCAL_EXPERTS

    def calls(late: Tensor) -> list[Any]:
        """Every call once, with rows that come late on the current stream."""
        results: list[Any] = []
        for layout in ("rank", "expert"):
            rows = late.clone().requires_grad_()
            out = dt.dispatch(rows, idx, w, buffer=buffer, num_experts=experts, layout=layout, alignment=4)
            y = buffer.empty_like(out.x).copy_(out.x)
            z = dt.combine(out.x * 2, out.handle)
            z.float().square().sum().backward()
            results += [out.x, out.topk_weights, z, dt.combine(y, out.handle), rows.grad]
        how = shared.layout_of(buffer, idx, experts)
        got, *_, handle, event = buffer.dispatch(late, **how, topk_idx=idx, topk_weights=w, async_finish=True)
        event.current_stream_wait()
        results.append(got.clone())
        z, _, event = buffer.combine(got, handle, async_finish=True)
        event.current_stream_wait()
        return [t.detach().clone() for t in (*results, z)]

    expected = calls(x)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    nothing = torch.zeros_like(x)
    for _ in range(3):
        with torch.cuda.stream(stream):
            late = nothing.clone()
            spin(20)
            late.copy_(x)
            with torch.cuda.device((own.index + 1) % GPUS):
                got = calls(late)
                assert buffer.get_comm_stream().device == own
        stream.synchronize()
        for a, b in zip(got, expected, strict=True):
            assert_same_bits(a, b)
    with torch.cuda.device((own.index + 1) % GPUS):
        other = dt.dispatch(x, idx, w, buffer=buffer, num_experts=experts)
        with pytest.raises(dt.ArgumentError, match="this engine's device"):
            dt.dispatch(x.to("cuda"), idx.to("cuda"), w.to("cuda"), buffer=buffer, num_experts=experts)
        del other
    buffer.check()


def test_the_current_device_is_not_the_buffers() -> None:
    run_ranks(GPUS, elsewhere, timeout=120)


def captured_elsewhere(rank: int, size: int, group: dist.ProcessGroup) -> None:
    """Full arenas, graphs and `destroy` while another device is current."""
    own = shared.device_of(rank)
    buffer = dt.Buffer(group, num_nvl_bytes=32 << 20, engine="nvlink", timeout=20)
    x, idx, w = (t.cuda() for t in inputs(rank, size, 42))
    out = dt.dispatch(x, idx, w, buffer=buffer, num_experts=size * LOCAL_EXPERTS)
    expected = dt.combine(dt.dispatch(x, buffer=buffer, handle=out.handle).x, out.handle)  # and every kernel is loaded
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream), torch.cuda.device((own.index + 1) % GPUS):
        again = dt.dispatch(x, buffer=buffer, handle=out.handle)
        z = dt.combine(again.x, out.handle)
    graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(again.x, out.x)
    assert_same_bits(z, expected)
    with torch.cuda.device((own.index + 1) % GPUS):
        kept = [buffer.empty((1 << 20,), torch.uint8) for _ in range(16)]
        del kept
        big = buffer.empty((34 << 20,), torch.uint8)  # of the heap's 48 MiB: needs back what torch has cached
        assert big.device == own
        del big
        buffer.destroy()


def test_graphs_and_memory_while_another_device_is_current() -> None:
    run_ranks(GPUS, captured_elsewhere, fresh=True, timeout=90)
