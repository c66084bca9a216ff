"""`bench --table fp8`: from bf16 tokens to an operand that the experts' grouped GEMM reads, in one run: quantized once and
dispatched into expert layout; and dispatched as they are into rank layout, permuted and quantized by Transformer Engine."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepep_train import fp8
from deepep_train.buffer import Buffer
from deepep_train.cli.bench_gpu import QUICK_ROUNDS, ROUNDS, TIMEOUT_SECONDS, examine, inputs, slowest_ms
from deepep_train.cli.bench_model import ALIGNMENT, Shape, resident_sms, traffic_of
from deepep_train.cli.bench_report import CALLS, about, title
from deepep_train.engines.arena_sizes import bytes_to_receive
from deepep_train.errors import DeepEPError
from deepep_train.fp8.te_present import has_te_kernels
from deepep_train.ops import combine, dispatch

OUT_FEATURES = 2048  # of the experts' first linear
COST_LIMIT, BYTES_LIMIT = 0.30, 0.53


@dataclass(frozen=True)
class Plan:
    """What `bench --table fp8` was asked for; `sms` of a rank."""

    shape: Shape
    sms: int
    quick: bool
    out: Path


def measure(plan: Plan) -> None:
    """One rank's part: every rank runs both sides, rank 0 reports."""
    device = torch.device("cuda", torch.cuda.current_device())
    if not has_te_kernels(device, fp8.Recipe.BLOCK):
        raise DeepEPError("bench --table fp8 needs Transformer Engine and an SM90 GPU")
    num_ranks, is_first = dist.get_world_size(), dist.get_rank() == 0
    machine = examine(num_ranks, is_first)
    buffer = Buffer(dist.group.WORLD, num_nvl_bytes=_arena_bytes(plan.shape, num_ranks), timeout=TIMEOUT_SECONDS)
    if buffer.engine != "nvlink":
        raise DeepEPError(f"no FP8 table, these ranks cannot use nvlink: {'; '.join(buffer.engine_reasons)}")
    sms = resident_sms((plan.sms,), machine.sms, -(-num_ranks // machine.num_devices))[0]
    Buffer.set_num_sms(sms)
    with torch.no_grad():
        calls, ratio = _calls(buffer, plan.shape)
        rounds = QUICK_ROUNDS if plan.quick else ROUNDS
        ms = {name: slowest_ms(call, CALLS, rounds) for name, call in calls.items()}
    staged = buffer.memory_stats().get("tensors staged", 0)
    if is_first:
        _report(plan, title(machine, plan.shape), about(machine), sms, ms, ratio, staged, asdict(machine))
    dist.barrier()
    del calls
    buffer.destroy()


def _arena_bytes(shape: Shape, num_ranks: int) -> int:
    """Two results of the dispatch of either side, the input and result of combine's gradient, and what the linear takes."""
    t = traffic_of(shape, num_ranks)
    padded = int(t.expert_rows.max()) + ALIGNMENT * (shape.num_experts // num_ranks)
    rows = 2 * int(t.received.max()) * shape.hidden * 2 + (4 + 8) * padded * shape.hidden
    return bytes_to_receive(rows + (256 << 20))


def _calls(buffer: Buffer, shape: Shape) -> tuple[dict[str, Callable[[], Any]], float]:
    """What is timed, by name; and the bytes of a row in FP8, scales included, over those in bf16."""
    import transformer_engine.pytorch as te

    from deepep_train.fp8 import gemm_te

    x, idx, weights, _ = inputs(shape)
    how: dict[str, Any] = {"buffer": buffer, "num_experts": shape.num_experts}
    num_local = shape.num_experts // dist.get_world_size()
    generator = torch.Generator("cuda").manual_seed(7)
    linear = [
        torch.randn(OUT_FEATURES, shape.hidden, generator=generator, device="cuda", dtype=torch.bfloat16)
        for _ in range(num_local)
    ]
    operands = gemm_te.Operands(linear, fp8.Recipe.BLOCK, False, torch.float8_e4m3fn)
    del linear

    def product(rows: Any, splits: tuple[int, ...]) -> Tensor:
        out = torch.empty(sum(splits), OUT_FEATURES, dtype=torch.bfloat16, device="cuda")
        return operands.forward(rows, out, splits)

    def ours() -> tuple[Any, tuple[int, ...]]:
        got = dispatch(fp8.quantize(x), idx, weights, layout="expert", alignment=ALIGNMENT, **how)
        return gemm_te.Received(got.x), got.x.splits

    # Masks and counts are made here once, so that only the permutation and the quantizer are timed beside the dispatch.
    got = dispatch(x, idx, weights, **how)
    assert got.topk_idx is not None
    local = torch.where(got.topk_idx < 0, num_local, got.topk_idx)
    mask = torch.zeros(got.x.size(0), num_local + 1, dtype=torch.int32, device="cuda").scatter_(1, local, 1)
    mask = mask[:, :num_local].contiguous()
    probs = mask.float()
    counts = mask.sum(0).to(torch.int64)
    splits = tuple(-(-n // ALIGNMENT) * ALIGNMENT for n in counts.tolist())
    quantizers = [gemm_te.quantizer(fp8.Recipe.BLOCK, torch.float8_e4m3fn)] * num_local
    del got, local

    def theirs() -> tuple[Any, tuple[int, ...]]:
        got = dispatch(x, idx, weights, **how)
        rows, *_ = te.moe_permute_and_pad_with_probs(got.x, probs, mask, counts, ALIGNMENT)
        return gemm_te.Rows(gemm_te.tex.split_quantize(rows, list(splits), quantizers)), splits

    _compare(ours(), theirs())
    q = fp8.quantize(x)
    wire = q.to_wire()
    assert wire.scales is not None
    handle = dispatch(q, idx, weights, layout="expert", alignment=ALIGNMENT, **how).handle
    calls: dict[str, Callable[[], Any]] = {
        "quantize": lambda: fp8.quantize(x),
        "FP8 dispatch to experts, fresh": lambda: dispatch(q, idx, weights, layout="expert", alignment=ALIGNMENT, **how),
        "FP8 dispatch to experts, cached": lambda: dispatch(q, buffer=buffer, handle=handle),
        "quantize + FP8 dispatch to experts": ours,
        "bf16 dispatch to ranks": lambda: dispatch(x, idx, weights, **how),
        "bf16 dispatch to ranks + permute + quantize": theirs,
        "quantize + FP8 dispatch + forward GEMM": lambda: product(*ours()),
        "bf16 dispatch + permute + quantize + forward GEMM": lambda: product(*theirs()),
    }
    grad = torch.randn_like(x)
    calls["combine's gradient, bf16"] = _backward_of_combine(buffer, handle, grad, None)
    calls["combine's gradient, FP8"] = _backward_of_combine(buffer, handle, grad, torch.float8_e4m3fn)
    calls |= _parts_of_a_linear(dispatch(q, buffer=buffer, handle=handle).x, operands)
    return calls, (q.data[0].nbytes + wire.scales[0].numel() * 4) / x[0].nbytes


def _parts_of_a_linear(q: fp8.Quantized, operands: Any) -> dict[str, Callable[[], Any]]:
    """The first linear's forward and backward pass on what arrived, piece by piece; the wgrad's operand in its two steps."""
    from deepep_train.fp8 import gemm_te

    rows, splits = gemm_te.Received(q), q.splits
    out = torch.empty(sum(splits), OUT_FEATURES, dtype=torch.bfloat16, device="cuda")
    grad, dx = torch.randn_like(out), torch.empty(q.data.shape, dtype=torch.bfloat16, device="cuda")
    g = operands.rows(grad, splits, torch.float8_e4m3fn, True)
    again = gemm_te.Received(q)
    again.columnwise()
    dw = [torch.empty(OUT_FEATURES, q.data.size(1), dtype=torch.bfloat16, device="cuda") for _ in splits]
    return {
        "linear: forward GEMM": lambda: operands.forward(rows, out, splits),
        "linear: output's gradient quantized both ways": lambda: operands.rows(grad, splits, torch.float8_e4m3fn, True),
        "linear: dgrad GEMM": lambda: operands.input_gradient(g, dx, splits),
        "linear: wgrad's operand, dequantized": q.dequantize,
        "linear: wgrad's operand, dequantized and quantized": lambda: gemm_te.Received(q).columnwise(),
        "linear: wgrad GEMM": lambda: operands.weight_gradient(again, g, dw, splits),
    }


def _backward_of_combine(buffer: Buffer, handle: Any, grad: Tensor, grad_dtype: torch.dtype | None) -> Callable[[], Any]:
    with torch.enable_grad():
        y = buffer.empty((handle.plan.num_rows, grad.size(1)), torch.bfloat16, "cuda").zero_().requires_grad_()
        z = combine(y, handle, grad_dtype=grad_dtype)
    return lambda: torch.autograd.grad(z, y, grad, retain_graph=True)


def _compare(ours: Any, theirs: Any) -> None:
    """Both sides must come to the same operand, bit for bit."""
    (a, a_splits), (b, b_splits) = ours, theirs
    same = a_splits == b_splits
    for mine, other, m in zip(a.rowwise, b.rowwise, a_splits, strict=True):
        same = same and torch.equal(mine._rowwise_data, other._rowwise_data)
        same = same and torch.equal(mine._rowwise_scale_inv[:, :m], other._rowwise_scale_inv[:, :m])
    if not same:
        raise DeepEPError("bench --table fp8: the two sides give different operands")


def _report(
    plan: Plan, head: str, about_machine: str, sms: int, ms: dict[str, float], ratio: float, staged: int, machine: Any
) -> None:
    cost = ms["quantize + FP8 dispatch to experts"] / ms["bf16 dispatch to ranks + permute + quantize"]
    print(f"{head}\n{about_machine}\n{sms} SMs a rank; the slowest rank's time of a call, median over rounds")
    for name, value in ms.items():
        print(f"{name:55s}{value:9.3f} ms")
    print(f"operand from bf16 tokens, over the other way: {cost:.3f} (limit {COST_LIMIT})")
    print(f"bytes of a row over bf16's: {ratio:.4f} (limit {BYTES_LIMIT})")
    if staged:
        print(f"the arena was too small: {staged} results were staged and copied, so times above are too long")
    result = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python -m deepep_train", *sys.argv[1:]]),
        "machine": machine,
        "shape": asdict(plan.shape),
        "sms": sms,
        "out_features": OUT_FEATURES,
        "ms": {name: round(value, 4) for name, value in ms.items()},
        "cost": round(cost, 4),
        "cost_limit": COST_LIMIT,
        "bytes": round(ratio, 4),
        "bytes_limit": BYTES_LIMIT,
        "staged": staged,
    }
    (plan.out / "bench_fp8.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {plan.out}/bench_fp8.json")
