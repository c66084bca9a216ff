"""DeepEP V1's low-latency calls for engines without low-latency kernels: the same results, over the normal dispatch.

Each pick of an expert is dispatched as a token of its own with a single choice, so its row can come back on its own and be
weighted where it came from. That moves as many rows as V1's low-latency kernels do. Rows of an expert are ordered by
(source rank, token), not by arrival.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deepep_train import checks, fp8
from deepep_train.engines.base import CombineRequest, DispatchRequest, Engine, Payload, Prepared
from deepep_train.errors import ArgumentError
from deepep_train.handle import Plan


class LowLatencyHandle(tuple):
    """V1's tuple: src_info int32 [L, R*M], layout_range int64 [L, R], M, hidden, num_experts.

    src_info holds the token that each row came from. layout_range holds, for each source rank, (first row << 32) | rows.
    """

    plan: Plan
    buffer: Any
    counts: list[int]

    def __new__(cls, items: tuple, plan: Plan, buffer: Any, counts: list[int]) -> LowLatencyHandle:
        self = super().__new__(cls, items)
        self.plan, self.buffer, self.counts = plan, buffer, counts
        return self


def dispatch(
    engine: Engine,
    buffer: Any,
    x: Tensor,
    topk_idx: Tensor,
    max_tokens: int,
    num_experts: int,
    cumulative_stats: Tensor | None,
    use_fp8: bool,
    round_scale: bool,
    use_ue8m0: bool,
) -> tuple[Any, Tensor, LowLatencyHandle]:
    """See `Buffer.low_latency_dispatch`; gives (recv_x, recv_count, handle)."""
    num_ranks = buffer.group_size

    def make() -> DispatchRequest:
        checks.integer(max_tokens, "num_max_dispatch_tokens_per_rank", 1)
        checks.experts(num_experts, num_ranks)
        checks.tensor(x, "x", [None, None], (torch.bfloat16,), None)
        if x.size(0) > max_tokens:
            raise ArgumentError(f"x has {x.size(0)} tokens, above num_max_dispatch_tokens_per_rank={max_tokens}", "x")
        if use_ue8m0 and not (use_fp8 and round_scale):
            raise ArgumentError("use_ue8m0=True needs use_fp8=True and round_scale=True", "use_ue8m0")
        per_scale = 0 if not use_fp8 else 4 * fp8.BLOCK if use_ue8m0 else fp8.BLOCK
        if per_scale and x.size(1) % per_scale:
            raise ArgumentError(f"x must have a hidden size that is a multiple of {per_scale}, got {x.size(1)}", "x")
        checks.topk_idx(topk_idx, x.size(0), num_experts, x.device)
        if cumulative_stats is not None:
            shape = [num_experts // num_ranks]
            checks.tensor(cumulative_stats, "cumulative_local_expert_recv_stats", shape, (torch.int32,), x.device)
        payload = Payload(x)
        if use_fp8:
            data, scales = fp8.quantize_blocks(x, power_of_two=round_scale)
            payload = Payload(data, fp8.pack_ue8m0(scales) if use_ue8m0 else scales)
        # Token t's k-th pick is dispatched as token t * K + k.
        top_k = topk_idx.size(1)
        payload = Payload(*(None if t is None else t.repeat_interleave(top_k, 0) for t in payload[:2]))  # type: ignore[arg-type]
        picks = torch.where(_first_picks(topk_idx) == torch.arange(top_k, device=x.device), topk_idx, -1).reshape(-1, 1)
        token = torch.arange(x.size(0), device=x.device).repeat_interleave(top_k).unsqueeze(1)
        # The token's number travels in the place of its weight: exact in float32 up to 2**24 tokens.
        return DispatchRequest(payload, engine.layout(picks, num_experts), picks, token.float(), num_experts, "expert")

    got = engine.dispatch(Prepared(make))
    plan, counts = got.plan, got.plan.tokens_per_expert.tolist()
    slots = num_ranks * max_tokens
    recv = [None if t is None else _spread(t, counts, slots) for t in got.payload[:2]]
    assert got.topk_weights is not None
    source = _spread(got.topk_weights.to(torch.int32).unsqueeze(1), counts, slots).squeeze(2)
    recv_count = torch.tensor(counts, dtype=torch.int32, device=source.device)
    if cumulative_stats is not None:
        cumulative_stats += recv_count
    items = (source, _ranges(engine, got, counts, num_ranks), max_tokens, got.payload.data.size(1), num_experts)
    handle = LowLatencyHandle(items, plan, buffer, counts)
    if recv[1] is None:
        return recv[0], recv_count, handle
    # V1 gives scales with their last two dimensions column-major.
    return (recv[0], recv[1].transpose(1, 2).contiguous().transpose(1, 2)), recv_count, handle


def combine(
    engine: Engine,
    buffer: Any,
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    handle: Any,
    use_logfmt: bool,
    zero_copy: bool,
    out: Tensor | None,
) -> Tensor:
    """See `Buffer.low_latency_combine`: sums weight * row over k in ascending order, in float32, rounded once."""

    def make() -> CombineRequest:
        if not isinstance(handle, LowLatencyHandle) or handle.buffer is not buffer:
            raise ArgumentError("handle must be what this buffer's low_latency_dispatch returned", "handle")
        checks.wire_format(use_logfmt, zero_copy)
        max_tokens, hidden, num_experts = handle[2:]
        shape = [num_experts // buffer.group_size, buffer.group_size * max_tokens, hidden]
        checks.tensor(x, "x", shape, (torch.bfloat16,), None)
        num_tokens = handle.plan.num_tokens // topk_idx.size(1)
        checks.topk_idx(topk_idx, num_tokens, num_experts, x.device)
        checks.tensor(topk_weights, "topk_weights", topk_idx.shape, (torch.float32,), x.device)
        if out is not None:
            checks.tensor(out, "out", [num_tokens, hidden], (torch.bfloat16,), x.device)
        return CombineRequest(torch.cat([x[e, :n] for e, n in enumerate(handle.counts)]), handle.plan)

    rows = engine.combine(Prepared(make))[0].view(*topk_idx.shape, handle[3])
    first = _first_picks(topk_idx)
    total = torch.zeros(rows.size(0), rows.size(2), dtype=torch.float32, device=rows.device)
    for k in range(topk_idx.size(1)):
        weight = torch.where(topk_idx[:, k] >= 0, topk_weights[:, k], 0.0).unsqueeze(1)
        total += weight * rows[torch.arange(rows.size(0), device=rows.device), first[:, k]].to(torch.float32)
    result = total.to(torch.bfloat16)
    return result if out is None else out.copy_(result)


def _first_picks(topk_idx: Tensor) -> Tensor:
    """int64 [T, K]: which pick of the token is the first of the same expert. A token has one row there, however often it names
    the expert: an expert has room for one row of each token."""
    return (topk_idx.unsqueeze(2) == topk_idx.unsqueeze(1)).to(torch.uint8).argmax(2)


def _spread(rows: Tensor, counts: list[int], slots: int) -> Tensor:
    """Rows grouped by expert [sum(counts), n] -> [L, slots, n], zeros behind each group."""
    bits = rows.view(torch.uint8) if rows.dtype.itemsize == 1 else rows
    out = bits.new_zeros(len(counts), slots, rows.size(1))
    for e, group in enumerate(bits.split(counts)):
        out[e, : group.size(0)] = group
    return out.view(rows.dtype)


def _ranges(engine: Engine, got: Any, counts: list[int], num_ranks: int) -> Tensor:
    """int64 [L, R], see `LowLatencyHandle`."""
    received = got.tensors[0][:, engine.rank] if len(got.tensors) == 6 else got.tensors[6]
    per_source = received.diff(prepend=received.new_zeros(1)).to(torch.int64)
    source = torch.arange(num_ranks, device=per_source.device).repeat_interleave(per_source)
    expert = got.plan.recv_topk_idx.flatten()
    table = torch.zeros(len(counts) * num_ranks, dtype=torch.int64, device=source.device)
    table.scatter_add_(0, expert * num_ranks + source, torch.ones_like(source))
    rows = table.view(len(counts), num_ranks)
    return ((rows.cumsum(1) - rows) << 32) | rows


NO_HOOK: Callable[[], None] = lambda: None  # noqa: E731 - everything has arrived when the call returns
