"""The exchange that `bench` compares with: `all_to_all_single` of one row per (token, expert), as a careful user would write
it without this library."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Exchanged(NamedTuple):
    """Rows [M, hidden] grouped by local expert, and what takes them back."""

    rows: Tensor
    order: Tensor
    by_expert: Tensor
    give: list[int]
    take: list[int]
    num_tokens: int
    top_k: int


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, give: list[int], take: list[int]) -> Tensor:
        ctx.give, ctx.take = give, take
        out = rows.new_empty(sum(take), rows.size(1))
        dist.all_to_all_single(out, rows.contiguous(), take, give)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return _AllToAll.apply(grad, ctx.take, ctx.give), None, None


def dispatch(x: Tensor, topk_idx: Tensor, num_experts: int) -> Exchanged:
    """Permute by expert, exchange counts, exchange rows, group what arrived by local expert."""
    size, rank = dist.get_world_size(), dist.get_rank()
    local = num_experts // size
    top_k = topk_idx.size(1)
    picked = topk_idx.flatten()
    order = picked.argsort(stable=True)
    sent = torch.bincount(picked, minlength=num_experts)
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent)
    give = sent.view(size, local).sum(1).tolist()
    take = got.view(size, local).sum(1).tolist()
    arrived = _AllToAll.apply(x.index_select(0, order // top_k), give, take)
    expert = torch.arange(local, device=x.device).repeat(size).repeat_interleave(got)
    by_expert = expert.argsort(stable=True)
    assert rank >= 0
    return Exchanged(arrived.index_select(0, by_expert), order, by_expert, give, take, x.size(0), top_k)


def combine(rows: Tensor, exchanged: Exchanged) -> Tensor:
    """Undo the grouping, exchange rows back, add up each token's."""
    e = exchanged
    ungrouped = rows.new_empty(rows.shape).index_copy(0, e.by_expert, rows)
    back = _AllToAll.apply(ungrouped, e.take, e.give)
    return rows.new_zeros(e.num_tokens, rows.size(1)).index_add(0, e.order // e.top_k, back)
