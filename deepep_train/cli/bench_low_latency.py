"""The low-latency table of `bench`: dispatch and combine of small batches, replayed from CUDA graphs, beside their limits; and
how much a GEMM between a send and its hook is slowed."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepep_train.buffer import Buffer
from deepep_train.cli.bench_gpu import QUICK_ROUNDS, ROUNDS, captured, examine, inputs, slowest_ms
from deepep_train.cli.bench_model import Shape
from deepep_train.cli.bench_report import about, title, turns_warning
from deepep_train.errors import DeepEPError

DEFAULT_TOKENS = 128
CALLS = 10  # of a graph
REPLAYS = 5  # of a round
GEMM = 4096
TIMEOUT_SECONDS = 10.0  # after which a rank is masked, and the table given up
# Microseconds, for 8 ranks on one H100 under MPS, 128 tokens of 7168, top-8 of 256 experts.
LIMITS = {"dispatch FP8": 55.0, "combine bf16": 110.0}
LIMIT_SHAPE, LIMIT_RANKS = Shape(128, 7168, 256, 8), 8
MOST_SLOWED = 0.03


@dataclass(frozen=True)
class Plan:
    """What `bench` was asked for."""

    shape: Shape
    quick: bool
    out: Path


@dataclass(frozen=True)
class Row:
    """The median over rounds of the slowest rank's microseconds a call, and the least time for reading each input once and
    writing each output once."""

    name: str
    us: float
    floor_us: float
    limit_us: float | None


def measure(plan: Plan) -> None:
    """One rank's part: every rank runs all cases, rank 0 reports."""
    size, is_first, shape = dist.get_world_size(), dist.get_rank() == 0, plan.shape
    machine = examine(size, is_first)
    hint = Buffer.get_low_latency_rdma_size_hint(shape.num_tokens, shape.hidden, size, shape.num_experts)
    buffer = Buffer(dist.group.WORLD, num_rdma_bytes=hint, low_latency_mode=True, timeout=TIMEOUT_SECONDS)
    if buffer.engine != "low_latency":
        raise DeepEPError(f"these ranks cannot use the low-latency kernels: {'; '.join(buffer.engine_reasons)}")
    if is_first:
        print(f"{title(machine, shape)}\n{about(machine)}\n{'':28s}{'us':>9s}{'floor':>9s}{'limit':>9s}", flush=True)
    rounds = QUICK_ROUNDS if plan.quick else ROUNDS
    limited = machine.has_limits and shape == LIMIT_SHAPE and size == LIMIT_RANKS
    rows: list[Row] = []
    with torch.no_grad():
        x, idx, weights, _ = inputs(shape)
        for name, call, moved in _calls(buffer, shape, x, idx, weights):
            us = 1e3 * slowest_ms(captured(call, CALLS), REPLAYS, rounds) / CALLS
            _check_all_came(buffer, name)
            rows.append(Row(name, us, 1e6 * moved / machine.copy_rate, LIMITS.get(name) if limited else None))
            if is_first:
                limit = "" if rows[-1].limit_us is None else f"{rows[-1].limit_us:9.1f}"
                verdict = "" if not limit else "  met" if us <= (rows[-1].limit_us or 0) else "  MISSED"
                print(f"{name:28s}{us:9.1f}{rows[-1].floor_us:9.1f}{limit}{verdict}", flush=True)
        alone, beside = _overlap(buffer, shape, x, idx, 3 * rounds)
    if is_first:
        slowed = beside / alone - 1
        verdict = "met" if slowed <= MOST_SLOWED else "MISSED"
        print(
            f"GEMMs between send and hook: {beside:.3f} ms, alone {alone:.3f} ms: {slowed:+.1%}, limit +{MOST_SLOWED:.0%} "
            f"{verdict}"
        )
        if machine.takes_turns:
            print(turns_warning(machine))
        result = {"machine": asdict(machine), "work": asdict(shape), "rows": [asdict(row) for row in rows]}
        result["gemm_ms"] = {"alone": alone, "between send and hook": beside}
        (plan.out / "low_latency.json").write_text(json.dumps(result, indent=2) + "\n")
        print(f"wrote {plan.out}/low_latency.json")
    dist.barrier()
    buffer.destroy()


def _check_all_came(buffer: Buffer, name: str) -> None:
    """Raise, on every rank, if one was given up."""
    mask = torch.zeros(dist.get_world_size(), dtype=torch.int32, device="cuda")
    buffer.low_latency_query_mask_buffer(mask)
    given_up = mask.cpu()
    dist.all_reduce(given_up)
    if given_up.any():
        raise DeepEPError(f"{name}: waited {TIMEOUT_SECONDS:g} s in vain for ranks {given_up.nonzero().flatten().tolist()}")


def _calls(
    buffer: Buffer, shape: Shape, x: Tensor, idx: Tensor, weights: Tensor
) -> Iterator[tuple[str, Callable[[], Any], int]]:
    """What is timed, and the bytes, of all ranks that share the GPU, that it must move."""
    size = dist.get_world_size()
    picks = size * shape.num_tokens * shape.num_topk
    tokens, row = size * shape.num_tokens, 2 * shape.hidden

    def dispatch(use_fp8: bool) -> Any:
        return buffer.low_latency_dispatch(x, idx, shape.num_tokens, shape.num_experts, use_fp8=use_fp8)

    y, _, handle, _, _ = dispatch(False)
    visible = buffer.get_next_low_latency_combine_buffer(handle).copy_(y)

    def combine(rows: Tensor, zero_copy: bool) -> Any:
        return buffer.low_latency_combine(rows, idx, weights, handle, zero_copy=zero_copy)

    def combine_in_phases() -> None:
        hook = buffer.low_latency_combine(y, idx, weights, handle, return_recv_hook=True)[2]
        assert hook is not None
        hook()

    back = picks * row + tokens * row
    yield "combine bf16", lambda: combine(y, False), back
    yield "combine bf16, by hook", combine_in_phases, back
    yield "combine bf16, zero copy", lambda: combine(visible, True), back
    yield "dispatch FP8", lambda: dispatch(True), tokens * row + picks * (shape.hidden + shape.hidden // 32)
    yield "dispatch bf16", lambda: dispatch(False), tokens * row + picks * row


def _overlap(buffer: Buffer, shape: Shape, x: Tensor, idx: Tensor, rounds: int) -> tuple[float, float]:
    """Milliseconds of a row of GEMMs: alone, and between a send and its hook; medians of the slowest rank's."""
    a, b = (torch.randn(GEMM, GEMM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(2 * rounds + 4):
        between = number % 2
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        dist.barrier()
        torch.cuda.synchronize()
        hook = None
        if between:
            hook = buffer.low_latency_dispatch(x, idx, shape.num_tokens, shape.num_experts, return_recv_hook=True)[4]
        start.record()
        for _ in range(20):
            torch.mm(a, b, out=out)
        end.record()
        if hook is not None:
            hook()
        torch.cuda.synchronize()
        slowest = torch.tensor([start.elapsed_time(end)], dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        if number >= 4:
            times[between].append(slowest.item())
    return statistics.median(times[0]), statistics.median(times[1])
