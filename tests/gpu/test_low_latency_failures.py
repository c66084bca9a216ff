"""Ranks that are killed in the middle of low-latency calls: the others mask them, and nobody else, and go on.

Without MPS, as test_nvlink_failures.py, so that processes take turns on the GPU and a call takes milliseconds: most strikes
fall into one. DEEPEP_TRAIN_KILLS says how often.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from low_latency_cases import Case, round_trip
from shared import run_ranks
from test_nvlink_failures import KILLS, MPS

import deepep_train as dt

TIMEOUT, CALLS = 3.0, 30
# What the survivors' combines are: in slices all, or all but one, which pulls by a hook; in two launches.
FORMS = ("slices", "hook", "two launches")


def survive(rank: int, size: int, group: dist.ProcessGroup, victim: int, at: int, after: float, form: str) -> list[str]:
    """What is wrong with the calls before the strike and the last ones, and with the mask."""
    case = Case((40,) * size, 40, 3584, 2 * size, 2, kind="bf16")  # seven slices
    if form == "hook" and rank == (victim + 1) % size:
        case = replace(case, hook=True)
    errors = []
    for timeout in (60.0, TIMEOUT):  # a process's first kernels may take seconds to load
        buffer = dt.Buffer(group, num_nvl_bytes=128 << 20, low_latency_mode=True, timeout=timeout)
        buffer._engine.low_latency.in_slices = form != "two launches"
        errors += round_trip(buffer, rank, case, "cuda")
        if timeout != TIMEOUT:
            buffer.destroy()
    dist.barrier(group)
    for number in range(CALLS):
        if rank == victim and number == at:

            def strike() -> None:
                time.sleep(after)
                os.kill(os.getpid(), signal.SIGKILL)

            threading.Thread(target=strike, daemon=True).start()
        is_after = number >= CALLS - 3
        found = round_trip(buffer, rank, replace(case, seed=number), "cuda", frozenset({victim}) if is_after else frozenset())
        if number < at - 1 or is_after:  # of the call before, the victim may leave while others still pull its rows
            errors += [f"call {number}: {error}" for error in found]
    status = torch.zeros(size, dtype=torch.int32, device="cuda")
    buffer.low_latency_query_mask_buffer(status)
    if status.tolist() != [int(r == victim) for r in range(size)]:
        errors.append(f"rank {victim} was killed, the mask is {status.tolist()}")
    rest = [r for r in range(size) if r != victim]
    dist.barrier(dist.new_group(rest, use_local_synchronization=True))  # its memory is read until then
    return errors


@pytest.mark.skipif(MPS, reason="under MPS a store into a dead process's memory breaks every client")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("number", range(KILLS))
def test_a_rank_is_killed(number: int, form: str) -> None:
    draw, size = random.Random(number), 3 + number % 2
    victim, at, after = draw.randrange(size), draw.randint(3, 15), draw.uniform(0.0, 0.03)
    results = run_ranks(size, survive, victim, at, after, form, timeout=150, fresh=True, dead=[victim])
    errors = [f"rank {rank}: {error}" for rank, of in enumerate(results) if rank != victim for error in of]
    assert not errors, "\n".join(errors[:8])
