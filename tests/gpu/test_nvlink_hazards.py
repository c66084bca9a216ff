"""What a review of the nvlink engine's protocol found, one test each; docs/kernels.md has the arguments."""

from __future__ import annotations

import gc
import threading
import time
from typing import Any

import pytest
import shared
import torch
import torch.distributed as dist
from harness import assert_same_bits
from shared import LOCAL_EXPERTS, inputs, run_ranks
from test_nvlink_streams import small_buffer, spin, two_buffers
from torch import Tensor

import deepep_train as dt
from deepep_train import engines
from deepep_train.engines import arena


def fails(buffer: dt.Buffer, match: str) -> None:
    """The buffer says why it is broken, whichever way it is asked."""
    torch.cuda.synchronize()
    with pytest.raises(dt.DeepEPError, match=match):
        buffer.check()
    with pytest.raises(dt.DeepEPError, match=match):
        buffer.destroy()


# Failures ---------------------------------------------------------------------------------------------------------------


def overflow(rank: int, size: int, group: dist.ProcessGroup, pair: bool) -> None:
    """Too few worst tokens in expert layout: everything is NaN, the scales too. (Writes behind the tables are memcheck's.)"""
    x, idx, w = (t.cuda() for t in inputs(rank, size, 15))
    buffer = small_buffer(group)
    payload: Any = (x.to(torch.float8_e4m3fn), torch.ones(x.size(0), 4, device="cuda")) if pair else x
    out = dt.dispatch(
        payload, idx, w, buffer=buffer, num_experts=size * LOCAL_EXPERTS, layout="expert", alignment=4, num_worst_tokens=3
    )
    torch.cuda.synchronize()
    for t in out.x if pair else (out.x,):
        assert t.float().isnan().all()
    fails(buffer, "num_worst_tokens=3 but")


@pytest.mark.parametrize("pair", [False, True], ids=["bf16", "fp8"])
def test_overflow_in_expert_layout(pair: bool) -> None:
    run_ranks(2, overflow, pair, timeout=60)


def mixed_bounds(rank: int, size: int, group: dist.ProcessGroup) -> None:
    x, idx, w = (t.cuda() for t in inputs(rank, size, 16))
    buffer = small_buffer(group)
    how: dict[str, Any] = {"buffer": buffer, "num_experts": size * LOCAL_EXPERTS}
    if rank == 0:
        out = dt.dispatch(x, idx, w, num_worst_tokens=1000, **how)
        torch.cuda.synchronize()
        assert out.x.isnan().all()
    else:
        with pytest.raises(dt.ArgumentError, match="differ"):
            dt.dispatch(x, idx, w, **how)
    fails(buffer, "differ")


def test_some_ranks_give_a_bound_and_others_do_not() -> None:
    run_ranks(2, mixed_bounds, timeout=60)


def fresh_against_cached(rank: int, size: int, group: dist.ProcessGroup) -> None:
    x, idx, w = (t.cuda() for t in inputs(rank, size, 17))
    buffer = small_buffer(group, timeout=1000)  # nobody may wait for the deadline
    how: dict[str, Any] = {"buffer": buffer, "num_experts": size * LOCAL_EXPERTS}
    out = dt.dispatch(x, idx, w, **how)
    if rank == 0:
        with pytest.raises(dt.DeepEPError, match=r"in another call|gave up"):
            dt.dispatch(x, idx, w, **how)
    else:
        assert dt.dispatch(x, buffer=buffer, handle=out.handle).x.shape == out.x.shape
    fails(buffer, "in another call|gave up")


def test_a_fresh_dispatch_against_a_cached_one() -> None:
    run_ranks(2, fresh_against_cached, timeout=60)


def refusal(rank: int, size: int, group: dist.ProcessGroup) -> None:
    """Wrong arguments of a cached call: on every rank, nothing has happened; on one, the buffer is lost on all."""
    x, idx, w = (t.cuda() for t in inputs(rank, size, 18))
    buffer = small_buffer(group)
    out = dt.dispatch(x, idx, w, buffer=buffer, num_experts=size * LOCAL_EXPERTS)
    with pytest.raises(dt.ArgumentError, match="x must be"):
        dt.dispatch(x[:-1], buffer=buffer, handle=out.handle)
    again = dt.dispatch(x, buffer=buffer, handle=out.handle)
    torch.cuda.synchronize()
    assert_same_bits(again.x, out.x)
    if rank == 0:
        with pytest.raises(dt.ArgumentError, match="x must be"):
            dt.dispatch(x[:-1], buffer=buffer, handle=out.handle)
    else:
        nothing = dt.dispatch(x, buffer=buffer, handle=out.handle)
        torch.cuda.synchronize()
        assert nothing.x.isnan().all()
    fails(buffer, "rank 0 refused to take part")


def test_wrong_arguments_of_a_cached_call() -> None:
    run_ranks(2, refusal, timeout=60)


def unexpected(rank: int, size: int, group: dist.ProcessGroup) -> None:
    """Errors that nobody foresaw, before and after the counts: no rank waits for the deadline."""
    x, idx, w = (t.cuda() for t in inputs(rank, size, 19))
    how: dict[str, Any] = {"num_experts": size * LOCAL_EXPERTS}
    for name in ("_ints", "_rows"):
        buffer = small_buffer(group, timeout=1000)
        if rank == 0:

            def raises(*_: Any) -> None:
                raise torch.OutOfMemoryError("made up")

            setattr(buffer._engine, name, raises)
            with pytest.raises(torch.OutOfMemoryError, match="made up"):
                dt.dispatch(x, idx, w, buffer=buffer, **how)
        elif name == "_ints":
            with pytest.raises(dt.ArgumentError, match="made up"):
                dt.dispatch(x, idx, w, buffer=buffer, **how)
        else:
            out = dt.dispatch(x, idx, w, buffer=buffer, **how)
            torch.cuda.synchronize()
            assert out.x.isnan().all()
        if name == "_ints":
            buffer.check()
            buffer.destroy()
        else:
            fails(buffer, "rank 0 refused")
    buffer = small_buffer(group)
    with pytest.raises(dt.ArgumentError, match="alignment"):
        dt.dispatch(x, idx, w, buffer=buffer, layout="expert", alignment=1 << 33, **how)
    buffer.destroy()


def test_unexpected_errors_reach_every_rank() -> None:
    run_ranks(2, unexpected, timeout=90)


# Memory -----------------------------------------------------------------------------------------------------------------


def dying_handles(rank: int, size: int, group: dist.ProcessGroup) -> None:
    """A handle dies, and its memory is written to, while an asynchronous call that uses it has not run."""
    buffer = shared.buffer_of(group)
    x, idx, w = (t.cuda() for t in inputs(rank, size, 20))
    experts = size * LOCAL_EXPERTS
    expected = None
    for _ in range(6):
        layout = shared.layout_of(buffer, idx, experts)
        got, *_, handle, event = buffer.dispatch(x, **layout, topk_idx=idx, topk_weights=w)
        del layout, event  # made on this stream, where `trash` is made, and used on the other
        comm = buffer.get_comm_stream()
        comm.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(comm):
            spin(5)
        again, *_, one = buffer.dispatch(x, handle=handle, async_finish=True)
        z, _, two = buffer.combine(got, handle, async_finish=True)
        del handle, _
        trash = [
            torch.full((n,), 1 << 20, dtype=torch.int32, device="cuda") for n in (1, 8, 64, 200, 400, 800) for _ in range(9)
        ]
        one.current_stream_wait()
        two.current_stream_wait()
        torch.cuda.synchronize()
        assert_same_bits(again, got)
        expected = z if expected is None else expected
        assert_same_bits(z, expected)
        del trash


def test_handles_may_die_before_the_calls_that_use_them_run() -> None:
    run_ranks(2, dying_handles, timeout=60)


def callers_pool(rank: int, size: int, group: dist.ProcessGroup) -> None:
    """The caller's own memory pool is around the call."""
    buffer = shared.buffer_of(group)
    x, idx, w = (t.cuda() for t in inputs(rank, size, 21))
    how: dict[str, Any] = {"buffer": buffer, "num_experts": size * LOCAL_EXPERTS}
    first = dt.dispatch(x, idx, w, **how)
    z = dt.combine(first.x, first.handle)
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        out = dt.dispatch(x, idx, w, **how)
        y = buffer.empty_like(out.x)
        y.copy_(out.x)
        assert_same_bits(dt.combine(y, out.handle), z)
    assert_same_bits(out.x, first.x)


def test_inside_the_callers_memory_pool() -> None:
    run_ranks(2, callers_pool, timeout=60)


def in_use(rank: int, size: int, group: dist.ProcessGroup, during: str) -> None:
    """Buffers that nobody has any more may be found by the garbage collector at any time, and the arena may run full at any:
    torch's pools must not be destroyed while one is in use, or a graph is being captured, which ends the process."""
    buffer, dead = small_buffer(group), small_buffer(group)
    x, idx, w = (t.cuda() for t in inputs(rank, size, 12))
    how: dict[str, Any] = {"buffer": buffer, "num_experts": size * LOCAL_EXPERTS}
    first = dt.dispatch(x, idx, w, **how)
    memory = buffer._engine._arena
    dt.dispatch(x, idx, w, buffer=dead, num_experts=size * LOCAL_EXPERTS)
    cycle: list[Any] = [dead]
    cycle.append(cycle)
    del dead, cycle
    if during == "the caller's pool":
        with torch.cuda.use_mem_pool(torch.cuda.MemPool()):
            memory._rotate()
            gc.collect()
    elif during == "its own":
        with memory._allocating():
            gc.collect()
    else:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            gc.collect()
            torch.zeros(1, device="cuda")
    assert_same_bits(dt.dispatch(x, idx, w, **how).x, first.x)


@pytest.mark.parametrize("during", ["its own", "the caller's pool", "a capture"])
def test_pools_are_in_use(during: str) -> None:
    run_ranks(2, in_use, during, fresh=True, timeout=60)


def short_of_memory(rank: int, size: int, group: dist.ProcessGroup) -> None:
    """While rank 0 waits for rank 1's counts, another of its threads asks for more memory than is free, and torch has cached
    enough."""
    buffer = small_buffer(group, timeout=60)
    x, idx, w = (t.cuda() for t in inputs(rank, size, 24))
    how: dict[str, Any] = {"buffer": buffer, "num_experts": size * LOCAL_EXPERTS}
    expected = dt.dispatch(x, idx, w, **how)
    torch.cuda.synchronize()
    dist.barrier(group)
    if rank == 1:
        time.sleep(8)
        dt.dispatch(x, idx, w, **how)
        return
    cached, seen = threading.Event(), []

    def run_short() -> None:
        try:
            free = torch.cuda.mem_get_info()[0]
            t = torch.empty(int(free * 0.6), dtype=torch.uint8, device="cuda")
            del t
            cached.set()
            time.sleep(2)  # the other thread waits by now
            seen.append(time.monotonic())
            t = torch.empty(int(free * 0.8), dtype=torch.uint8, device="cuda")  # CUDA may give memory back only behind the wait
            seen.append(t.numel())
        except BaseException as error:  # noqa: BLE001 - raised below
            seen.append(error)

    thread = threading.Thread(target=run_short)
    thread.start()
    assert cached.wait(30), seen
    out = dt.dispatch(x, idx, w, **how)
    came = time.monotonic()
    thread.join()
    torch.cuda.empty_cache()
    if isinstance(seen[-1], BaseException):
        raise seen[-1]
    assert seen[0] < came, "the dispatch did not wait, so this test shows nothing"
    assert_same_bits(out.x, expected.x)


def test_a_wait_for_counts_keeps_no_memory_from_other_threads() -> None:
    run_ranks(2, short_of_memory, fresh=True, timeout=90)


def too_large(rank: int, size: int, group: dist.ProcessGroup) -> None:
    """`empty` says what it is about: no staging, and a size that does."""
    buffer = small_buffer(group)
    have = buffer.memory_stats()["arena"]
    with pytest.raises(dt.DeepEPError, match=f"a tensor of {have} bytes does not fit") as caught:
        buffer.empty((have,), torch.uint8)
    assert "staging" not in str(caught.value)
    buffer.destroy()
    needed = int(str(caught.value).partition("num_nvl_bytes=")[2].split()[0])
    buffer = dt.Buffer(group, num_nvl_bytes=needed, engine="nvlink", timeout=20)
    assert buffer.empty((have,), torch.uint8).numel() == have
    buffer.destroy()


def test_a_tensor_too_large_for_the_arena() -> None:
    run_ranks(2, too_large, fresh=True, timeout=60)


def growing(rank: int, size: int, group: dist.ProcessGroup) -> dict[str, int]:
    """Ever larger tensors, one alive at a time: what torch caches of the smaller ones does not fill the arena, if it is taken
    back at once."""
    engines.DEFAULT_ARENA_BYTES = 48 << 20
    arena._TAKE_BACK_AFTER = 0
    buffer = small_buffer(group, 48)
    for tokens in range(2000, 12000, 500):
        x = torch.full((tokens, 512), float(tokens % 251), dtype=torch.bfloat16, device="cuda")
        idx = torch.full((tokens, 1), rank, device="cuda")
        with torch.cuda.stream(torch.cuda.Stream()) if tokens % 1000 else torch.cuda.stream(torch.cuda.current_stream()):
            out = dt.dispatch(x, idx, buffer=buffer, num_experts=size)
            torch.cuda.synchronize()
        assert out.x.size(0) == tokens
        assert (out.x == float(tokens % 251)).all()
        del out
    stats = buffer.memory_stats()
    assert stats["tensors staged"] == 0, stats
    buffer.destroy()
    return stats


def test_growing_sizes_do_not_fill_the_arena() -> None:
    run_ranks(2, growing, fresh=True, timeout=90)


def in_the_way(rank: int, size: int, group: dist.ProcessGroup) -> None:
    """What torch caches for one stream is no room on another: rows are copied out of staging until that has cost as much as
    taking the cache back does, and not again afterwards. Nor is it taken back while many tensors live."""
    engines.DEFAULT_ARENA_BYTES = 96 << 20  # 72 for tensors, 24 staging
    buffer = small_buffer(group, 96)
    x = torch.randn(19 << 10, 512, device="cuda").to(torch.bfloat16)
    idx = torch.full((19 << 10, 1), rank, device="cuda")

    def received() -> Tensor:
        out = dt.dispatch(x, idx, buffer=buffer, num_experts=size)
        assert_same_bits(out.x, x)
        return out.x

    def stats() -> tuple[int, int]:
        found = buffer.memory_stats()
        return found["tensors staged"], found["caches taken back"]

    other = torch.cuda.Stream()
    with torch.cuda.stream(other):
        kept = [received() for _ in range(3)]
    torch.cuda.synchronize()
    assert stats() == (0, 0)
    for _ in range(80):  # twice as much as is due
        received()
    assert stats() == (80, 0)
    del kept
    received()
    assert stats() == (80, 1)
    for _ in range(80):
        received()
    assert stats() == (80, 1)
    buffer.check()
    buffer.destroy()


def test_torchs_cache_is_taken_back_when_that_is_due() -> None:
    run_ranks(2, in_the_way, fresh=True, timeout=60)


def uncounted(rank: int, size: int, group: dist.ProcessGroup) -> None:
    """Memory that Megatron takes back with `resize_`, which no death of a tensor tells of, is found again before a refusal."""
    engines.DEFAULT_ARENA_BYTES = 48 << 20  # a quarter is staging
    buffer = small_buffer(group, 48)
    kept = []
    for mib in (14, 14, 11, 14):  # two fit, the third finds the arena full and is staged, the fourth is too large for staging
        x = torch.randn(mib << 10, 512, device="cuda").to(torch.bfloat16)
        idx = torch.full((mib << 10, 1), rank, device="cuda")
        out = dt.dispatch(x, idx, buffer=buffer, num_experts=size)
        assert_same_bits(out.x, x)
        kept.append(out.x)
        torch.cuda.synchronize()
        if mib == 11:
            assert buffer.memory_stats()["tensors staged"] == 1
            for t in kept:
                t.untyped_storage().resize_(0)
    buffer.check()
    buffer.destroy()


def test_memory_given_back_by_resizing_is_found_again() -> None:
    run_ranks(2, uncounted, fresh=True, timeout=90)


def patient(rank: int, size: int, group: dist.ProcessGroup) -> None:
    """A timeout beyond what a 64-bit count of nanoseconds holds is a long one, not none."""
    buffer = dt.Buffer(group, num_nvl_bytes=16 << 20, engine="nvlink", timeout=1e11)
    x, idx, w = (t.cuda() for t in inputs(rank, size, 23))
    out = dt.dispatch(x, idx, w, buffer=buffer, num_experts=size * LOCAL_EXPERTS)
    assert dt.combine(out.x, out.handle).shape == x.shape
    buffer.destroy()


def test_a_timeout_of_a_thousand_years() -> None:
    run_ranks(2, patient)


def lost_plan(rank: int, size: int, group: dist.ProcessGroup) -> None:
    """A handle rebuilt from its tensors after num_worst_tokens keeps the zero rows at the end."""
    buffer = shared.buffer_of(group)
    x, idx, w = (t.cuda() for t in inputs(rank, size, 22))
    layout = shared.layout_of(buffer, idx, size * LOCAL_EXPERTS)
    got, *_, handle, _ = buffer.dispatch(x, **layout, topk_idx=idx, topk_weights=w, num_worst_tokens=700)
    again = buffer.dispatch(x, handle=tuple(handle))[0]
    assert_same_bits(again, got)
    assert_same_bits(buffer.combine(got, tuple(handle))[0], buffer.combine(got, handle)[0])


def test_a_rebuilt_handle_keeps_the_tail() -> None:
    run_ranks(2, lost_plan, timeout=60)


def test_one_hardware_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Megatron sets. (Two buffers in opposite order wait for each other then, as any kernels that wait for peers would:
    the second call of one stream stands in the queue before the first call of the other. The deadline ends it.)"""
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    run_ranks(2, dying_handles, fresh=True, timeout=90)
    run_ranks(2, two_buffers, False, fresh=True, timeout=90)
