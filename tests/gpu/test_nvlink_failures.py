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
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import assert_same_bits
from shared import run_ranks

import deepep_train as dt

TIMEOUT, SLACK = 2.0, 5.0
STOPPED_FOR = 9
KILLS = int(os.environ.get("DEEPEP_TRAIN_KILLS", "2"))
STOPS = int(os.environ.get("DEEPEP_TRAIN_STOPS", "1"))
MPS = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"), "control").exists()


def work(buffer: dt.Buffer, rank: int, size: int) -> None:
    """A dispatch and a combine, checked."""
    g = torch.Generator().manual_seed(rank)
    x = torch.randn(64, 256, generator=g).to(torch.bfloat16).cuda()
    idx = torch.rand(64, 2 * size, generator=g).topk(2, 1).indices.cuda()
    out = dt.dispatch(x, idx, buffer=buffer, num_experts=2 * size)
    z = dt.combine(out.x, out.handle)
    torch.cuda.synchronize()
    buffer.check()
    copies = torch.stack([(idx // 2 == r).any(1) for r in range(size)]).sum(0)
    total = torch.zeros(x.shape, device="cuda")
    for i in range(size):
        total += torch.where((copies > i)[:, None], x.float(), 0.0)
    assert_same_bits(z, total.to(torch.bfloat16))


def survive(rank: int, size: int, group: dist.ProcessGroup, victim: int, after: float, how: str) -> dict:
    unhurried = dt.Buffer(group, engine="nvlink", timeout=60)
    work(unhurried, rank, size)  # a process's first kernels may take seconds to load
    unhurried.destroy()
    buffer = dt.Buffer(group, engine="nvlink", timeout=TIMEOUT)
    work(buffer, rank, size)
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
            work(buffer, rank, size)
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
    while True:  # also while the stopped rank goes on and writes to the old arenas
        work(buffer, group.rank(), len(rest))
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


@pytest.mark.parametrize("number", range(KILLS))
def test_a_rank_is_killed(number: int) -> None:
    draw = random.Random(number)
    victim = draw.randrange(3)
    results = run_ranks(3, survive, victim, draw.uniform(0.0, 1.0), "kill", timeout=120, fresh=True, dead=[victim])
    for rank, seen in enumerate(results):
        if rank != victim:
            check(seen, victim, "kill")


@pytest.mark.skipif(MPS, reason="under MPS a stopped client stops the others")
@pytest.mark.parametrize("number", range(STOPS))
def test_a_rank_is_stopped_and_goes_on(number: int) -> None:
    draw = random.Random(100 + number)
    victim = draw.randrange(3)
    results = run_ranks(3, survive, victim, draw.uniform(0.0, 1.0), "stop", timeout=120, fresh=True)
    for rank, seen in enumerate(results):
        if rank != victim:
            check(seen, victim, "stop")
    assert results[victim]["kind"] in ("PeerTimeoutError", "DeepEPError"), results[victim]
