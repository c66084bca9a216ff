"""`bench`: times dispatch and combine, forward and backward, beside a plain all-to-all of one row per (token, expert)."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepep_train.buffer import Buffer
from deepep_train.cli import plain
from deepep_train.cli.launch import run_ranks
from deepep_train.ops import combine, dispatch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STEPS = ("dispatch", "combine", "backward")


@dataclass(frozen=True)
class Work:
    """What is exchanged; rows are chosen uniformly at random from a fixed seed."""

    num_tokens: int
    hidden: int
    num_experts: int
    num_topk: int
    dtype: str
    iterations: int
    engine: str


@dataclass(frozen=True)
class Timing:
    """Medians over iterations of the slowest rank's time, in milliseconds, and the rows that crossed between ranks."""

    name: str
    dispatch: float
    combine: float
    backward: float
    total: float
    rows_crossing: int
    mib_crossing: float


def add_parser(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser("bench", help=__doc__, description=__doc__)
    parser.add_argument("--num-processes", type=int, default=2, help="ranks to start (default 2); torchrun's, if it is used")
    parser.add_argument("--num-tokens", type=int, default=2048, help="tokens of each rank")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--num-experts", type=int, default=16, help="of all ranks together")
    parser.add_argument("--num-topk", type=int, default=4)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for bench.json and bench.png")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    work = Work(args.num_tokens, args.hidden, args.num_experts, args.num_topk, args.dtype, args.iterations, args.engine)
    for name in ("num_tokens", "hidden", "num_topk", "iterations"):
        if getattr(work, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(work, name)}")
    if args.num_processes < 1 or work.num_experts % args.num_processes or work.num_experts < max(work.num_topk, 1):
        raise ValueError(
            f"--num-experts {work.num_experts} must be divisible by --num-processes {args.num_processes} "
            f"and at least --num-topk {work.num_topk}"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    run_ranks(args.num_processes, measure, work, args.out)
    return 0


def measure(work: Work, out: Path) -> None:
    """One rank's part. Candidates take turns within each iteration, so that a disturbance hits all of them."""
    from tqdm import tqdm

    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    rank, size = dist.get_rank(), dist.get_world_size()
    buffer = Buffer(dist.group.WORLD, engine=work.engine)
    generator = torch.Generator().manual_seed(1000 + rank)
    x = torch.randn(work.num_tokens, work.hidden, generator=generator).to(device, DTYPES[work.dtype]).requires_grad_()
    scores = torch.rand(work.num_tokens, work.num_experts, generator=generator)
    topk_idx = scores.topk(work.num_topk, dim=1).indices.to(device)
    weights = torch.rand(work.num_tokens, work.num_topk, generator=generator).to(device).requires_grad_()
    grad = torch.randn(work.num_tokens, work.hidden, generator=generator).to(device, DTYPES[work.dtype])

    def ours(layout: str) -> Callable[[], tuple[Any, Callable[[Any], Tensor]]]:
        def go() -> tuple[Any, Callable[[Any], Tensor]]:
            got = dispatch(x, topk_idx, weights, buffer=buffer, num_experts=work.num_experts, layout=layout)
            return got, lambda got: combine(got.x, got.handle)

        return go

    def theirs() -> tuple[Any, Callable[[Any], Tensor]]:
        got = plain.dispatch(x, topk_idx, work.num_experts)
        return got, lambda got: plain.combine(got.rows, got)

    candidates = {"plain all-to-all": theirs, "rank layout": ours("rank"), "expert layout": ours("expert")}
    times: dict[str, list[list[float]]] = {name: [] for name in candidates}
    for iteration in tqdm(range(work.iterations + 2), desc="bench", disable=rank != 0, file=sys.stderr):
        for name, candidate in candidates.items():
            x.grad = weights.grad = None
            row = _time_one(candidate, grad, device)
            slowest = torch.tensor(row)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            if iteration >= 2:  # the first two warm up
                times[name].append(slowest.tolist())
    crossing = _rows_crossing(topk_idx, work.num_experts, rank, size)
    if rank == 0:
        timings = [_summary(name, rows, crossing[name == "plain all-to-all"], work) for name, rows in times.items()]
        report(work, timings, size, buffer.engine, device, out)


def _time_one(candidate: Callable[[], tuple[Any, Callable[[Any], Tensor]]], grad: Tensor, device: torch.device) -> list[float]:
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    dist.barrier()
    start = now()
    got, back = candidate()
    dispatched = now()
    z = back(got)
    combined = now()
    z.backward(grad)
    end = now()
    return [1e3 * t for t in (dispatched - start, combined - dispatched, end - combined, end - start)]


def _rows_crossing(topk_idx: Tensor, num_experts: int, rank: int, size: int) -> tuple[int, int]:
    """Rows that this rank sends to others: (once per rank, once per expert)."""
    owner = topk_idx // (num_experts // size)
    elsewhere = [r for r in range(size) if r != rank]
    once = sum(int((owner == r).any(1).sum()) for r in elsewhere)
    return once, int((owner != rank).sum())


def _summary(name: str, rows: list[list[float]], crossing: int, work: Work) -> Timing:
    dispatch_ms, combine_ms, backward_ms, total_ms = (round(statistics.median(c), 3) for c in zip(*rows, strict=True))
    mib = crossing * work.hidden * DTYPES[work.dtype].itemsize / 2**20
    return Timing(name, dispatch_ms, combine_ms, backward_ms, total_ms, crossing, round(mib, 2))


def report(work: Work, timings: list[Timing], size: int, engine: str, device: torch.device, out: Path) -> None:
    """Print the table; write bench.json and bench.png."""
    base = timings[0].total
    print(f"{size} ranks, {engine} engine, {device.type}; {work}")
    print(f"{'':18s}{'dispatch':>10s}{'combine':>10s}{'backward':>10s}{'total ms':>10s}{'ratio':>8s}{'MiB sent':>10s}")
    for t in timings:
        ratio = t.total / base
        print(
            f"{t.name:18s}{t.dispatch:10.2f}{t.combine:10.2f}{t.backward:10.2f}{t.total:10.2f}{ratio:8.2f}{t.mib_crossing:10.1f}"
        )
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    result = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python -m deepep_train", *sys.argv[1:]]),
        "machine": {"device": name, "python": platform.python_version(), "torch": torch.__version__},
        "ranks": size,
        "engine": engine,
        "work": asdict(work),
        "timings_ms": [asdict(t) | {"ratio_to_plain": round(t.total / base, 4)} for t in timings],
    }
    (out / "bench.json").write_text(json.dumps(result, indent=2) + "\n")
    _plot(work, timings, size, out / "bench.png")
    print(f"wrote {out}/bench.json and {out}/bench.png")


def _plot(work: Work, timings: list[Timing], size: int, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
    left = [0.0] * len(timings)
    names = [t.name for t in timings]
    for step in STEPS:
        widths = [getattr(t, step) for t in timings]
        axes.barh(names, widths, left=left, label=step)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("median time of the slowest rank, ms")
    axes.set_title(
        f"{size} ranks, {work.num_tokens} tokens × {work.hidden} {work.dtype}, top-{work.num_topk} of {work.num_experts}",
        fontsize=10,
    )
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
