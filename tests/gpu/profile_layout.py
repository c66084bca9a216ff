"""What the time of `get_dispatch_layout` is made of, slowest rank, in microseconds.

torchrun --nproc-per-node 8 tests/gpu/profile_layout.py      (under MPS, as the benchmark)
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

import deepep_train as dt
from deepep_train import engines
from deepep_train.cli.bench_gpu import captured, slowest_ms

TOKENS, EXPERTS, TOP_K = 4096, 256, 8
CALLS, ROUNDS, IN_GRAPH = 50, 5, 10


def main() -> None:
    dist.init_process_group("gloo")
    torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    engines.DEFAULT_ARENA_BYTES = 64 << 20
    ranks = dist.get_world_size()
    buffer = dt.Buffer(dist.group.WORLD, engine="nvlink")
    engine = buffer._engine
    idx = torch.rand(TOKENS, EXPERTS, device="cuda").topk(TOP_K, 1).indices
    block = torch.empty(ranks + EXPERTS + 1 + 2 * TOKENS * ranks, dtype=torch.int32, device="cuda")
    small = torch.zeros(64, device="cuda")

    def launch() -> None:
        engine._comm.layout(
            idx.data_ptr(), TOKENS, TOP_K, EXPERTS, engine.peers.size, block.data_ptr(), torch.cuda.current_stream().cuda_stream
        )

    def tensor() -> None:
        torch.empty(block.numel(), dtype=torch.int32, device="cuda")

    graph = captured(launch, IN_GRAPH)
    for name, call, calls, inner in (
        ("from a CUDA graph", graph, CALLS // IN_GRAPH, IN_GRAPH),
        ("the launch alone", launch, CALLS, 1),
        ("its memory alone", tensor, CALLS, 1),
        ("the engine's part", lambda: engine.layout(idx, EXPERTS), CALLS, 1),
        ("the whole call", lambda: buffer.get_dispatch_layout(idx, EXPERTS), CALLS, 1),
        ("torch's add_ of 64 elements, for comparison", lambda: small.add_(1), CALLS, 1),
    ):
        ms = slowest_ms(call, calls, ROUNDS) / inner
        if dist.get_rank() == 0:
            print(f"{ranks} ranks, {name}: {ms * 1000:.1f}", flush=True)
    dist.barrier()
    os._exit(0)  # the graph holds the arena, and gloo may abort on the way out


if __name__ == "__main__":
    main()
