"""The table of `bench` for the rdma engine: dispatch and combine between nodes, which are groups of ranks wherever these are,
beside the least time in which their bytes can be moved through a network card's memory."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepep_train.buffer import Buffer
from deepep_train.cli import bench_gpu
from deepep_train.cli.bench_gpu import Case
from deepep_train.cli.bench_model import (
    ALIGNMENT,
    GRAPH_CALLS,
    Shape,
    resident_sms,
    routing,
    rows_moved_across,
    tokens_to_nodes,
    traffic_of,
)
from deepep_train.cli.bench_report import HEADER, about, line, title, turns_warning, write
from deepep_train.engines.arena_sizes import bytes_to_receive
from deepep_train.ops import dispatch

GRAPHS = ("dispatch", "dispatch fp8", "dispatch worst", "combine")  # what the kernels alone take


@dataclass(frozen=True)
class Plan:
    """What `bench` was asked for; `local`: ranks of a node."""

    shape: Shape
    local: int
    sms: tuple[int, ...]
    quick: bool
    out: Path


def measure(plan: Plan) -> None:
    """One rank's part: every rank runs all cases, rank 0 reports."""
    size, is_first, shape, local = dist.get_world_size(), dist.get_rank() == 0, plan.shape, plan.local
    machine = bench_gpu.examine(size, is_first)
    mesh = f", {size // local} nodes of {local}, rdma engine"
    if is_first:
        if machine.takes_turns:
            print(turns_warning(machine), file=sys.stderr, flush=True)
        print(f"{title(machine, shape)}{mesh}\n{about(machine)}\n{HEADER}", flush=True)
    t = traffic_of(shape, size)
    to_node = tokens_to_nodes([routing(shape, rank)[0] for rank in range(size)], shape.num_experts, local)
    padded = int(t.expert_rows.max()) + ALIGNMENT * (shape.num_experts // size)
    sizes = _num_bytes(int(t.received.max()), padded, int(to_node.max()), size // local, 2 * shape.hidden)
    buffer = Buffer(dist.group.WORLD, *sizes, engine="rdma", num_local_ranks=local, timeout=bench_gpu.TIMEOUT_SECONDS)
    sms = resident_sms(plan.sms, machine.sms, -(-size // machine.num_devices))
    rounds, rows = bench_gpu.QUICK_ROUNDS if plan.quick else bench_gpu.ROUNDS, []
    with torch.no_grad():
        for case in _cases(buffer, shape, sms, rows_moved_across(t, to_node, local), is_first):
            limited = replace(case, key=f"{size // local}x{local} {case.key}")
            rows.append(bench_gpu.timed(limited, machine, rounds))
            del case, limited
            if is_first:
                bench_gpu.say(line(rows[-1]))
    staged = buffer.memory_stats()["tensors staged"]
    if is_first:
        if staged:
            print(f"the arena was too small: {staged} results were staged and copied, so times above are too long")
        if machine.takes_turns:
            print(turns_warning(machine))
        write(machine, shape, rounds, rows, plan.out, "rdma", mesh)
    dist.barrier()
    buffer.destroy()


def _unwaiting(buffer: Buffer, shape: Shape, sms: int, rows: Tensor) -> Case:
    """A fresh dispatch for which no CPU waits."""
    x, idx, weights, t = bench_gpu.inputs(shape)
    how: dict[str, Any] = {"buffer": buffer, "num_experts": shape.num_experts, "num_worst_tokens": int(t.received.max())}
    width, name = 2 * shape.hidden + shape.num_topk * (8 + 4), "dispatch bf16, fresh, num_worst_tokens"
    call = partial(dispatch, x, idx, weights, **how)
    return Case("dispatch worst", name, shape, sms, call, rows * width, t.from_to * width)


def _num_bytes(received: int, padded: int, to_node: int, nodes: int, row_bytes: int) -> tuple[int, int]:
    """num_nvl_bytes and num_rdma_bytes: room for every result, and for the most rows between two nodes."""
    heap = ((5 + len(GRAPHS) * GRAPH_CALLS) * received + padded) * row_bytes + (256 << 20)
    return bytes_to_receive(heap), 2 * nodes * (to_node * row_bytes + 128)


def _cases(buffer: Buffer, shape: Shape, sms: list[int], moved: dict[str, Tensor], is_first: bool) -> Iterable[Case]:
    def cases(counts: list[int]) -> list[Case]:
        return [
            *bench_gpu.rank_cases(buffer, shape, counts, rows=moved),
            _unwaiting(buffer, shape, counts[0], moved["dispatch"]),
        ]

    groups = [
        lambda: cases(sms),
        lambda: bench_gpu.expert_cases(buffer, shape, sms[0], moved),
        lambda: bench_gpu.graph_cases(cases(sms[:1]), GRAPHS),
    ]
    return bench_gpu.by_group(groups, is_first)
