"""DeepEP V1's low-latency calls for engines without low-latency kernels: the same results, over the normal dispatch.

Each pick of an expert is dispatched as a token of its own with a single choice, so its row can come back on its own and be
weighted where it came from. That moves as many rows as V1's low-latency kernels do. Rows of an expert are ordered by
(source rank, token), not by arrival.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deepep_train import fp8
from deepep_train.engines.base import CombineRequest, DispatchRequest, Engine, Payload, Prepared
from deepep_train.engines.low_latency_arguments import TOP_K, Shape, check_combine, check_dispatch, not_a_handle, shape_of
from deepep_train.errors import DeepEPError
from deepep_train.handle import OfBuffer, Plan


class LowLatencyHandle(OfBuffer):
    """V1's tuple: src_info int32 [L, R*M], layout_range int64 [L, R], M, hidden, num_experts.

    src_info holds the token that each row came from. layout_range holds, for each source rank, (first row << 32) | rows.
    """

    plan: Plan
    buffer: Any
    counts: list[int]
    shape: Shape

    def __new__(cls, items: tuple, plan: Plan, buffer: Any, counts: list[int], shape: Shape) -> LowLatencyHandle:
        self = super().__new__(cls, items)
        self.plan, self.buffer, self.counts, self.shape = plan, buffer, counts, shape
        return self


def handle_of(buffer: Any, handle: Any) -> LowLatencyHandle:
    """The handle, if it is one of this buffer's."""
    if not isinstance(handle, LowLatencyHandle) or handle.buffer is not buffer:
        raise not_a_handle(handle)
    return handle


@dataclass
class _DispatchOfPicks(DispatchRequest):
    """The ranks must agree on what a low-latency dispatch was asked for, which its picks alone do not say."""

    names = ("num_max_dispatch_tokens_per_rank", TOP_K, *DispatchRequest.names)
    shape: Shape = field(kw_only=True)

    def agreement(self) -> tuple[object, ...]:
        return self.shape.max_tokens, self.shape.top_k, *super().agreement()


def dispatch(
    engine: Engine,
    buffer: Any,
    x: Tensor,
    topk_idx: Tensor,
    max_tokens: int,
    num_experts: int,
    cumulative_stats: Tensor | None,
    wait_stats: Tensor | None,
    use_fp8: bool,
    round_scale: bool,
    use_ue8m0: bool,
    async_finish: bool,
    with_hook: bool,
) -> tuple[Any, Tensor, LowLatencyHandle]:
    """See `Buffer.low_latency_dispatch`; gives (recv_x, recv_count, handle)."""
    num_ranks = buffer.group_size

    def make() -> DispatchRequest:
        shape = shape_of(x, topk_idx, max_tokens, num_experts, num_ranks, None, check_range=True)
        stats = (cumulative_stats, wait_stats)
        check_dispatch(x, shape, num_ranks, use_fp8, round_scale, use_ue8m0, *stats, async_finish, with_hook)
        payload = Payload(x)
        if use_fp8:
            data, scales = fp8.quantize_blocks(x, power_of_two=round_scale)
            payload = Payload(data, fp8.pack_ue8m0(scales) if use_ue8m0 else scales)
        # Token t's k-th pick is dispatched as token t * K + k.
        top_k = shape.top_k
        payload = Payload(*(None if t is None else t.repeat_interleave(top_k, 0) for t in payload[:2]))  # type: ignore[arg-type]
        picks = torch.where(_first_picks(topk_idx) == torch.arange(top_k, device=x.device), topk_idx, -1).reshape(-1, 1)
        token = torch.arange(x.size(0), device=x.device).repeat_interleave(top_k).unsqueeze(1)
        # The token's number travels in the place of its weight: exact in float32 up to 2**24 tokens.
        recipe = f"use_fp8={use_fp8}, round_scale={round_scale}, use_ue8m0={use_ue8m0}"
        given = (payload, engine.layout(picks, num_experts), picks, token.float(), num_experts, "expert")
        return _DispatchOfPicks(*given, recipe=recipe, shape=shape)

    prepared = Prepared(make)
    got = engine.dispatch(prepared)
    asked = prepared.require()
    assert isinstance(asked, _DispatchOfPicks)
    shape = asked.shape
    plan, counts = got.plan, got.plan.tokens_per_expert.tolist()
    slots = num_ranks * max_tokens
    assert got.topk_weights is not None
    try:
        recv = [None if t is None else _spread(t, counts, slots) for t in got.payload[:2]]
        source = _spread(got.topk_weights.to(torch.int32).unsqueeze(1), counts, slots).squeeze(2)
    except RuntimeError as error:
        if got.payload.data.is_cuda and not isinstance(error, torch.OutOfMemoryError):
            raise  # something else has failed, earlier
        what = f"num_max_dispatch_tokens_per_rank={max_tokens} rows of {shape.hidden} values for each of {num_ranks} ranks"
        raise DeepEPError(f"low_latency_dispatch: no memory for {len(counts)} experts' {what}") from error
    recv_count = torch.tensor(counts, dtype=torch.int32, device=source.device)
    if cumulative_stats is not None:
        cumulative_stats += recv_count
    items = (source, _ranges(engine, got, counts, num_ranks), max_tokens, shape.hidden, num_experts)
    handle = LowLatencyHandle(items, plan, buffer, counts, shape)
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
    wait_stats: Tensor | None,
    async_finish: bool,
    with_hook: bool,
) -> Tensor:
    """See `Buffer.low_latency_combine`: sums weight * row over k in ascending order, in float32, rounded once."""

    def make() -> CombineRequest:
        handle_of(buffer, handle)
        where = (handle.shape, handle.plan.num_tokens // handle.shape.top_k, buffer.group_size, handle[0].device)
        how = (use_logfmt, zero_copy, out, wait_stats, async_finish, with_hook)
        check_combine(x, topk_idx, topk_weights, *where, True, *how)
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
