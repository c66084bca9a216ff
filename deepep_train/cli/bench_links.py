"""The table of `bench` on several GPUs, one rank each: GB/s over the links, beside what the links carry, NCCL and DeepEP V1."""

from __future__ import annotations

import datetime
import gc
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

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
from deepep_train.cli.bench_model import GRAPH_CALLS, Shape, Traffic, floor_ms, resident_sms, rows_moved, traffic_of
from deepep_train.cli.bench_report import CALLS, Machine, about, pyplot
from deepep_train.errors import DeepEPError
from deepep_train.ops import combine, dispatch

TOKENS, HIDDEN, SMS = (4096, 8192), (7168, 2048), (2, 4, 8, 16, 24)
OURS, NCCL = "deepep_train", "NCCL all_to_all"
OPERATIONS = {
    "dispatch": "dispatch bf16, cached",
    "dispatch fp8": "dispatch FP8 + scales, cached",
    "dispatch fresh": "dispatch bf16, fresh",
    "combine": "combine bf16, peer-visible",
}
ENOUGH = 0.95  # of the best rate: fewer SMs that reach it are the better choice


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


@dataclass(frozen=True)
class Row:
    """One line: the median over rounds of the slowest rank's time of a call.

    Attributes:
        graph_ms: of the same call from a CUDA graph, which no Python slows down; None if not measured.
        link_mb, local_mb, floor_ms: see `Load`.
    """

    by: str
    operation: str
    num_tokens: int
    hidden: int
    sms: int
    ms: float
    graph_ms: float | None
    link_mb: float
    local_mb: float
    floor_ms: float

    @property
    def best_ms(self) -> float:
        return self.ms if self.graph_ms is None else min(self.ms, self.graph_ms)

    @property
    def link_rate(self) -> float:
        """GB/s."""
        return self.link_mb / self.best_ms


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
    peer = None if plan.peer is None else bench_peer.Peer(plan.peer, max(s.hidden for s in plan.shapes), sms)
    if is_first:
        print(f"{title(machine)}\n{about(machine)}\n{about_links(both_ways)}\n{HEADER}", flush=True)
    rows = []
    with torch.no_grad():
        for shape in plan.shapes:
            for row in _rows(buffer, shape, traffic[shape], sms, peer, rounds, machine.copy_rate, both_ways):
                rows.append(row)
                if is_first:
                    print(line(row, both_ways), flush=True)
            gc.collect()
            torch.cuda.empty_cache()
    staged = buffer.memory_stats().get("tensors staged", 0)
    if is_first:
        if staged:
            print(f"the arena was too small: {staged} results were staged and copied, so times above are too long")
        print("\n".join(summary(rows, both_ways)))
        write(machine, both_ways, rounds, rows, plan.out)
    dist.barrier()
    if peer is not None:
        peer.destroy()
    buffer.destroy()


def copied_both_ways(rounds: int) -> float:
    """Bytes a second out of every GPU while each copies 1 GiB to the next one, and so receives as much."""
    here = torch.cuda.current_device()
    source = torch.zeros(GIB, dtype=torch.uint8, device="cuda")
    target = torch.empty(GIB, dtype=torch.uint8, device=torch.device("cuda", (here + 1) % dist.get_world_size()))
    # Such a copy runs on this GPU's stream, where the events are.
    ms = slowest_ms(lambda: target.copy_(source, non_blocking=True), CALLS, rounds)
    return 1e3 * GIB / ms


def arena_bytes(traffic: dict[Shape, Traffic], num_sms: int) -> int:
    """Peer-visible memory for a shape's tensors and for all that graphs keep: for every number of SMs bf16 and FP8 rows."""
    rows = {shape: int(t.received.max()) * 2 * shape.hidden for shape, t in traffic.items()}
    heap = 6 * max(rows.values()) + 2 * num_sms * GRAPH_CALLS * sum(rows.values()) + GIB
    return heap * 4 // 3  # a quarter of the arena is staging


# The cases --------------------------------------------------------------------------------------------------------------


def _rows(
    buffer: Buffer,
    shape: Shape,
    t: Traffic,
    sms: Sequence[int],
    peer: bench_peer.Peer | None,
    rounds: int,
    copy_rate: float,
    link_rate: float,
) -> Iterable[Row]:
    x, idx, weights, _ = inputs(shape)
    has_fp8 = shape.hidden % fp8.BLOCK == 0
    widths = dict.fromkeys(OPERATIONS, 2 * shape.hidden)
    widths["dispatch fp8"] = shape.hidden + 4 * (shape.hidden // fp8.BLOCK)
    loads = {key: load_of(t, key, width, copy_rate, link_rate) for key, width in widths.items()}

    def timed(by: str, key: str, n: int, call: Callable[[], Any], graph: Callable[[], None] | None = None) -> Row:
        ms, of_graph, load = slowest_ms(call, CALLS, rounds), None, loads[key]
        if graph is not None:
            of_graph = slowest_ms(graph, CALLS // GRAPH_CALLS, rounds) / GRAPH_CALLS
        name, sizes = OPERATIONS[key], (load.link / 1e6, load.local / 1e6, load.floor_ms)
        return Row(by, name, shape.num_tokens, shape.hidden, n, ms, of_graph, *sizes)

    got = dispatch(x, idx, weights, buffer=buffer, num_experts=shape.num_experts)
    handle, visible = got.handle, visible_copy(buffer, got.x)
    del got
    calls: dict[str, Callable[[], Any]] = {"dispatch": lambda: dispatch(x, buffer=buffer, handle=handle)}
    if has_fp8:
        pair = fp8.quantize_blocks(x)
        calls["dispatch fp8"] = lambda: dispatch(pair, buffer=buffer, handle=handle)
    calls["dispatch fresh"] = lambda: dispatch(x, idx, weights, buffer=buffer, num_experts=shape.num_experts)
    calls["combine"] = lambda: combine(visible, handle)
    exchanges = _all_to_all(t, widths if has_fp8 else {k: w for k, w in widths.items() if k != "dispatch fp8"})
    for key, call in calls.items():
        if key in exchanges:
            yield timed(NCCL, key, 0, exchanges[key])
        for n in sms:
            Buffer.set_num_sms(n)
            yield timed(OURS, key, n, call, None if key == "dispatch fresh" else captured(call, GRAPH_CALLS))
    if peer is not None:
        for n in sms:
            theirs = peer.calls(x, idx, weights, shape.num_experts, n)
            for key in calls:
                yield timed(bench_peer.NAME, key, n, theirs[key])


def _all_to_all(t: Traffic, widths: dict[str, int]) -> dict[str, Callable[[], Any]]:
    """NCCL's exchange of the same rows, once per token and rank. They lie in order already and are not summed on the way back:
    what a user would have to do besides is not counted."""
    rank = dist.get_rank()
    give, take = t.from_to[rank].tolist(), t.from_to[:, rank].tolist()

    def exchange(key: str) -> Callable[[], Any]:
        there, back = (take, give) if key == "combine" else (give, take)
        source = torch.zeros(sum(there), widths[key], dtype=torch.uint8, device="cuda")
        target = torch.empty(sum(back), widths[key], dtype=torch.uint8, device="cuda")
        return lambda: dist.all_to_all_single(target, source, back, there)

    return {key: exchange(key) for key in widths if key != "dispatch fresh"}


# The report -------------------------------------------------------------------------------------------------------------

HEADER = (
    f"{'':17s}{'':31s}{'tokens':>7s}{'hidden':>7s}{'SMs':>4s}{'ms':>8s}{'graph':>8s}{'floor':>8s}"
    f"{'link MB':>9s}{'local MB':>9s}{'GB/s':>7s}{'of link':>8s}"
)


def title(machine: Machine) -> str:
    return f"{machine.ranks} ranks on {machine.num_devices} × {machine.device}, one each"


def about_links(both_ways: float) -> str:
    return (
        f"peer copies, every GPU sending and receiving at once: {both_ways / 1e9:.0f} GB/s each way. GB/s: rows to other GPUs "
        "over the time of a call (the graph's if that is shorter); local MB: rows that stay on their GPU"
    )


def line(row: Row, both_ways: float) -> str:
    """A row under `HEADER`."""
    graph = "" if row.graph_ms is None else f"{row.graph_ms:.3f}"
    share = 1e9 * row.link_rate / both_ways
    return (
        f"{row.by:17s}{row.operation:31s}{row.num_tokens:7d}{row.hidden:7d}{row.sms or '':>4}{row.ms:8.3f}{graph:>8s}"
        f"{row.floor_ms:8.3f}{row.link_mb:9.1f}{row.local_mb:9.1f}{row.link_rate:7.0f}{share:8.0%}"
    )


def summary(rows: Sequence[Row], both_ways: float) -> list[str]:
    """For every operation and shape: everyone's best rate, and our fewest SMs that are nearly as good as our best."""
    lines = []
    for key in dict.fromkeys((r.operation, r.num_tokens, r.hidden) for r in rows):
        same = [r for r in rows if (r.operation, r.num_tokens, r.hidden) == key]
        best = {by: max((r for r in same if r.by == by), key=lambda r: r.link_rate) for by in dict.fromkeys(r.by for r in same)}
        parts = [f"{by} {r.link_rate:.0f}" + (f" ({r.sms} SMs)" if r.sms else "") for by, r in best.items()]
        ours = [r.sms for r in same if r.by == OURS and r.link_rate >= ENOUGH * best[OURS].link_rate]
        enough = f"; {ENOUGH:.0%} of it with {min(ours)} SMs" if ours else ""
        what = f"{key[0]}, {key[1]} × {key[2]}"
        lines.append(f"best GB/s over the link ({both_ways / 1e9:.0f}), {what}: {', '.join(parts)}{enough}")
    return lines


def write(machine: Machine, both_ways: float, rounds: int, rows: Sequence[Row], out: Path) -> None:
    """bench_links.json and, where matplotlib is installed, bench_links.png."""
    result = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python -m deepep_train", *sys.argv[1:]]),
        "machine": asdict(machine),
        "peer copies, both ways at once, bytes a second each way": round(both_ways),
        "rounds": rounds,
        "calls": CALLS,
        "rows": [_as_json(row, both_ways) for row in rows],
    }
    (out / "bench_links.json").write_text(json.dumps(result, indent=1) + "\n")
    plt = pyplot()
    if plt is not None:
        plot(plt, title(machine), both_ways, rows, out / "bench_links.png")
    print(f"wrote {out}/bench_links.json" + ("" if plt is None else f" and {out}/bench_links.png"))


def _as_json(row: Row, both_ways: float) -> dict[str, Any]:
    numbers = asdict(row) | {"link_gb_s": row.link_rate, "share_of_link": 1e9 * row.link_rate / both_ways}
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in numbers.items()}


def plot(plt: Any, heading: str, both_ways: float, rows: Sequence[Row], path: Path) -> None:
    """GB/s over SMs, a field for every operation and shape."""
    operations = list(dict.fromkeys(r.operation for r in rows))
    shapes = list(dict.fromkeys((r.num_tokens, r.hidden) for r in rows))
    size = (3.2 * len(operations), 2.6 * len(shapes) + 0.6)
    figure, grid = plt.subplots(len(shapes), len(operations), figsize=size, squeeze=False, sharey=True, layout="constrained")
    for axes, shape in zip(grid, shapes, strict=True):
        for ax, operation in zip(axes, operations, strict=True):
            same = [r for r in rows if r.operation == operation and (r.num_tokens, r.hidden) == shape]
            ax.axhline(both_ways / 1e9, color="black", linewidth=0.8, label="peer copies")
            for by, color in ((OURS, "tab:blue"), (bench_peer.NAME, "tab:orange"), (NCCL, "tab:green")):
                points = sorted((r.sms, r.link_rate) for r in same if r.by == by)
                if points and points[0][0] == 0:
                    ax.axhline(points[0][1], color=color, linestyle="--", label=by)
                elif points:
                    ax.plot(*zip(*points, strict=True), "o-", color=color, label=by)
            ax.set_title(f"{operation}, {shape[0]} × {shape[1]}", fontsize=8)
            ax.set_ylim(bottom=0)
    for ax in grid[-1]:
        ax.set_xlabel("SMs")
    for ax in grid[:, 0]:
        ax.set_ylabel("GB/s to other GPUs")
    grid[0][0].legend(fontsize=7)
    figure.suptitle(heading, fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)
