"""What low-latency calls take, on their kernels and over the normal dispatch: anything else is refused before anything is sent.

Knows no kernels, so that it is there without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepep_train import checks, fp8
from deepep_train.errors import ArgumentError


class Shape(NamedTuple):
    """What the ranks of a low-latency dispatch agree on."""

    max_tokens: int
    hidden: int
    num_experts: int
    top_k: int


# The kernels'; csrc/low_latency/params.hpp has all but the tokens.
LIMITS = Shape(max_tokens=1 << 16, hidden=16384, num_experts=1024, top_k=16)
_NAMES = ("num_max_dispatch_tokens_per_rank", "x", "num_experts", "topk_idx")
HIDDEN, TOP_K = "x's hidden size", "topk_idx's top-k"  # what of these arguments a shape has


def shape_of(
    x: Any,
    topk_idx: Any,
    max_tokens: Any,
    num_experts: Any,
    num_ranks: int,
    device: torch.device | None,
    check_range: bool,
) -> Shape:
    """Of a dispatch's arguments, each of which is then of the right kind.

    Args:
        device: that they must lie on; None: any.
        check_range: whether to look at the indices, which waits for the GPU if they are there.
    """
    checks.integer(max_tokens, _NAMES[0], 1)
    checks.experts(num_experts, num_ranks)
    checks.tensor(x, "x", [None, None], (torch.bfloat16,), device)
    checks.topk_idx(topk_idx, x.size(0), num_experts, x.device, check_range)
    return Shape(max_tokens, x.size(1), num_experts, topk_idx.size(1))


def agreed(shape: Shape) -> dict[str, object]:
    """What the ranks must agree on, as the caller knows it."""
    return dict(zip((_NAMES[0], HIDDEN, _NAMES[2], TOP_K), shape, strict=True))


def not_a_handle(value: object) -> ArgumentError:
    text = f"handle must be what this buffer's low_latency_dispatch returned, got {checks.shown(value)}"
    return ArgumentError(text, "handle")


def check_limits(shape: Shape, names: Sequence[str] = _NAMES) -> None:
    """Raise `ArgumentError` if the kernels do not serve this shape; `names`: the arguments that its numbers come from."""
    for name, value, most, multiple in zip(names, shape, LIMITS, (1, fp8.BLOCK, 1, 1), strict=True):
        if value > most or value % multiple:
            what = {"x": HIDDEN, "topk_idx": TOP_K}.get(name, name)
            wanted = f"up to {most}" if value > most else f"that is a multiple of {multiple}"
            raise ArgumentError(f"the low-latency kernels take {what} {wanted}, got {value}", name)


def check_dispatch(
    x: Tensor,
    shape: Shape,
    num_ranks: int,
    use_fp8: Any,
    round_scale: Any,
    use_ue8m0: Any,
    cumulative_stats: Any,
    wait_stats: Any,
    async_finish: Any,
    with_hook: Any,
) -> None:
    """What `shape_of` leaves of a dispatch's arguments."""
    if x.size(0) > shape.max_tokens:
        raise ArgumentError(f"x has {x.size(0)} tokens, above {_NAMES[0]}={shape.max_tokens}", "x")
    for name, value in (("use_fp8", use_fp8), ("round_scale", round_scale), ("use_ue8m0", use_ue8m0)):
        checks.flag(value, name)
    if use_ue8m0 and not (use_fp8 and round_scale):
        raise ArgumentError("use_ue8m0=True needs use_fp8=True and round_scale=True", "use_ue8m0")
    multiple = 4 * fp8.BLOCK if use_ue8m0 else fp8.BLOCK if use_fp8 else 1
    if shape.hidden % multiple or not shape.hidden:
        wanted = f"that is a multiple of {multiple}" if shape.hidden else "above 0"
        raise ArgumentError(f"x must have a hidden size {wanted}, got {shape.hidden}", "x")
    if cumulative_stats is not None:
        local = [shape.num_experts // num_ranks]
        checks.tensor(cumulative_stats, "cumulative_local_expert_recv_stats", local, (torch.int32,), x.device)
        contiguous = cumulative_stats.is_contiguous()
        checks.need(contiguous, "cumulative_local_expert_recv_stats", "contiguous", cumulative_stats)
    _check_stats(wait_stats, "dispatch_wait_recv_cost_stats", num_ranks, x.device)
    _check_hook(async_finish, with_hook)


def check_combine(
    x: Any,
    topk_idx: Any,
    topk_weights: Any,
    shape: Shape,
    num_tokens: int,
    num_ranks: int,
    device: torch.device | None,
    check_range: bool,
    use_logfmt: Any,
    zero_copy: Any,
    out: Any,
    wait_stats: Any,
    async_finish: Any,
    with_hook: Any,
) -> None:
    """A combine's arguments, all but its handle, which says `shape` and `num_tokens`; the rest as for `shape_of`."""
    checks.wire_format(use_logfmt, zero_copy)
    rows = [shape.num_experts // num_ranks, num_ranks * shape.max_tokens, shape.hidden]
    checks.tensor(x, "x", rows, (torch.bfloat16,), device)
    picks = [num_tokens, shape.top_k]
    checks.tensor(topk_idx, "topk_idx", picks, (torch.int64,), x.device)
    if check_range:
        checks.topk_idx(topk_idx, num_tokens, shape.num_experts, x.device)
    checks.tensor(topk_weights, "topk_weights", picks, (torch.float32,), x.device)
    if out is not None:
        checks.tensor(out, "out", [num_tokens, shape.hidden], (torch.bfloat16,), x.device)
        checks.need(out.is_contiguous() and out.data_ptr() % 16 == 0, "out", "contiguous and aligned to 16 bytes", out)
    _check_stats(wait_stats, "combine_wait_recv_cost_stats", num_ranks, x.device)
    _check_hook(async_finish, with_hook)


def _check_stats(stats: Any, name: str, num_ranks: int, device: torch.device) -> None:
    if stats is not None:
        checks.tensor(stats, name, [num_ranks], (torch.int64,), device)
        checks.need(stats.is_contiguous(), name, "contiguous", stats)


def _check_hook(async_finish: Any, with_hook: Any) -> None:
    checks.flag(async_finish, "async_finish")
    checks.flag(with_hook, "return_recv_hook")
    if async_finish and with_hook:
        raise ArgumentError("return_recv_hook=True cannot be had with async_finish=True", "return_recv_hook")
