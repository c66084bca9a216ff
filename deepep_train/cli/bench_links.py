"""The table of `bench` on several GPUs, one rank each: GB/s over the links, beside what the links carry, NCCL and DeepEP V1."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepep_train import fp8
from deepep_train.buffer import Buffer
from deepep_train.cli import bench_peer
from deepep_train.cli.bench_gpu import (
    GIB,
    QUICK_ROUNDS,
    ROUNDS,
    TIMEOUT_SECONDS,
    captured,
    examine,
    inputs,
    slowest_ms,
    visible_copy,
)
from deepep_train.cli.bench_links_report import HEADER, NCCL, OURS, PEER, Row, about_links, line, summary, title, write
from deepep_train.cli.bench_model import GRAPH_CALLS, Shape, Traffic, floor_ms, resident_sms, rows_moved, traffic_of
from deepep_train.cli.bench_report import CALLS, about
from deepep_train.engines.arena_sizes import bytes_to_receive
from deepep_train.errors import DeepEPError
from deepep_train.ops import combine, dispatch

TOKENS, HIDDEN, SMS = (4096, 8192), (7168, 2048), (2, 4, 8, 16, 24)
OPERATIONS = {
    "dispatch": "dispatch bf16, cached",
    "dispatch fp8": "dispatch FP8 + scales, cached",
    "dispatch fresh": "dispatch bf16, fresh",
    "combine": "combine bf16, peer-visible",
}


@dataclass(frozen=True)
class Plan:
    """What `bench` was asked for."""

    shapes: tuple[Shape, ...]
    sms: tuple[int, ...]
    quick: bool
    out: Path
    peer: Path | None = None


@dataclass(frozen=True)
class Load:
    """Bytes of one operation: over the links out of or into the busiest GPU, and that stay on a GPU (the mean)."""

    link: int
    local: int
    floor_ms: float


def load_of(t: Traffic, operation: str, width: int, copy_rate: float, link_rate: float) -> Load:
    """Args: width: bytes of a row; the rates: bytes a second, see `bench_model.floor_ms`. Every rank has its own GPU."""
    size = t.sent.numel()
    back = operation == "combine"
    crossing = (t.from_to.t() if back else t.from_to) * width
    moved = rows_moved(t)["combine" if back else "dispatch"] * width
    local = crossing.diagonal()
    away = crossing - local.diag()
    busiest = max(int(away.sum(0).max()), int(away.sum(1).max()))
    return Load(busiest, int(local.sum()) // size, floor_ms(moved, crossing, size, copy_rate, link_rate))


def measure(plan: Plan) -> None:
    """One rank's part: every rank runs all cases, rank 0 reports."""
    size, is_first = dist.get_world_size(), dist.get_rank() == 0
    if size > torch.cuda.device_count():
        raise ValueError(f"{size} ranks on {torch.cuda.device_count()} GPUs: the table of links needs a GPU for every rank")
    machine, rounds = examine(size, is_first), QUICK_ROUNDS if plan.quick else ROUNDS
    both_ways = copied_both_ways(rounds)
    sms = resident_sms(plan.sms, machine.sms, 1)
    traffic = {shape: traffic_of(shape, size) for shape in plan.shapes}
    buffer = Buffer(dist.group.WORLD, num_nvl_bytes=arena_bytes(traffic, len(sms)), timeout=TIMEOUT_SECONDS)
    if buffer.engine != "nvlink":
        raise DeepEPError(f"no table of links, these ranks cannot use nvlink: {'; '.join(buffer.engine_reasons)}")
    if is_first:
        print(f"{title(machine)}\n{about(machine)}\n{about_links(both_ways)}\n{HEADER}", flush=True)
    rows: list[Row] = []

    def run(calls: Callable[[Inputs], Iterable[Call]]) -> None:
        for shape in plan.shapes:
            loads = {key: load_of(traffic[shape], key, row, machine.copy_rate, both_ways) for key, row in widths(shape).items()}
            for call in calls(Inputs(shape, traffic[shape], *inputs(shape)[:3])):
                rows.append(_timed(call, shape, loads[call.key], rounds))
                if is_first:
                    print(line(rows[-1], both_ways), flush=True)
                del call
            gc.collect()
            torch.cuda.empty_cache()

    with torch.no_grad():
        run(lambda given: _ours_and_nccl(buffer, given, sms))
        staged = buffer.memory_stats().get("tensors staged", 0)
        if is_first:
            if staged:
                print(f"the arena was too small: {staged} results were staged and copied, so times above are too long")
            write(machine, both_ways, rounds, rows, plan.out)  # whatever may happen to the peer
        if plan.peer is not None:
            peer = bench_peer.Peer(plan.peer, max(s.hidden for s in plan.shapes), sms)
            run(lambda given: _peers(peer, given, sms))
            if is_first:
                write(machine, both_ways, rounds, rows, plan.out)
            peer.destroy()
    if is_first:
        print("\n".join(summary(rows, both_ways)), flush=True)
    dist.barrier()
    buffer.destroy()


def copied_both_ways(rounds: int) -> float:
    """Bytes a second out of every GPU while each copies 1 GiB to the next one, and so receives as much."""
    here = torch.cuda.current_device()
    source = torch.randint(256, (GIB,), dtype=torch.uint8, device="cuda")
    target = torch.empty(GIB, dtype=torch.uint8, device=torch.device("cuda", (here + 1) % dist.get_world_size()))
    # Such a copy runs on this GPU's stream, where the events are.
    ms = slowest_ms(lambda: target.copy_(source, non_blocking=True), CALLS, rounds)
    return 1e3 * GIB / ms


def arena_bytes(traffic: dict[Shape, Traffic], num_sms: int) -> int:
    """Peer-visible memory for a shape's tensors and for all that graphs keep: for every number of SMs bf16 and FP8 rows."""
    rows = {shape: int(t.received.max()) * 2 * shape.hidden for shape, t in traffic.items()}
    heap = 6 * max(rows.values()) + 2 * num_sms * GRAPH_CALLS * sum(rows.values()) + GIB
    return bytes_to_receive(heap)


# The cases --------------------------------------------------------------------------------------------------------------


def widths(shape: Shape) -> dict[str, int]:
    """Bytes of a row, by operation; FP8 where rows are whole blocks."""
    found = dict.fromkeys(OPERATIONS, 2 * shape.hidden)
    found["dispatch fp8"] = shape.hidden + 4 * (shape.hidden // fp8.BLOCK)
    if shape.hidden % fp8.BLOCK:
        del found["dispatch fp8"]
    return found


@dataclass(frozen=True)
class Inputs:
    """What every rank sends."""

    shape: Shape
    traffic: Traffic
    x: Tensor
    idx: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Call:
    """What is timed: `key` of `OPERATIONS` by whom, with how many SMs (0: not ours to say), and from a CUDA graph, too."""

    by: str
    key: str
    sms: int
    call: Callable[[], Any]
    graph: Callable[[], None] | None = None


def _timed(call: Call, shape: Shape, load: Load, rounds: int) -> Row:
    ms, of_graph = slowest_ms(call.call, CALLS, rounds), None
    if call.graph is not None:
        of_graph = slowest_ms(call.graph, CALLS // GRAPH_CALLS, rounds) / GRAPH_CALLS
    sizes = (load.link / 1e6, load.local / 1e6, load.floor_ms)
    return Row(call.by, OPERATIONS[call.key], shape.num_tokens, shape.hidden, call.sms, ms, of_graph, *sizes)


def _ours_and_nccl(buffer: Buffer, given: Inputs, sms: Sequence[int]) -> Iterable[Call]:
    x, idx, weights, num_experts = given.x, given.idx, given.weights, given.shape.num_experts
    rows = widths(given.shape)
    got = dispatch(x, idx, weights, buffer=buffer, num_experts=num_experts)
    handle, visible = got.handle, visible_copy(buffer, got.x)
    del got
    calls: dict[str, Callable[[], Any]] = {
        "dispatch": lambda: dispatch(x, buffer=buffer, handle=handle),
        "dispatch fresh": lambda: dispatch(x, idx, weights, buffer=buffer, num_experts=num_experts),
        "combine": lambda: combine(visible, handle),
    }
    if "dispatch fp8" in rows:
        pair = fp8.quantize_blocks(x)
        calls["dispatch fp8"] = lambda: dispatch(pair, buffer=buffer, handle=handle)
    for key, call in calls.items():
        if key != "dispatch fresh":  # NCCL knows no routing
            yield Call(NCCL, key, 0, _all_to_all(given.traffic, key, rows[key]))
        for n in sms:
            Buffer.set_num_sms(n)
            yield Call(OURS, key, n, call, None if key == "dispatch fresh" else captured(call, GRAPH_CALLS))


def _peers(peer: bench_peer.Peer, given: Inputs, sms: Sequence[int]) -> Iterable[Call]:
    for n in sms:
        calls = peer.calls(given.x, given.idx, given.weights, given.shape.num_experts, n)
        yield from (Call(PEER, key, n, calls[key]) for key in OPERATIONS if key in calls)


def _all_to_all(t: Traffic, key: str, width: int) -> Callable[[], Any]:
    """NCCL's exchange of the same rows, once per token and rank. They lie in order already and are not summed on the way back:
    what a user would have to do besides is not counted."""
    rank = dist.get_rank()
    give, take = t.from_to[rank].tolist(), t.from_to[:, rank].tolist()
    there, back = (take, give) if key == "combine" else (give, take)
    source = torch.randint(256, (sum(there), width), dtype=torch.uint8, device="cuda")
    target = torch.empty(sum(back), width, dtype=torch.uint8, device="cuda")
    return lambda: dist.all_to_all_single(target, source, back, there)
