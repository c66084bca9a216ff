"""V1's handles as plain tuples: told apart, looked at when they are copies, kept alive; and a capture that cannot be."""

from __future__ import annotations

import pytest
import shared
import torch
import torch.distributed as dist
from harness import assert_same_bits
from in_place import check_writes
from shared import LOCAL_EXPERTS, inputs, run_ranks
from test_nvlink_streams import spin

import deepep_train as dt


def a_handle(buffer: dt.Buffer, rank: int, size: int, seed: int) -> tuple:
    x, idx, w = (t.cuda() for t in inputs(rank, size, seed))
    layout = shared.layout_of(buffer, idx, size * LOCAL_EXPERTS)
    got, *_, handle, _ = buffer.dispatch(x, **layout, topk_idx=idx, topk_weights=w)
    return x, got, handle


def other_buffers(rank: int, size: int, group: dist.ProcessGroup) -> None:
    """Rank 0 takes the first buffer's handle, rank 1 the second's; both are their buffer's first."""
    buffers = [dt.Buffer(group, num_nvl_bytes=16 << 20, engine="nvlink", timeout=5) for _ in range(2)]
    made = [a_handle(b, rank, size, 34 + i) for i, b in enumerate(buffers)]
    if rank == 0:
        buffers[0].dispatch(made[0][0], handle=tuple(made[0][2]))
    else:
        with pytest.raises(dt.ArgumentError, match="another buffer"):
            buffers[0].dispatch(made[0][0], handle=tuple(made[1][2]))
    torch.cuda.synchronize()
    with pytest.raises(dt.DeepEPError):
        buffers[0].check()


def test_rebuilt_handles_of_two_buffers_are_told_apart() -> None:
    run_ranks(2, other_buffers, fresh=True, timeout=40)


def cloned(rank: int, size: int, group: dist.ProcessGroup) -> None:
    """The plan travels as a Python attribute of one tensor, which a copy does not have."""
    buffer = dt.Buffer(group, num_nvl_bytes=16 << 20, engine="nvlink", timeout=5)
    made = [a_handle(buffer, rank, size, seed) for seed in (34, 35)]
    buffer.dispatch(made[0][0], handle=tuple(t.clone() for t in made[rank][2]))
    torch.cuda.synchronize()
    with pytest.raises(dt.DeepEPError):
        buffer.check()


def test_cloned_handles_are_told_apart() -> None:
    run_ranks(2, cloned, fresh=True, timeout=40)


def by_expert(rank: int, size: int, group: dist.ProcessGroup) -> None:
    """Copies of an expert layout's tensors are refused, whatever its number of rows; the tensors themselves keep their plan."""
    buffer = shared.buffer_of(group)
    x, idx, w = (t.cuda() for t in inputs(rank, size, 34))
    out = dt.dispatch(x, idx, w, buffer=buffer, num_experts=size * LOCAL_EXPERTS, layout="expert")
    z = dt.combine(out.x, out.handle)
    assert_same_bits(buffer.combine(out.x, tuple(out.handle))[0], z)
    with pytest.raises(dt.ArgumentError, match=r"handle: .* of a dispatch to expert layout"):
        buffer.combine(out.x, tuple(t.clone() for t in out.handle))
    assert_same_bits(dt.combine(out.x, out.handle), z)


def test_copies_of_an_expert_layout_are_refused() -> None:
    run_ranks(2, by_expert)


def dying_tuple(rank: int, size: int, group: dist.ProcessGroup) -> None:
    """As dying_handles, but a plain tuple, made on a side stream and used on the default one (raw number 0)."""
    buffer, side = shared.buffer_of(group), torch.cuda.Stream()
    with torch.cuda.stream(side):
        _, got, handle = a_handle(buffer, rank, size, 20)
        expected = buffer.combine(got, handle)[0].clone()
    torch.cuda.synchronize()
    plain = tuple(handle)
    del handle
    spin(30)
    z = buffer.combine(got, plain)[0]
    del plain
    with torch.cuda.stream(side):  # -1: "not sent"
        trash = [torch.full((n,), -1, dtype=torch.int32, device="cuda") for n in (96, 128, 192, 256, 400) for _ in range(20)]
    torch.cuda.synchronize()
    assert_same_bits(z, expected)
    del trash


def test_a_plain_tuple_may_die_before_its_call_runs() -> None:
    run_ranks(2, dying_tuple, fresh=True, timeout=40)


def fresh_in_capture(rank: int, size: int, group: dist.ProcessGroup) -> None:
    """A dispatch that must wait for counts cannot be captured: a clear error, and the buffer goes on."""
    buffer = dt.Buffer(group, num_nvl_bytes=16 << 20, engine="nvlink", timeout=5)
    x, idx, w = (t.cuda() for t in inputs(rank, size, 9))
    how = {"buffer": buffer, "num_experts": size * LOCAL_EXPERTS}
    first = dt.dispatch(x, idx, w, **how).x.clone()
    torch.cuda.synchronize()
    needs = "capture needs num_worst_tokens or a handle"
    with pytest.raises(dt.ArgumentError, match=needs), torch.cuda.graph(torch.cuda.CUDAGraph()):
        dt.dispatch(x, idx, w, **how)
    assert_same_bits(dt.dispatch(x, idx, w, **how).x, first)


def test_a_fresh_dispatch_in_a_capture() -> None:
    run_ranks(2, fresh_in_capture, fresh=True, timeout=40)


def altered(rank: int, size: int, group: dist.ProcessGroup, part: int) -> None:
    """Copies as they should be pass; those with numbers that would lead past the end of memory raise, and nothing runs."""
    buffer = dt.Buffer(group, num_nvl_bytes=16 << 20, engine="nvlink", timeout=5)
    x, got, handle = a_handle(buffer, rank, size, 36)
    copied = tuple(t.clone() for t in handle)
    assert_same_bits(buffer.dispatch(x, handle=copied)[0], got)
    assert_same_bits(buffer.combine(got, copied)[0], buffer.combine(got, handle)[0])
    handle[part].add_(1 << 20)
    with pytest.raises(dt.ArgumentError, match="handle"):
        buffer.dispatch(x, handle=tuple(handle))


@pytest.mark.parametrize("part", [0, 5])
def test_copies_are_looked_at(part: int) -> None:
    run_ranks(2, altered, part, fresh=True, timeout=40)


def on_the_cpu(rank: int, size: int, group: dist.ProcessGroup) -> None:
    buffer = dt.Buffer(group, num_nvl_bytes=16 << 20, engine="nvlink", timeout=5)
    x, _, handle = a_handle(buffer, rank, size, 36)
    with pytest.raises(dt.ArgumentError, match="handle"):
        buffer.dispatch(x, handle=tuple(t.cpu() for t in handle))


def test_a_handle_on_the_cpu_is_refused() -> None:
    run_ranks(2, on_the_cpu, fresh=True, timeout=40)


def written_to(rank: int, size: int, group: dist.ProcessGroup) -> None:
    x, idx, w = (t.cuda() for t in inputs(rank, size, 40))
    check_writes(shared.buffer_of(group), x, idx, w, size * LOCAL_EXPERTS)


def test_results_may_be_written_to() -> None:
    run_ranks(2, written_to)


def freed(rank: int, size: int, group: dist.ProcessGroup) -> None:
    """In expert layout a handle's table lies in the memory of the weights."""
    buffer = dt.Buffer(group, num_nvl_bytes=16 << 20, engine="nvlink", timeout=5)
    x, idx, w = (t.cuda() for t in inputs(rank, size, 41))
    out = dt.dispatch(x, idx, w, buffer=buffer, num_experts=size * LOCAL_EXPERTS, layout="expert")
    out.topk_weights.untyped_storage().resize_(0)
    with pytest.raises(dt.ArgumentError, match="has been freed"):
        dt.combine(out.x, out.handle)


def test_memory_of_a_handle_that_was_freed() -> None:
    run_ranks(2, freed, fresh=True, timeout=40)
