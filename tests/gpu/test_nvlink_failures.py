"""Ranks that die or stop in the middle of it: the others raise in time, name them, and go on with a new buffer.

Without MPS: under it, a store into the memory of a process that was killed breaks every client of the GPU, and all that can be
asked for is that survivors raise, that their buffer names who died, and that none hangs. DEEPEP_TRAIN_KILLS and
DEEPEP_TRAIN_STOPS say how often (20 and 5 for the long run).
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import assert_same_bits
from shared import run_ranks

import deepep_train as dt

TIMEOUT, SLACK = 2.0, 5.0
STOPPED_FOR = 9
KINDS = ("fresh", "cached", "expert")  # fresh routing to ranks, calls along one handle, fresh routing to experts
KILLS = int(os.environ.get("DEEPEP_TRAIN_KILLS", "3"))
STOPS = int(os.environ.get("DEEPEP_TRAIN_STOPS", "1"))
MPS = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"), "control").exists()


def work(buffer: dt.Buffer, rank: int, size: int, kind: str) -> Callable[[], None]:
    """A dispatch and a combine of that kind, checked, as often as one likes."""
    g = torch.Generator().manual_seed(rank)
    x = torch.randn(64, 256, generator=g).to(torch.bfloat16).cuda()
    idx = torch.rand(64, 2 * size, generator=g).topk(2, 1).indices.cuda()
    how: dict[str, Any] = {"buffer": buffer, "num_experts": 2 * size, "layout": "rank"}
    if kind == "expert":
        how |= {"layout": "expert", "alignment": 8}
    handle = dt.dispatch(x, idx, **how).handle if kind == "cached" else None
    picks_RT = torch.stack([(idx // 2 == r).sum(1) for r in range(size)])
    sums = torch.zeros(x.shape, device="cuda")
    for picks_T in picks_RT if kind == "expert" else picks_RT.clamp(max=1):
        sums += picks_T[:, None] * x.float()  # at most 2 rows at a rank, whose sum bf16 holds
    expected = sums.to(torch.bfloat16)

    def once() -> None:
        if handle is None:
            out = dt.dispatch(x, idx, **how)
            z = dt.combine(out.x, out.handle)
        else:
            z = dt.combine(dt.dispatch(x, buffer=buffer, handle=handle).x, handle)
        torch.cuda.synchronize()
        buffer.check()
        assert_same_bits(z, expected)

    once()
    return once


def survive(rank: int, size: int, group: dist.ProcessGroup, victim: int, after: float, how: str, kind: str) -> dict:
    unhurried = dt.Buffer(group, engine="nvlink", timeout=60)
    work(unhurried, rank, size, kind)  # a process's first kernels may take seconds to load
    unhurried.destroy()
    buffer = dt.Buffer(group, engine="nvlink", timeout=TIMEOUT)
    once = work(buffer, rank, size, kind)
    dist.barrier(group)
    if rank == victim:

        def strike() -> None:
            time.sleep(after)
            if how == "stop":
                subprocess.Popen(["sh", "-c", f"sleep {STOPPED_FOR}; kill -CONT {os.getpid()}"])
            os.kill(os.getpid(), signal.SIGSTOP if how == "stop" else signal.SIGKILL)

        threading.Thread(target=strike, daemon=True).start()
    seen, began = None, time.monotonic()
    while time.monotonic() - began < after + 40:
        call = time.monotonic()
        try:
            once()
        except Exception as error:  # noqa: BLE001 - under MPS it may be torch's
            seen = {"kind": type(error).__name__, "text": str(error), "ranks": getattr(error, "ranks", None)}
            seen["seconds"] = time.monotonic() - call
            seen["told"] = what_it_says(buffer)
            break
    assert seen is not None, "nothing was raised"
    if MPS or rank == victim:
        return seen
    with pytest.raises(dt.DeepEPError):
        buffer.destroy()
    rest = [r for r in range(size) if r != victim]
    group = dist.new_group(rest, use_local_synchronization=True)
    buffer = dt.Buffer(group, engine="nvlink", timeout=30)
    until = began + after + STOPPED_FOR + 4 if how == "stop" else time.monotonic()
    once = work(buffer, group.rank(), len(rest), kind)
    while True:  # also while the stopped rank goes on and writes to the old arenas
        once()
        done = torch.tensor([time.monotonic() > until])
        dist.all_reduce(done, dist.ReduceOp.MAX, group=group)
        if done.item():
            break
    buffer.destroy()
    return seen


def what_it_says(buffer: dt.Buffer) -> str:
    """A process that is killed with memory on a GPU takes a while to end."""
    text, until = "", time.monotonic() + SLACK
    while "has ended" not in text and time.monotonic() < until:
        time.sleep(0.1)
        try:
            buffer.check()
        except dt.DeepEPError as error:
            text = str(error)
    return text


def check(seen: dict, victim: int, how: str) -> None:
    assert seen["seconds"] < TIMEOUT + SLACK, seen
    if how == "kill":
        assert f"the process of rank {victim} has ended" in seen["told"], seen
    if not MPS:
        assert seen["kind"] == "PeerTimeoutError", seen
        assert victim in seen["ranks"], seen


def strike_at(number: int, how: str, seed: int) -> tuple[int, list[Any]]:
    """Amid which calls, of how many ranks, alternates with the number; who and when is drawn. Gives the victim, and what the
    ranks saw."""
    draw, size, kind = random.Random(seed), 3 + number % 2, KINDS[number % 3]
    victim = draw.randrange(size)
    dead = [victim] if how == "kill" else []
    when = draw.uniform(0.0, 1.0)
    return victim, run_ranks(size, survive, victim, when, how, kind, timeout=120, fresh=True, dead=dead)


@pytest.mark.parametrize("number", range(KILLS))
def test_a_rank_is_killed(number: int) -> None:
    victim, results = strike_at(number, "kill", number)
    for rank, seen in enumerate(results):
        if rank != victim:
            check(seen, victim, "kill")


@pytest.mark.skipif(MPS, reason="under MPS a stopped client stops the others")
@pytest.mark.parametrize("number", range(STOPS))
def test_a_rank_is_stopped_and_goes_on(number: int) -> None:
    victim, results = strike_at(number, "stop", 100 + number)
    for rank, seen in enumerate(results):
        if rank != victim:
            check(seen, victim, "stop")
    assert results[victim]["kind"] in ("PeerTimeoutError", "DeepEPError"), results[victim]
