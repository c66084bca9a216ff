"""The nvlink engine among streams, graphs, gradients and full arenas; the ranks are processes."""

from __future__ import annotations

import gc
import hashlib
import os
import weakref

import pytest
import shared
import torch
import torch.distributed as dist
from harness import assert_same_bits
from shared import LOCAL_EXPERTS, TOKENS, inputs, run_ranks
from torch import Tensor

import deepep_train as dt


def small_buffer(group: dist.ProcessGroup, mib: int = 16, timeout: float = 10) -> dt.Buffer:
    return dt.Buffer(group, num_nvl_bytes=mib << 20, engine="nvlink", timeout=timeout)


def spin(milliseconds: float) -> None:
    torch.cuda._sleep(int(milliseconds * 1.7e6))


# Gradients --------------------------------------------------------------------------------------------------------------


def step(buffer: dt.Buffer, device: str, rank: int, size: int, seed: int, layout: str) -> list[Tensor]:
    x, idx, w = (t.to(device) for t in inputs(rank, size, seed, tokens=TOKENS - 7 * rank))
    x.requires_grad_()
    w.requires_grad_()
    out = dt.dispatch(x, idx, w, buffer=buffer, num_experts=size * LOCAL_EXPERTS, layout=layout, alignment=8)
    z = dt.combine(out.x * 1.5, out.handle, bias=x)
    (z.float() ** 2).sum().backward(retain_graph=True)
    (out.topk_weights**2).sum().backward()
    assert x.grad is not None
    assert w.grad is not None
    return [t.detach().cpu() for t in (out.x, out.topk_weights, z, x.grad, w.grad)]


def both_engines(rank: int, size: int, group: dist.ProcessGroup, layout: str, seeds: list[int]) -> None:
    nvlink, collective = shared.buffer_of(group), shared.buffer_of(group, "collective")
    for seed in seeds:
        ours = step(nvlink, "cuda", rank, size, seed, layout)
        theirs = step(collective, "cpu", rank, size, seed, layout)
        for a, b in zip(ours, theirs, strict=True):
            assert_same_bits(a, b, f"seed {seed}")


@pytest.mark.parametrize("layout", ["rank", "expert"])
@pytest.mark.parametrize("size", [2, 4])
def test_gradients_are_the_collective_engines(size: int, layout: str) -> None:
    run_ranks(size, both_engines, layout, [1, 2, 3], timeout=120)


def soak(rank: int, size: int, group: dist.ProcessGroup, pairs: int) -> tuple[str, str]:
    """Hashes of everything that came out, on both engines."""
    hashes = [hashlib.sha256(), hashlib.sha256()]
    buffers = [(shared.buffer_of(group), "cuda"), (shared.buffer_of(group, "collective"), "cpu")]
    for seed in range(pairs):
        g = torch.Generator().manual_seed(seed)
        tokens = int(torch.randint(0, 40, (size,), generator=g)[rank])
        x, idx, w = inputs(rank, size, seed, tokens, 64)
        layout = ("rank", "expert")[seed % 2]
        for digest, (buffer, device) in zip(hashes, buffers, strict=True):
            args = [t.to(device) for t in (x, idx, w)]
            out = dt.dispatch(*args, buffer=buffer, num_experts=size * LOCAL_EXPERTS, layout=layout, alignment=1 + seed % 5)
            z = dt.combine(out.x * out.x, out.handle)
            for t in (out.x, out.topk_weights, z):
                digest.update(t.cpu().view(torch.uint8).numpy().tobytes() if t.numel() else b"")
    return hashes[0].hexdigest(), hashes[1].hexdigest()


def test_soak_agrees_with_the_collective_engine() -> None:
    """DEEPEP_TRAIN_SOAK=2000 for the long one."""
    for ours, theirs in run_ranks(4, soak, int(os.environ.get("DEEPEP_TRAIN_SOAK", "200")), timeout=500):
        assert ours == theirs


def in_flight(rank: int, size: int, group: dist.ProcessGroup, engine: str, device: str) -> list[Tensor]:
    """Four layers, two micro-batches, forward passes interleaved with backward ones."""
    buffer = shared.buffer_of(group, engine)
    heads, leaves = [], []
    for micro_batch in range(2):
        h = inputs(rank, size, micro_batch, 32)[0].to(device).requires_grad_()
        leaves.append(h)
        for layer in range(4):
            idx = inputs(rank, size, 10 * micro_batch + layer, 32)[1].to(device)
            layout = ("rank", "expert")[(layer + micro_batch) % 2]
            out = dt.dispatch(h, idx, buffer=buffer, num_experts=size * LOCAL_EXPERTS, layout=layout)
            h = h + dt.combine(out.x * 0.5, out.handle)
        heads.append(h)
        if micro_batch == 1:
            heads[0].float().sum().backward()
    heads[1].float().sum().backward()
    return [t.grad.cpu() for t in leaves if t.grad is not None]


def test_layers_and_micro_batches_in_flight() -> None:
    ours, theirs = (run_ranks(2, in_flight, *how, timeout=120) for how in (("nvlink", "cuda"), ("collective", "cpu")))
    for a, b in zip(ours, theirs, strict=True):
        for x, y in zip(a, b, strict=True):
            assert_same_bits(x, y)


# Hazards ----------------------------------------------------------------------------------------------------------------


def overwrite_at_once(rank: int, size: int, group: dist.ProcessGroup) -> None:
    """Peers pull from y: the caller's stream must not pass the combine before they have."""
    buffer = shared.buffer_of(group)
    x, idx, w = (t.cuda() for t in inputs(rank, size, 5))
    out = dt.dispatch(x, idx, w, buffer=buffer, num_experts=size * LOCAL_EXPERTS)
    expected = dt.combine(out.x, out.handle)
    for late in range(size):
        y = buffer.empty_like(out.x)
        y.copy_(out.x)
        if rank == late:
            spin(30)
        z = dt.combine(y, out.handle)
        y.fill_(float("nan"))
        y.untyped_storage().resize_(0)
        assert_same_bits(z, expected, f"rank {late} was late")


def test_the_input_of_combine_may_be_overwritten_at_once() -> None:
    run_ranks(3, overwrite_at_once)


def slow_reader(rank: int, size: int, group: dist.ProcessGroup) -> None:
    """Memory that a slow kernel still reads is freed; the next dispatch, told to wait for nothing, must not land in it."""
    buffer = shared.buffer_of(group)
    x, idx, w = (t.cuda() for t in inputs(rank, size, 6))
    other = torch.full_like(x, 7.0)
    how = shared.layout_of(buffer, idx, size * LOCAL_EXPERTS)
    early = dt.Buffer.capture()
    kept = []
    for i in range(6):
        got, _, _, _, handle, event = buffer.dispatch(
            x, **how, topk_idx=idx, topk_weights=w, previous_event=early, async_finish=True
        )
        event.current_stream_wait()
        if rank == i % size:
            spin(20)
        kept.append(got.clone())
        del got
        again = buffer.dispatch(other, handle=handle, previous_event=early, async_finish=True)
        again[-1].current_stream_wait()
        del again
    for copy in kept:
        assert_same_bits(copy, kept[0])


def test_freed_memory_is_not_written_before_its_readers_are_done() -> None:
    run_ranks(2, slow_reader)


def two_buffers(rank: int, size: int, group: dist.ProcessGroup, opposite: bool = True) -> None:
    """Two buffers on two streams, in opposite order on odd ranks, or all in one order."""
    buffers = [dt.Buffer(group, num_nvl_bytes=16 << 20, engine="nvlink", timeout=20) for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in buffers]
    x, idx, w = (t.cuda() for t in inputs(rank, size, 7))
    outs = [dt.dispatch(x, idx, w, buffer=b, num_experts=size * LOCAL_EXPERTS) for b in buffers]
    expected = dt.combine(outs[0].x, outs[0].handle)
    torch.cuda.synchronize()
    for _ in range(20):
        results: dict[int, Tensor] = {}
        for i in (1, 0) if opposite and rank % 2 else (0, 1):
            with torch.cuda.stream(streams[i]):
                again = dt.dispatch(x, buffer=buffers[i], handle=outs[i].handle)
                results[i] = dt.combine(again.x, outs[i].handle)
        torch.cuda.synchronize()
        for z in results.values():
            assert_same_bits(z, expected)
    for buffer in buffers:
        buffer.destroy()


def test_two_buffers_in_opposite_order() -> None:
    run_ranks(2, two_buffers, timeout=90)


def sms(rank: int, size: int, group: dist.ProcessGroup) -> None:
    """A handle does not depend on the number of SMs; a call may ask for its own."""
    buffer = shared.buffer_of(group)
    x, idx, w = (t.cuda() for t in inputs(rank, size, 8))
    how = shared.layout_of(buffer, idx, size * LOCAL_EXPERTS)
    got, _, _, counts, handle, _ = buffer.dispatch(x, **how, topk_idx=idx, topk_weights=w, config=dt.Config(2))
    assert counts is not None
    z = buffer.combine(got, handle, config=dt.Config(6))[0]
    for n in (2, 4, 24):
        assert_same_bits(buffer.dispatch(x, handle=handle, config=dt.Config(n))[0], got)
        assert_same_bits(buffer.combine(got, handle, config=dt.Config(n))[0], z)
    assert_same_bits(buffer.combine(got, tuple(handle))[0], z, "a handle rebuilt from its tensors")


def test_sms_per_call() -> None:
    run_ranks(2, sms)


# Graphs -----------------------------------------------------------------------------------------------------------------


def graphs(rank: int, size: int, group: dist.ProcessGroup, layout: str, fresh: bool) -> None:
    buffer = dt.Buffer(group, num_nvl_bytes=32 << 20, engine="nvlink", timeout=20)
    shared.capture_and_replay(buffer, rank, size, group, layout, fresh)


@pytest.mark.parametrize("fresh", [False, True], ids=["cached", "num_worst_tokens"])
@pytest.mark.parametrize("layout", ["rank", "expert"])
def test_graphs_capture_and_replay(layout: str, fresh: bool) -> None:
    run_ranks(2, graphs, layout, fresh, timeout=90)


def misused_in_a_capture(rank: int, size: int, group: dist.ProcessGroup) -> None:
    """Arguments that only the engine finds wrong: their own text, at once, and the buffer goes on."""
    buffer = shared.buffer_of(group)
    x, idx, w = (t.cuda() for t in inputs(rank, size, 35))
    wide, weights = torch.full((x.size(0), 33), -1, device="cuda"), torch.zeros(x.size(0), 33, device="cuda")
    experts = size * LOCAL_EXPERTS
    expected = dt.dispatch(x, idx, w, buffer=buffer, num_experts=experts)
    torch.cuda.synchronize()
    for match, args, num_experts in (("top-32", (wide, weights), experts), ("4096 experts", (idx, w), 4100 * size)):
        with pytest.raises(dt.ArgumentError, match=match), torch.cuda.graph(torch.cuda.CUDAGraph()):
            dt.dispatch(x, *args, buffer=buffer, num_experts=num_experts, num_worst_tokens=2048)
    assert_same_bits(dt.dispatch(x, idx, w, buffer=buffer, num_experts=experts).x, expected.x)
    buffer.check()


def test_wrong_arguments_in_a_capture() -> None:
    run_ranks(2, misused_in_a_capture, fresh=True, timeout=60)


def along(buffer: dt.Buffer, x: Tensor, handle: dt.Handle) -> Tensor:
    return dt.combine(dt.dispatch(x, buffer=buffer, handle=handle).x, handle)


def dropped(rank: int, size: int, group: dist.ProcessGroup) -> None:
    """A graph outlives a buffer that was dropped without `destroy`: its replays touch no peer and give NaN."""
    buffer = small_buffer(group)
    x, idx, w = (t.cuda() for t in inputs(rank, size, 36))
    handle = dt.dispatch(x, idx, w, buffer=buffer, num_experts=size * LOCAL_EXPERTS).handle
    expected = along(buffer, x, handle)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z = along(buffer, x, handle)
    graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(z, expected)
    gone = weakref.ref(buffer._engine)
    del buffer, handle
    gc.collect()
    assert gone() is None, "something keeps the buffer, so this test shows nothing"
    torch.cuda.synchronize()
    dist.barrier(group)
    if rank == 0:  # alone
        graph.replay()
        torch.cuda.synchronize()
        assert z.isnan().all()


def test_a_graph_of_a_buffer_that_was_dropped() -> None:
    run_ranks(2, dropped, fresh=True, timeout=60)


# Memory -----------------------------------------------------------------------------------------------------------------


def small_arena(rank: int, size: int, group: dist.ProcessGroup) -> dict[str, int]:
    """More received tensors alive than the arena holds: staging takes over, with the same bits."""
    from deepep_train import engines

    engines.DEFAULT_ARENA_BYTES = 48 << 20
    buffer = dt.Buffer(group, engine="nvlink", timeout=20)
    x, idx, w = (t.cuda() for t in inputs(rank, size, 13, 2000))
    outs = [
        dt.dispatch(x, idx, w, buffer=buffer, num_experts=size * LOCAL_EXPERTS, layout=("rank", "expert")[i % 2])
        for i in range(24)
    ]
    zs = [dt.combine(o.x, o.handle) for o in outs]
    for out, z in zip(outs, zs, strict=True):
        first = outs[0] if out.topk_idx is not None else outs[1]
        assert_same_bits(out.x, first.x)
        assert_same_bits(z, zs[0] if first is outs[0] else zs[1])
    stats = buffer.memory_stats()
    assert stats["tensors staged"] > 0
    tail = outs[-1].x
    kept = tail.clone()
    buffer.destroy()
    assert_same_bits(tail, kept, "a tensor that outlives its buffer")
    # Too small even for one operation: an error that says how large it must be, on every rank.
    buffer = dt.Buffer(group, engine="nvlink", timeout=20)
    big = torch.zeros(40000, 512, dtype=torch.bfloat16, device="cuda")
    everywhere = torch.zeros(40000, 1, dtype=torch.int64, device="cuda")
    if rank == 0:
        with pytest.raises(dt.DeepEPError, match="num_nvl_bytes="):
            dt.dispatch(big, everywhere, buffer=buffer, num_experts=size)
    else:
        dt.dispatch(big, everywhere, buffer=buffer, num_experts=size)
    torch.cuda.synchronize()
    with pytest.raises(dt.DeepEPError, match="rank 0 refused"):
        buffer.check()
    return stats


def test_a_full_arena_falls_back_to_staging_and_then_says_so() -> None:
    run_ranks(2, small_arena, fresh=True, timeout=120)


# Wrong arguments --------------------------------------------------------------------------------------------------------


def misuse(rank: int, size: int, group: dist.ProcessGroup) -> None:
    buffer = shared.buffer_of(group)
    x, idx, w = (t.cuda() for t in inputs(rank, size, 14))
    experts = size * LOCAL_EXPERTS
    with pytest.raises(dt.ArgumentError, match=r"rank 1: topk_idx must lie in"):
        dt.dispatch(x, idx + (999 if rank == 1 else 0), w, buffer=buffer, num_experts=experts)
    with pytest.raises(dt.ArgumentError, match="hidden"):
        dt.dispatch(x[:, : 64 + 8 * rank].contiguous(), idx, w, buffer=buffer, num_experts=experts)
    with pytest.raises(dt.ArgumentError, match="multiple of 16 bytes"):
        dt.dispatch(x[:, :9].contiguous(), idx, w, buffer=buffer, num_experts=experts)
    out = dt.dispatch(x, idx, w, buffer=buffer, num_experts=experts)
    again = dt.dispatch(x, buffer=buffer, handle=out.handle)
    torch.cuda.synchronize()
    assert_same_bits(again.x, out.x)
    # The counts V1 users pass must be those of is_token_in_rank.
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, experts)
    with pytest.raises(dt.ArgumentError, match="num_tokens_per_rank"):
        buffer.dispatch(x, num_tokens_per_rank=per_rank + rank, num_tokens_per_expert=per_expert, is_token_in_rank=in_rank)
    buffer.check()


def test_wrong_arguments_raise_on_every_rank() -> None:
    run_ranks(2, misuse, timeout=60)


def device_failures(rank: int, size: int, group: dist.ProcessGroup) -> None:
    """Ranks in different calls, too few worst tokens, an index that no CPU sees: the kernels end, results are NaN, the buffer
    says why, also to those who hear it from others."""
    x, idx, w = (t.cuda() for t in inputs(rank, size, 15))
    experts = size * LOCAL_EXPERTS
    buffer = dt.Buffer(group, num_nvl_bytes=16 << 20, engine="nvlink", timeout=5)
    out = dt.dispatch(x, idx, w, buffer=buffer, num_experts=experts)
    got = dt.dispatch(x, buffer=buffer, handle=out.handle).x if rank == 0 else dt.combine(out.x, out.handle)
    torch.cuda.synchronize()
    assert got.isnan().all()
    with pytest.raises(dt.DeepEPError, match="in another call") as told:
        buffer.check()
    assert type(told.value) is dt.DeepEPError
    with pytest.raises(dt.DeepEPError):
        buffer.destroy()
    buffer = dt.Buffer(group, num_nvl_bytes=16 << 20, engine="nvlink", timeout=5)
    out = dt.dispatch(x, idx, w, buffer=buffer, num_experts=experts, num_worst_tokens=3)
    torch.cuda.synchronize()
    assert out.x.isnan().all()
    assert not out.tokens_per_expert.any(), "what follows would read beyond x"
    with pytest.raises(dt.ArgumentError, match="num_worst_tokens=3 but"):
        buffer.check()
    with pytest.raises(dt.DeepEPError):
        buffer.destroy()
    buffer = dt.Buffer(group, num_nvl_bytes=16 << 20, engine="nvlink", timeout=5)
    out = dt.dispatch(x, idx + experts * (rank == 1), w, buffer=buffer, num_experts=experts, num_worst_tokens=4096)
    torch.cuda.synchronize()
    assert out.x.isnan().all()
    with pytest.raises(dt.ArgumentError, match="topk_idx of rank 1 has an index outside") as wrong:
        buffer.check()
    assert wrong.value.argument == "topk_idx" and list(wrong.value.ranks) == [1]
    with pytest.raises(dt.DeepEPError):
        buffer.destroy()


@pytest.mark.parametrize("size", [2, 4])
def test_failures_on_the_device_are_told(size: int) -> None:
    run_ranks(size, device_failures, timeout=90)


def moe_layer(rank: int, size: int, group: dist.ProcessGroup, engine: str, device: str) -> list[Tensor]:
    from deepep_train import moe

    torch.manual_seed(3)
    buffer = shared.buffer_of(group, engine)
    layer = moe.MoELayer(64, 128, num_experts=size * 2, top_k=2, buffer=buffer).to(device)
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(rank)).to(device).requires_grad_()
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    y.square().sum().backward()
    assert x.grad is not None
    return [y.detach().cpu(), x.grad.cpu()]


def test_moe_layer_with_activation_checkpointing() -> None:
    ours, theirs = (run_ranks(2, moe_layer, *how, timeout=120) for how in (("nvlink", "cuda"), ("collective", "cpu")))
    for a, b in zip(ours, theirs, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def auto(rank: int, size: int, group: dist.ProcessGroup) -> str:
    buffer = dt.Buffer(group, num_nvl_bytes=1 << 20)
    name = buffer.engine
    buffer.destroy()
    return name


def test_auto_takes_nvlink() -> None:
    assert run_ranks(2, auto) == ["nvlink"] * 2
