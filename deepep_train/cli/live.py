"""`doctor --live`: ranks on this machine's GPUs exchange small batches by the low-latency kernels, and which of them keeps the
others waiting is named."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from deepep_train.buffer import Buffer
from deepep_train.cli.bench_gpu import captured
from deepep_train.waits import Waits, who_is_slow

TOKENS, HIDDEN, TOP_K, EXPERTS = 32, 2048, 4, 8  # experts of a rank
CALLS, WARM_UP = 200, 20
TIMEOUT = 30.0


def measure(out: Path, late_rank: int = -1, late_seconds: float = 0.0) -> None:
    """One rank's part; rank 0 writes to `out`, as JSON, what `as_lines` takes. `late_rank` sleeps before every exchange: to see
    that it is found."""
    found = _exchange(late_rank, late_seconds)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))


def as_lines(found: Mapping[str, Any]) -> list[str]:
    if why := found.get("obstacle"):
        return [f"live: these ranks have no low-latency kernels: {why}"]
    lines = [f"live, {name}: {Waits(**found[name])}" for name in ("dispatch", "combine") if name in found]
    if given_up := found.get("given up"):
        lines.append(f"live: given up after {TIMEOUT:g} s: rank {given_up}")
    return lines


def _exchange(late_rank: int, late_seconds: float) -> dict[str, Any]:
    rank, size = dist.get_rank(), dist.get_world_size()
    buffer = Buffer(dist.group.WORLD, low_latency_mode=True, timeout=TIMEOUT)
    if buffer.engine != "low_latency":
        return {"engine": buffer.engine, "obstacle": "; ".join(buffer.engine_reasons)}
    device = torch.device("cuda", torch.cuda.current_device())
    generator = torch.Generator(device).manual_seed(rank)
    x = torch.randn(TOKENS, HIDDEN, generator=generator, device=device, dtype=torch.bfloat16)
    idx = torch.rand(TOKENS, EXPERTS * size, generator=generator, device=device).topk(TOP_K).indices
    weights = torch.rand(TOKENS, TOP_K, generator=generator, device=device)
    waits = torch.zeros(2, size, dtype=torch.int64, device=device)

    def exchange() -> None:
        rows, _, handle, _, _ = buffer.low_latency_dispatch(
            x, idx, TOKENS, EXPERTS * size, dispatch_wait_recv_cost_stats=waits[0], use_fp8=False
        )
        assert isinstance(rows, torch.Tensor)
        buffer.low_latency_combine(rows, idx, weights, handle, combine_wait_recv_cost_stats=waits[1])

    # From a graph: else what is measured is how fast each rank's Python is.
    replay = captured(exchange, 1)
    for call in range(WARM_UP + CALLS):
        if call == WARM_UP:
            torch.cuda.synchronize()
            dist.barrier()
            waits.zero_()
        if rank == late_rank:
            torch.cuda.synchronize()
            time.sleep(late_seconds)
        replay()
    torch.cuda.synchronize()
    masked = torch.zeros(size, dtype=torch.int32, device=device)
    buffer.low_latency_query_mask_buffer(masked)
    found = {name: who_is_slow(ns, CALLS)._asdict() for name, ns in zip(("dispatch", "combine"), waits, strict=True)}
    dist.barrier()
    buffer.destroy()
    return {"engine": buffer.engine, **found, "given up": masked.nonzero().flatten().tolist()}
