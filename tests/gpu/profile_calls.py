"""What calls cost the CPU, and when they launch what, in microseconds.

torchrun --nproc-per-node 2 tests/gpu/profile_calls.py      (under MPS if the ranks share a GPU)

Of each call: the CPU's and the whole time of calls in a row, medians over rounds of the slowest rank; torch's `add_` says how
fast the host is just then. Of some, alone on an idle GPU: when rank 0 enters each function of the communicator, medians.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

import deepep_train as dt

HIDDEN, TOP_K, EXPERTS = 7168, 8, 256
CALLS, ROUNDS, ALONE = 30, 7, 50
EXPERT = {"layout": "expert", "alignment": 16}


def calls_of(buffer: dt.Buffer, tokens: int) -> dict[str, Callable[[], Any]]:
    x = torch.randn(tokens, HIDDEN, device="cuda").bfloat16()
    idx = torch.rand(tokens, EXPERTS, device="cuda").topk(TOP_K, 1).indices
    weights = torch.rand(tokens, TOP_K, device="cuda")
    how: dict[str, Any] = {"buffer": buffer, "num_experts": EXPERTS}
    by_rank, by_expert = dt.dispatch(x, idx, weights, **how), dt.dispatch(x, idx, weights, **how, **EXPERT)
    rows = buffer.empty_like(by_expert.x).copy_(by_expert.x)

    def as_v1() -> Any:
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, EXPERTS)
        return buffer.dispatch(x, None, per_rank, None, in_rank, per_expert, idx, weights)

    return {
        "dispatch, fresh": lambda: dt.dispatch(x, idx, weights, **how),
        "dispatch to experts, fresh": lambda: dt.dispatch(x, idx, weights, **how, **EXPERT),
        "dispatch, cached": lambda: dt.dispatch(x, buffer=buffer, handle=by_rank.handle),
        "dispatch to experts, cached": lambda: dt.dispatch(x, buffer=buffer, handle=by_expert.handle),
        "combine": lambda: dt.combine(by_rank.x, by_rank.handle),
        "combine from experts": lambda: dt.combine(rows, by_expert.handle),
        "get_dispatch_layout": lambda: buffer.get_dispatch_layout(idx, EXPERTS),
        "get_dispatch_layout and V1's dispatch": as_v1,
        "torch's add_": lambda: weights.add_(0),
    }


def in_a_row(call: Callable[[], Any]) -> tuple[float, float]:
    """The CPU's time and the whole."""
    cpu, whole = [], []
    for number in range(ROUNDS + 1):
        dist.barrier()
        torch.cuda.synchronize()
        call()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        launched = time.perf_counter()
        torch.cuda.synchronize()
        if number:
            cpu.append((launched - start) / CALLS * 1e6)
            whole.append((time.perf_counter() - start) / CALLS * 1e6)
    slowest = torch.tensor([statistics.median(cpu), statistics.median(whole)], dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest[0].item(), slowest[1].item()


class Watched:
    """A communicator that notes when its functions are entered."""

    def __init__(self, comm: Any, entered: list[tuple[str, float]]) -> None:
        self._comm, self._entered = comm, entered

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._comm, name)
        if not callable(value):
            return value

        def watched(*args: Any) -> Any:
            self._entered.append((name, time.perf_counter()))
            return value(*args)

        return watched


def timeline(buffer: dt.Buffer, call: Callable[[], Any]) -> str:
    engine: Any = buffer._engine
    entered: list[tuple[str, float]] = []
    comm = engine._comm
    engine._comm = engine._arena._comm = Watched(comm, entered)
    times: dict[tuple[int, str], list[float]] = {}
    for _ in range(ALONE):
        dist.barrier()
        torch.cuda.synchronize()
        entered.clear()
        start = time.perf_counter()
        call()
        entered.append(("end", time.perf_counter()))
        for number, (name, at) in enumerate(entered):
            times.setdefault((number, name), []).append((at - start) * 1e6)
    engine._comm = engine._arena._comm = comm
    usual = {key: at for key, at in sorted(times.items()) if len(at) > ALONE // 2}
    return ", ".join(f"{name} {statistics.median(at):.0f}" for (_, name), at in usual.items())


def main() -> None:
    dist.init_process_group("gloo")
    torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    torch.manual_seed(dist.get_rank())
    buffer = dt.Buffer(dist.group.WORLD, num_nvl_bytes=3 << 30, engine="nvlink")
    with torch.no_grad():
        for tokens in (16, 4096):
            calls = calls_of(buffer, tokens)
            for name, call in calls.items():
                cpu, whole = in_a_row(call)
                if dist.get_rank() == 0:
                    print(f"{tokens} tokens, {name}: {cpu:.1f} of {whole:.1f}", flush=True)
            for name in list(calls)[:6]:
                text = timeline(buffer, calls[name])
                if dist.get_rank() == 0:
                    print(f"{tokens} tokens, {name}, alone: {text}", flush=True)
    dist.barrier()
    os._exit(0)  # gloo may abort on the way out


if __name__ == "__main__":
    main()
