"""What the low-latency kernels take; anything else is refused before a launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepep_train import _C, checks, fp8  # type: ignore[attr-defined]
from deepep_train.engines.low_latency_space import KernelHandle, Shape
from deepep_train.errors import ArgumentError

MAX_HIDDEN, MAX_EXPERTS = _C.low_latency.max_hidden, _C.low_latency.max_experts
MAX_TOP_K = _C.low_latency.max_top_k
_MAX_TOKENS = 1 << 16


def check_dispatch(
    x: Tensor,
    shape: Shape,
    num_ranks: int,
    use_fp8: bool,
    round_scale: bool,
    use_ue8m0: bool,
    cumulative_stats: Tensor | None,
    wait_stats: Tensor | None,
) -> None:
    """x is bfloat16 [T, H], and `shape` what the call asks for."""
    limits = {
        "num_max_dispatch_tokens_per_rank": (shape.max_tokens, _MAX_TOKENS),
        "x": (shape.hidden, MAX_HIDDEN),
        "num_experts": (shape.num_experts, MAX_EXPERTS),
        "topk_idx": (shape.top_k, MAX_TOP_K),
    }
    for name, (value, most) in limits.items():
        if value > most:
            what = {"x": "x's hidden size", "topk_idx": "topk_idx's top-k"}.get(name, name)
            raise ArgumentError(f"the low-latency kernels take {what} up to {most}, got {value}", name)
    if x.size(0) > shape.max_tokens:
        raise ArgumentError(f"x has {x.size(0)} tokens, above num_max_dispatch_tokens_per_rank={shape.max_tokens}", "x")
    if use_ue8m0 and not (use_fp8 and round_scale):
        raise ArgumentError("use_ue8m0=True needs use_fp8=True and round_scale=True", "use_ue8m0")
    multiple = 4 * fp8.BLOCK if use_ue8m0 else fp8.BLOCK
    if shape.hidden % multiple or not shape.hidden:
        raise ArgumentError(f"x must have a hidden size that is a multiple of {multiple}, got {shape.hidden}", "x")
    if cumulative_stats is not None:
        local = [shape.num_experts // num_ranks]
        checks.tensor(cumulative_stats, "cumulative_local_expert_recv_stats", local, (torch.int32,), x.device)
        contiguous = cumulative_stats.is_contiguous()
        checks.need(contiguous, "cumulative_local_expert_recv_stats", "contiguous", cumulative_stats)
    check_stats(wait_stats, "dispatch_wait_recv_cost_stats", num_ranks, x.device)


def check_combine(
    x: Tensor, topk_idx: Tensor, topk_weights: Tensor, handle: KernelHandle, num_ranks: int, device: torch.device
) -> None:
    shape, (num_tokens, top_k) = handle.space.shape, handle.pick_index.shape
    rows = [shape.num_experts // num_ranks, num_ranks * shape.max_tokens, shape.hidden]
    checks.tensor(x, "x", rows, (torch.bfloat16,), device)
    checks.tensor(topk_idx, "topk_idx", [num_tokens, top_k], (torch.int64,), device)
    checks.tensor(topk_weights, "topk_weights", [num_tokens, top_k], (torch.float32,), device)


def check_out(out: Tensor, num_tokens: int, hidden: int, device: torch.device) -> None:
    checks.tensor(out, "out", [num_tokens, hidden], (torch.bfloat16,), device)
    checks.need(out.is_contiguous() and out.data_ptr() % 16 == 0, "out", "contiguous and aligned to 16 bytes", out)


def check_stats(stats: Tensor | None, name: str, num_ranks: int, device: torch.device) -> None:
    if stats is not None:
        checks.tensor(stats, name, [num_ranks], (torch.int64,), device)
        checks.need(stats.is_contiguous(), name, "contiguous", stats)


def handle_of(buffer: Any, handle: Any) -> KernelHandle:
    """The handle, if it may still be combined through."""
    if not isinstance(handle, KernelHandle) or handle.buffer is not buffer:
        raise ArgumentError("handle must be what this buffer's low_latency_dispatch returned", "handle")
    if handle.space.numbers[handle.set] != handle.number:
        raise ArgumentError("handle is of a result whose slots a later low_latency_dispatch has taken", "handle")
    return handle
