"""The nvlink engine in a program that does other things as well: other collectives, threads, allocators, autograd's modes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
import shared
import torch
import torch.distributed as dist
from draws import Exchange
from harness import assert_same_bits
from shared import LOCAL_EXPERTS, inputs, run_ranks
from test_in_flight import SCHEDULES, interleaved, one_at_a_time
from test_nvlink import check
from torch import Tensor

import deepep_train as dt

ROUNDS = 40


def pair(buffer: dt.Buffer, rank: int, size: int, seed: int) -> list[Tensor]:
    """What a dispatch and a combine give."""
    x, idx, w = (t.cuda() for t in inputs(rank, size, seed))
    layout = ("rank", "expert")[seed % 2]
    out = dt.dispatch(x, idx, w, buffer=buffer, num_experts=size * LOCAL_EXPERTS, layout=layout, alignment=4)
    return [out.x, dt.combine(out.x * 2, out.handle)]


def on_this_gpu(work: Callable[..., None]) -> Callable[..., None]:
    """For a thread, which begins on GPU 0."""
    device = torch.cuda.current_device()

    def run(*args: Any) -> None:
        torch.cuda.set_device(device)
        work(*args)

    return run


def gloo_beside(rank: int, size: int, group: dist.ProcessGroup) -> None:
    """Another thread sums CUDA tensors over gloo all the while, on its own stream. (NCCL refuses ranks that share a GPU.)"""
    buffer = shared.buffer_of(group)
    other = dist.new_group(backend="gloo")
    expected = [pair(buffer, rank, size, seed) for seed in range(4)]
    sums: list[Tensor] = []

    def traffic() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for i in range(ROUNDS):
                t = torch.full((1 << 16,), float(rank + i), device="cuda")
                dist.all_reduce(t, group=other)
                sums.append(t)
            torch.cuda.current_stream().synchronize()

    thread = threading.Thread(target=on_this_gpu(traffic))
    thread.start()
    for i in range(ROUNDS):
        for got, want in zip(pair(buffer, rank, size, i % 4), expected[i % 4], strict=True):
            assert_same_bits(got, want)
    thread.join()
    assert len(sums) == ROUNDS
    for i, t in enumerate(sums):
        assert (t == sum(range(size)) + size * i).all()


def test_gloo_traffic_beside() -> None:
    run_ranks(3, gloo_beside, timeout=120)


def two_threads(rank: int, size: int, group: dist.ProcessGroup) -> None:
    """Two threads take turns on one buffer, each on its own stream; nothing but the order of the calls is common. A third one
    makes, all the while, the calls that ask no other rank."""
    buffer = shared.buffer_of(group)
    expected = [pair(buffer, rank, size, seed) for seed in range(4)]
    torch.cuda.synchronize()
    turn, errors = threading.Condition(), []
    done: list[int] = []

    def work(me: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for i in range(me, ROUNDS, 2):
                    with turn:
                        assert turn.wait_for(lambda i=i: len(done) == i, 60)
                    got = pair(buffer, rank, size, i % 4)
                    with turn:
                        done.append(i)
                        turn.notify_all()
                    for a, b in zip(got, expected[i % 4], strict=True):
                        assert_same_bits(a, b)
        except BaseException as error:
            errors.append(error)
            raise

    over, asked = threading.Event(), []
    picks = torch.arange(12, device="cuda").view(4, 3) % (2 * size)
    counts = buffer.get_dispatch_layout(picks, 2 * size)[2]
    torch.cuda.synchronize()

    def ask() -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                while not over.is_set():
                    kept = buffer.empty((64, 32), torch.int32).fill_(len(asked))
                    assert torch.equal(buffer.get_dispatch_layout(picks, 2 * size)[2], counts)
                    assert bool((kept == len(asked)).all())
                    asked.append(buffer.memory_stats()["arena used"])
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=on_this_gpu(work), args=(me,)) for me in (0, 1)]
    beside = threading.Thread(target=on_this_gpu(ask))
    for thread in (*threads, beside):
        thread.start()
    for thread in threads:
        thread.join()
    over.set()
    beside.join()
    assert not errors, errors
    assert asked and min(asked) > 0


def test_two_threads_on_one_buffer() -> None:
    run_ranks(2, two_threads, timeout=120)


def a_buffer_each(rank: int, size: int, group: dist.ProcessGroup) -> None:
    """Two threads with a buffer and a stream each, in no common order at all."""
    buffers = [dt.Buffer(group, num_nvl_bytes=16 << 20, engine="nvlink", timeout=20) for _ in range(2)]
    dt.Buffer.set_num_sms(4)  # both buffers' kernels must fit on the GPU together
    expected = [pair(buffers[0], rank, size, seed) for seed in range(4)]
    torch.cuda.synchronize()
    errors: list[BaseException] = []

    def work(buffer: dt.Buffer) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for i in range(ROUNDS):
                    for a, b in zip(pair(buffer, rank, size, i % 4), expected[i % 4], strict=True):
                        assert_same_bits(a, b)
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=on_this_gpu(work), args=(buffer,)) for buffer in buffers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    for buffer in buffers:
        buffer.destroy()


def test_two_threads_with_a_buffer_each() -> None:
    run_ranks(2, a_buffer_each, fresh=True, timeout=120)


def recomputed(rank: int, size: int, group: dist.ProcessGroup, layout: str) -> None:
    """Activation checkpointing: the recomputed rows are the first ones, bit for bit."""
    buffer = shared.buffer_of(group)
    x, idx, w = (t.cuda() for t in inputs(rank, size, 31))
    x.requires_grad_()
    w.requires_grad_()
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def block(x: Tensor, w: Tensor) -> Tensor:
        how: dict[str, Any] = {"num_experts": size * LOCAL_EXPERTS, "layout": layout, "alignment": 8}
        out = dt.dispatch(x, idx, w, buffer=buffer, **how)
        z = dt.combine(out.x * out.x, out.handle)  # a product saves its factors, for which all is computed again
        seen.append((out.x.detach().clone(), out.topk_weights.detach().clone(), z.detach().clone()))
        return z + out.topk_weights.sum()

    with torch.utils.checkpoint.set_checkpoint_early_stop(False):  # else the recomputation ends before the last line
        z = torch.utils.checkpoint.checkpoint(block, x, w, use_reentrant=False)
    z.float().square().sum().backward()
    assert len(seen) == 2
    for first, again in zip(*seen, strict=True):
        assert_same_bits(again, first)


@pytest.mark.parametrize("layout", ["rank", "expert"])
def test_recomputed_rows_are_the_first_ones(layout: str) -> None:
    run_ranks(2, recomputed, layout)


def test_expandable_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    run_ranks(2, recomputed, "expert", fresh=True, timeout=90)
    run_ranks(2, two_threads, fresh=True, timeout=120)


def without_autograd(rank: int, size: int, group: dist.ProcessGroup) -> None:
    """Fresh routing, both of V1's ways to pass it on, a second dispatch and a combine, under inference_mode and no_grad."""
    buffer = shared.buffer_of(group)
    x, idx, w = (t.cuda() for t in inputs(rank, size, 32))
    results = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            layout = shared.layout_of(buffer, idx, size * LOCAL_EXPERTS)
            got, *_, handle, _ = buffer.dispatch(x, **layout, topk_idx=idx, topk_weights=w)
            again = buffer.dispatch(x, handle=handle)[0]
            out = dt.dispatch(x, idx, w, buffer=buffer, num_experts=size * LOCAL_EXPERTS, layout="expert", alignment=4)
            results.append([got, again, buffer.combine(got, handle)[0], out.x, dt.combine(out.x, out.handle)])
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)
    assert_same_bits(results[0][0], results[0][1])


def test_inference_mode_gives_what_no_grad_gives() -> None:
    run_ranks(2, without_autograd)


def schedules(rank: int, size: int, group: dist.ProcessGroup, given: list[str]) -> None:
    buffer = shared.buffer_of(group)
    expected = one_at_a_time(rank, size, group, buffer)
    for schedule in given:
        got = interleaved(rank, size, group, schedule, buffer)
        for a, b in zip(chain(*got), chain(*expected), strict=True):
            assert_same_bits(a, b, schedule)


def test_forward_and_backward_passes_interleave() -> None:
    run_ranks(3, schedules, SCHEDULES, timeout=120)


def bad_routing(rank: int, size: int, group: dist.ProcessGroup) -> None:
    """Indices out of range are found also where the layout has lost the kernel's own check, and too wide a top-k is refused."""
    buffer = shared.buffer_of(group)
    x, idx, w = (t.cuda() for t in inputs(rank, size, 33))
    wrong = idx.clone()
    if rank == 1:
        wrong[0, 0] = 999
    for mode, copied in ((torch.inference_mode, False), (torch.no_grad, False), (torch.no_grad, True)):
        with mode():
            layout = shared.layout_of(buffer, wrong, size * LOCAL_EXPERTS)
            if copied:
                layout["is_token_in_rank"] = layout["is_token_in_rank"].clone()
            with pytest.raises(dt.ArgumentError, match=r"rank 1: topk_idx must lie in"):
                buffer.dispatch(x, **layout, topk_idx=wrong, topk_weights=w)
    layout = shared.layout_of(buffer, idx, size * LOCAL_EXPERTS)
    wide = torch.full((x.size(0), 40), -1, device="cuda")
    with pytest.raises(dt.ArgumentError, match="top-32"):
        buffer.dispatch(x, **layout, topk_idx=wide, topk_weights=torch.zeros(wide.shape, device="cuda"))
    buffer.check()


def test_bad_routing_is_refused_whatever_the_layout_knows() -> None:
    run_ranks(2, bad_routing)


def other_handles(rank: int, size: int, group: dist.ProcessGroup) -> None:
    """Handles that were rebuilt from their tensors are still told apart."""
    buffer = dt.Buffer(group, num_nvl_bytes=16 << 20, engine="nvlink", timeout=5)
    handles = []
    for seed in (34, 35):
        x, idx, w = (t.cuda() for t in inputs(rank, size, seed))
        layout = shared.layout_of(buffer, idx, size * LOCAL_EXPERTS)
        handles.append(buffer.dispatch(x, **layout, topk_idx=idx, topk_weights=w)[4])
    got = buffer.dispatch(x, handle=tuple(handles[rank]))[0]
    torch.cuda.synchronize()
    assert got.isnan().all()
    with pytest.raises(dt.DeepEPError, match="its handle or shapes differ"):
        buffer.check()
    with pytest.raises(dt.DeepEPError):
        buffer.destroy()


def test_rebuilt_handles_are_told_apart() -> None:
    run_ranks(2, other_handles)


FEW_GPUS = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="MPS lets at most 48 to 60 processes share a GPU, and there are not two"
)


@pytest.mark.parametrize("size", [34, pytest.param(64, marks=FEW_GPUS)])
def test_more_ranks_than_a_warp_has_lanes(size: int) -> None:
    """A warp's lanes stand for them in two rounds, and masks need their upper half; 64 is the most."""
    tokens = tuple(3 + 5 * (r % 3) for r in range(size))
    cases = [Exchange(tokens, 64, 6, 2, "distinct", torch.bfloat16, layout, 4, seed=3) for layout in ("rank", "expert")]
    check(cases, num_biases=1)
