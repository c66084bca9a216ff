"""Times the nvlink engine through the Python API: 8 processes on one GPU, which mean something under MPS only.

    python tests/gpu/time_nvlink.py

Prints one JSON line for each shape and number of SMs: medians, over 5 runs of 10 calls, of the slowest rank, in milliseconds.
To become part of `python -m deepep_train bench`.
"""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import deepep_train as dt

RANKS = 8
SHAPES = ((4096, 7168, 256, 8), (4096, 2048, 64, 8))  # tokens, hidden, experts, top-k


def milliseconds(call: Callable[[], Any], calls: int = 10) -> float:
    times = []
    for _ in range(5):
        dist.barrier()
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        call()
        start.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / calls)
    slowest = torch.tensor([statistics.median(times)], dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return round(slowest.item(), 3)


def measure(rank: int, key: str) -> None:
    torch.cuda.set_device(0)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file:///tmp/time_nvlink_{key}", rank=rank, world_size=RANKS)
    buffer = dt.Buffer(dist.group.WORLD, num_nvl_bytes=int(4.5e9), timeout=20, engine="nvlink")
    for tokens, hidden, num_experts, top_k in SHAPES:
        g = torch.Generator(device="cuda").manual_seed(rank)
        x = torch.randn(tokens, hidden, device="cuda", generator=g).bfloat16()
        idx = torch.rand(tokens, num_experts, device="cuda", generator=g).topk(top_k)[1]
        weights = torch.rand(tokens, top_k, device="cuda")
        fp8 = (x.to(torch.float8_e4m3fn), torch.rand(tokens, hidden // 128, device="cuda"))
        for sms in (16, 4):
            dt.Buffer.set_num_sms(sms)
            row: dict[str, Any] = {"hidden": hidden, "SMs": sms}
            for layout in ("rank", "expert"):
                how: dict[str, Any] = {"buffer": buffer, "num_experts": num_experts, "layout": layout}
                how["alignment"] = 16 if layout == "expert" else 1
                row |= times_of(buffer, layout, x, fp8, idx, weights, how)
            row["layout call"] = milliseconds(partial(buffer.get_dispatch_layout, idx, num_experts), 50)
            if rank == 0:
                print(json.dumps(row), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def times_of(buffer: dt.Buffer, layout: str, x: Any, fp8: Any, idx: Any, weights: Any, how: dict[str, Any]) -> dict[str, float]:
    out = dt.dispatch(x, idx, weights, **how)
    visible = buffer.empty_like(out.x)
    visible.copy_(out.x)
    anywhere = torch.empty(out.x.shape, dtype=out.x.dtype, device="cuda")
    anywhere.copy_(out.x)
    handle = out.handle
    calls = {
        "dispatch": lambda: buffer.redispatch(x, handle),
        "dispatch fp8": lambda: buffer.redispatch(fp8, handle),
        "dispatch fresh": lambda: dt.dispatch(x, idx, weights, **how),
        "combine visible": lambda: buffer.combine_rows(visible, handle),
        "combine any": lambda: buffer.combine_rows(anywhere, handle),
    }
    return {f"{layout}: {name}": milliseconds(call) for name, call in calls.items()}


if __name__ == "__main__":
    mp.spawn(measure, (str(random.random()),), RANKS)
