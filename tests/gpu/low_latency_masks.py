"""What the ranks of tests of masks do, and of ranks that stop or are late; as low_latency_ranks.py else."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from low_latency_cases import Case, check_received, fill, finish, round_trip, wrong
from low_latency_ranks import buffer_of, new_buffer


def mask_is_not(buffer: Any, size: int, expected: frozenset[int]) -> list[str]:
    """What is wrong with the mask."""
    status = torch.zeros(size, dtype=torch.int32, device="cuda")
    buffer.low_latency_query_mask_buffer(status)
    finish()
    masked = set(status.nonzero().flatten().tolist())
    return [] if masked == expected else [f"{masked} are masked, not {set(expected)}"]


def masks_cleaned(rank: int, size: int, group: dist.ProcessGroup, case: Case) -> list[str]:
    """Whoever has masked nobody cleans its mask between two combines: the second still waits for a rank that pulls the first's
    rows late."""
    buffer = buffer_of(group)
    buffer._engine.low_latency.in_slices = False
    x, idx, weights = (t.cuda() for t in case.inputs(rank))
    recv, count, handle, _, _ = buffer.low_latency_dispatch(x, idx, case.most, case.num_experts, None, **case.arguments)
    y = torch.empty(case.num_experts // size, size * case.most, case.hidden, dtype=torch.bfloat16, device="cuda")
    finish()
    fill(case, rank, y, recv, count)
    others = torch.zeros_like(y)
    if rank == 0:
        z, _, hook = buffer.low_latency_combine(y, idx, weights, handle, return_recv_hook=True)
        time.sleep(0.5)
        hook()
        buffer.low_latency_combine(others, idx, weights, handle)
    else:
        z = buffer.low_latency_combine(y, idx, weights, handle)[0]
        buffer.low_latency_clean_mask_buffer()
        buffer.low_latency_combine(others, idx, weights, handle)
    finish()
    buffer._engine.low_latency.in_slices = True
    return wrong("combined", z, case.combined(rank))


def mask_and_unmask(buffer: Any, rank: int, size: int, case: Case, meet: Callable[[], object]) -> list[str]:
    """The last rank is masked by the others, and does nothing; then it takes part again. `meet`: of all ranks, on the CPU."""
    errors = round_trip(buffer, rank, case, "cuda")
    gone = size - 1
    finish()
    meet()
    if rank != gone:
        buffer.low_latency_update_mask_buffer(gone, True)
        errors += mask_is_not(buffer, size, frozenset({gone}))
        for _ in range(4):
            errors += round_trip(buffer, rank, case, "cuda", frozenset({gone}))
        finish()
    meet()
    if rank != gone:
        buffer.low_latency_clean_mask_buffer()
    buffer.clean_low_latency_buffer(case.most, case.hidden, case.num_experts)
    for _ in range(3):
        errors += round_trip(buffer, rank, case, "cuda")
    finish()
    meet()
    return errors


def left_out(rank: int, size: int, group: dist.ProcessGroup, case: Case, local: int | None = None) -> list[str]:
    buffer = new_buffer(group, 64 << 20, 10, local)
    errors = mask_and_unmask(buffer, rank, size, case, lambda: dist.barrier(group))
    buffer.destroy()
    return errors


def masked_apart(rank: int, size: int, group: dist.ProcessGroup, case: Case) -> list[str]:
    """Ranks 0 and 2 mask each other, nobody else: those that combine in slices see different ranks, of which one does not."""
    buffer = new_buffer(group, 64 << 20, 10, None)
    errors = round_trip(buffer, rank, case, "cuda")
    torch.cuda.synchronize()
    dist.barrier(group)
    without: frozenset[int] = frozenset()
    if rank in (0, 2):
        buffer.low_latency_update_mask_buffer(2 - rank, True)
        without = frozenset({2 - rank})
    for number in range(6):
        buffer._engine.low_latency.in_slices = rank != 2 or number % 3 == 0
        errors += round_trip(buffer, rank, replace(case, seed=number), "cuda", without)
    errors += mask_is_not(buffer, size, without)
    torch.cuda.synchronize()
    dist.barrier(group)
    buffer.destroy()
    return errors


def late_for_another(rank: int, size: int, group: dist.ProcessGroup, case: Case, in_slices: bool) -> list[str]:
    """Rank 2 makes no combine, and rank 0 has masked it. So rank 1 is late for rank 0, and for longer than that one's deadline,
    but because it waits: nobody gives it up."""
    buffer = new_buffer(group, 64 << 20, 10, None)
    calls, gone = buffer._engine.low_latency, 2
    calls.in_slices = in_slices
    errors = round_trip(buffer, rank, case, "cuda")
    x, idx, weights = (t.cuda() for t in case.inputs(rank))
    recv, count, handle, _, _ = buffer.low_latency_dispatch(x, idx, case.most, case.num_experts, None, **case.arguments)
    y = torch.empty(case.num_experts // size, size * case.most, case.hidden, dtype=torch.bfloat16, device="cuda")
    fill(case, rank, y, recv, count)
    if rank == 0:
        buffer.low_latency_update_mask_buffer(gone, True)
    torch.cuda.synchronize()
    dist.barrier(group)
    if rank != gone:
        calls._peers.timeout = 1.0 if rank == 0 else 3.0
        z = buffer.low_latency_combine(y, idx, weights, handle)[0]
        errors += wrong("combined", z, case.combined(rank, frozenset({gone})))
        errors += round_trip(buffer, rank, replace(case, seed=1), "cuda", frozenset({gone}))
        errors += mask_is_not(buffer, size, frozenset({gone}))
    torch.cuda.synchronize()
    calls._peers.timeout = 10
    dist.barrier(group)
    buffer.destroy()
    return errors


def stopped(rank: int, size: int, group: dist.ProcessGroup, case: Case, local: int | None = None) -> list[str]:
    """The last rank stops coming: the others go on without it, and say so."""
    buffer = new_buffer(group, 64 << 20, 60.0, local)
    torch.cuda.synchronize()
    dist.barrier(group)
    gone = size - 1
    errors = round_trip(buffer, rank, case, "cuda")
    torch.cuda.synchronize()
    buffer._engine.low_latency._peers.timeout = 3.0  # not before: NVSHMEM may take seconds to start, and kernels to load
    dist.barrier(group)
    if rank != gone:
        x, idx, weights = (t.cuda() for t in case.inputs(rank))
        waits = torch.zeros(2, size, dtype=torch.int64, device="cuda")
        start = time.monotonic()
        recv, count, handle, _, _ = buffer.low_latency_dispatch(
            x, idx, case.most, case.num_experts, None, waits[0], **case.arguments
        )
        errors += check_received(case, rank, recv, count, handle, frozenset({gone}))
        y = torch.empty(case.num_experts // size, size * case.most, case.hidden, dtype=torch.bfloat16, device="cuda")
        fill(case, rank, y, recv, count)
        z = buffer.low_latency_combine(y, idx, weights, handle, combine_wait_recv_cost_stats=waits[1])[0]
        errors += wrong("combined", z, case.combined(rank, frozenset({gone})))
        took = time.monotonic() - start
        errors += mask_is_not(buffer, size, frozenset({gone}))
        errors += [] if took < 20 else [f"{took:.1f} s, above one timeout and some"]
        slowest = int(waits[0].argmax())
        if slowest != gone or int(waits[0, gone]) < 2_500_000_000 or int(waits[1, gone]) > 500_000_000:
            errors.append(f"waited {waits.tolist()}")
        for _ in range(3):
            errors += round_trip(buffer, rank, case, "cuda", frozenset({gone}))
        torch.cuda.synchronize()
    dist.barrier(group)
    buffer.destroy()
    return errors
