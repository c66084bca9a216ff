"""`bench`: times dispatch and combine. With a GPU and the nvlink engine: every call beside the least time that its bytes
need, or, with one rank on each of several GPUs, GB/s over their links. Elsewhere: forward and backward, beside a plain
all-to-all of one row per (token, expert)."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepep_train.buffer import Buffer
from deepep_train.cli import bench_fp8, bench_gpu, bench_links, bench_low_latency, bench_megatron, bench_report, plain
from deepep_train.cli.bench_model import Shape
from deepep_train.cli.launch import run_ranks
from deepep_train.ops import combine, dispatch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STEPS = ("dispatch", "combine", "backward")
COMPARISON_DEFAULTS = {"num_processes": 2, "num_tokens": 2048, "hidden": 1024, "num_experts": 16, "num_topk": 4}
GPU_DEFAULTS = {"num_processes": 8, "num_tokens": 4096, "hidden": 7168, "num_experts": 256, "num_topk": 8}
GPU_SMS = (16, 4)
ITERATIONS, QUICK_ITERATIONS = 20, 3


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
    parser.add_argument(
        "--ranks",
        "--num-processes",
        dest="num_processes",
        type=int,
        help=_help("num_processes", "to start; torchrun's, if used"),
    )
    parser.add_argument("--tokens", "--num-tokens", dest="num_tokens", type=int, help=_help("num_tokens", "of each rank"))
    parser.add_argument("--hidden", type=int, help=_help("hidden", "elements of a row"))
    parser.add_argument(
        "--experts", "--num-experts", dest="num_experts", type=int, help=_help("num_experts", "of all ranks together")
    )
    parser.add_argument("--top-k", "--num-topk", dest="num_topk", type=int, help=_help("num_topk", "experts of a token"))
    parser.add_argument("--dtype", choices=DTYPES, help="of the comparison (default float32), which this option asks for")
    parser.add_argument(
        "--iterations", type=int, help=f"of the comparison (default {ITERATIONS}), which this option asks for on GPUs, too"
    )
    parser.add_argument("--engine", default="auto", help="of the comparison; all but auto and nvlink ask for it on GPUs, too")
    parser.add_argument(
        "--sms",
        type=_sms,
        help="of a rank: of the links (default 2,4,8,16,24), or of the GPU table, its largest for most lines (default 16,4)",
    )
    parser.add_argument(
        "--table",
        choices=("links", "gpu", "fp8", "low-latency"),
        help="links: GB/s between GPUs, by default where every rank has one; gpu: all calls, by default where ranks share one; "
        "fp8: from bf16 tokens to the experts' FP8 operand, beside Transformer Engine's permute and quantizer; "
        "low-latency: the low-latency kernels with few tokens",
    )
    parser.add_argument(
        "--peer", type=Path, metavar="FOLDER", help="on GPUs: measure the DeepEP V1 built there (deep_ep/) beside"
    )
    parser.add_argument(
        "--megatron",
        action="store_true",
        help="a Megatron MoE layer's step instead, beside alltoall's; on GPUs if there is one a rank",
    )
    parser.add_argument("--quick", action="store_true", help="a coarse answer: one shape, few rounds")
    parser.add_argument("--deadline", type=float, default=480.0, help="seconds after which the GPU table is given up")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for bench.json and bench.png")
    parser.set_defaults(run=run)


def _help(name: str, what: str) -> str:
    return f"{what} (default {COMPARISON_DEFAULTS[name]}, {GPU_DEFAULTS[name]} on GPUs)"


def _sms(text: str) -> tuple[int, ...]:
    counts = tuple(int(part) for part in text.split(","))
    if any(n < 2 or n % 2 for n in counts):
        raise argparse.ArgumentTypeError(f"{text!r} must be even numbers of at least 2, separated by commas")
    return counts


def run(args: argparse.Namespace) -> int:
    if args.megatron:
        return _run_megatron(args)
    on_gpus = _takes_gpus(args)
    table = _table(args) if on_gpus else ""
    if args.peer is not None and not on_gpus:
        raise ValueError("--peer is measured on GPUs only")
    if table == "low-latency" and args.num_tokens is None:
        args.num_tokens = bench_low_latency.DEFAULT_TOKENS
    if table == "links" and args.num_processes is None:
        args.num_processes = torch.cuda.device_count()
    shapes = [(n, h) for n in _one_or(args.num_tokens, bench_links.TOKENS) for h in _one_or(args.hidden, bench_links.HIDDEN)]
    for name, value in (GPU_DEFAULTS if on_gpus else COMPARISON_DEFAULTS).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    iterations = args.iterations if args.iterations is not None else QUICK_ITERATIONS if args.quick else ITERATIONS
    dtype = args.dtype or "float32"
    work = Work(args.num_tokens, args.hidden, args.num_experts, args.num_topk, dtype, iterations, args.engine)
    for name in ("num_tokens", "hidden", "num_topk", "iterations"):
        if getattr(work, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(work, name)}")
    if args.num_processes < 1 or work.num_experts % args.num_processes or work.num_experts < max(work.num_topk, 1):
        raise ValueError(
            f"--num-experts {work.num_experts} must be divisible by --num-processes {args.num_processes} "
            f"and at least --num-topk {work.num_topk}"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    if table == "links":
        all_shapes = tuple(Shape(n, h, work.num_experts, work.num_topk) for n, h in (shapes[:1] if args.quick else shapes))
        links = bench_links.Plan(all_shapes, args.sms or bench_links.SMS, args.quick, args.out, args.peer)
        run_ranks(args.num_processes, bench_links.measure, links, deadline=args.deadline)
    elif table == "low-latency":
        shape = Shape(work.num_tokens, work.hidden, work.num_experts, work.num_topk)
        small = bench_low_latency.Plan(shape, args.quick, args.out)
        run_ranks(args.num_processes, bench_low_latency.measure, small, deadline=args.deadline)
    elif table == "fp8":
        shape = Shape(work.num_tokens, work.hidden, work.num_experts, work.num_topk)
        fp8_plan = bench_fp8.Plan(shape, max(args.sms or GPU_SMS), args.quick, args.out)
        run_ranks(args.num_processes, bench_fp8.measure, fp8_plan, deadline=args.deadline)
    elif on_gpus:
        shape = Shape(work.num_tokens, work.hidden, work.num_experts, work.num_topk)
        plan = bench_gpu.Plan(shape, args.sms or GPU_SMS, args.quick, args.out, args.peer)
        run_ranks(args.num_processes, bench_gpu.measure, plan, deadline=args.deadline)
    else:
        run_ranks(args.num_processes, measure, work, args.out)
    return 0


def _run_megatron(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("megatron") is None:
        raise ValueError("--megatron needs megatron-core: pip install megatron-core")
    names = ("num_tokens", "hidden", "num_experts", "num_topk")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    quick = bench_megatron.QUICK_ITERATIONS if args.quick else bench_megatron.ITERATIONS
    iterations = args.iterations if args.iterations is not None else quick
    args.out.mkdir(parents=True, exist_ok=True)
    ranks = args.num_processes if args.num_processes is not None else COMPARISON_DEFAULTS["num_processes"]
    has_gpus = torch.cuda.device_count() >= ranks > 1  # NCCL refuses ranks that share one
    layer = replace(bench_megatron.ON_GPUS if has_gpus else bench_megatron.Layer(), **given)
    run_ranks(ranks, bench_megatron.measure, layer, iterations, args.out, device="" if has_gpus else "cpu")
    return 0


def _takes_gpus(args: argparse.Namespace) -> bool:
    """Whether to make the GPU table: unless it cannot be made, or an option of the comparison was given."""
    if args.engine not in ("auto", "nvlink") or args.dtype is not None or args.iterations is not None:
        return False
    if obstacle := bench_gpu.obstacle():
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"no GPU table: {obstacle}; comparing with a plain all-to-all instead", file=sys.stderr)
        return False
    return True


def _table(args: argparse.Namespace) -> str:
    """ "links" where every rank has a GPU to itself, unless asked otherwise."""
    gpus = torch.cuda.device_count()
    ranks = int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else args.num_processes or gpus
    return args.table or ("links" if 1 < ranks <= gpus else "gpu")


def _one_or(given: int | None, default: tuple[int, ...]) -> tuple[int, ...]:
    return default if given is None else (given,)


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
    plt = bench_report.pyplot()
    if plt is not None:
        _plot(plt, work, timings, size, out / "bench.png")
    print(f"wrote {out}/bench.json" + ("" if plt is None else f" and {out}/bench.png"))


def _plot(plt: Any, work: Work, timings: list[Timing], size: int, path: Path) -> None:
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
