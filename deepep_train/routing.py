"""Who gets which token: pure functions of the router's choice, the same for every engine.

Shape letters: T tokens of this rank, K top-k, E experts, L experts per rank (E = L * R), R ranks, N rows received.
Expert `e` lives on rank `e // L` as local expert `e % L`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class RankLayout(NamedTuple):
    """How many of this rank's tokens go where.

    Attributes:
        num_tokens_per_rank: int32 [R]; a token counts once per rank, however many of its experts live there.
        num_tokens_per_rdma_rank: int32 [nodes], a token counts once per node; None with a single node.
        num_tokens_per_expert: int32 [E].
        is_token_in_rank: bool [T, R].
    """

    num_tokens_per_rank: Tensor
    num_tokens_per_rdma_rank: Tensor | None
    num_tokens_per_expert: Tensor
    is_token_in_rank: Tensor


def rank_layout(topk_idx_TK: Tensor, num_experts: int, num_ranks: int, num_nodes: int = 1) -> RankLayout:
    """Count tokens by rank, node and expert; `topk_idx_TK` int64 [T, K] in [-1, E), -1 meaning not routed."""
    num_tokens = topk_idx_TK.size(0)
    routed_TK = topk_idx_TK >= 0
    # A spare last column takes the picks that go nowhere, which keeps this free of data-dependent shapes.
    rank_TK = torch.where(routed_TK, topk_idx_TK // (num_experts // num_ranks), num_ranks)
    in_rank = torch.zeros(num_tokens, num_ranks + 1, dtype=torch.bool, device=topk_idx_TK.device)
    in_rank.scatter_(1, rank_TK, True)
    in_rank_TR = in_rank[:, :num_ranks].contiguous()
    return RankLayout(
        num_tokens_per_rank=in_rank_TR.sum(0, dtype=torch.int32),
        num_tokens_per_rdma_rank=tokens_per_node(in_rank_TR, num_nodes) if num_nodes > 1 else None,
        num_tokens_per_expert=count_picks(topk_idx_TK, num_experts),
        is_token_in_rank=in_rank_TR,
    )


def count_picks(topk_idx_TK: Tensor, num_experts: int) -> Tensor:
    """int32 [E]: picks of each expert; what lies outside of [0, E) picks none."""
    is_pick_TK = (topk_idx_TK >= 0) & (topk_idx_TK < num_experts)
    expert = torch.where(is_pick_TK, topk_idx_TK, num_experts).reshape(-1)
    per_expert = torch.zeros(num_experts + 1, dtype=torch.int32, device=topk_idx_TK.device)
    per_expert.index_add_(0, expert, torch.ones_like(expert, dtype=torch.int32))
    return per_expert[:num_experts]


def tokens_per_node(is_token_in_rank_TR: Tensor, num_nodes: int) -> Tensor:
    """int32 [nodes]: tokens with at least one destination on the node; ranks of a node are consecutive."""
    num_tokens, num_ranks = is_token_in_rank_TR.shape
    by_node = is_token_in_rank_TR.reshape(num_tokens, num_nodes, num_ranks // num_nodes)
    return by_node.any(2).sum(0, dtype=torch.int32)


def counted_down(chosen: Tensor) -> Tensor:
    """bool [rows, n] -> int32 of the same shape: how many entries of the column are chosen, this one and those above.

    By way of the transpose: on a GPU torch scans along rows, but goes down columns one entry after another, up to 0.14 µs each.
    """
    return chosen.t().contiguous().cumsum(1, dtype=torch.int32).t().contiguous()


def send_order(is_token_in_rank_TR: Tensor) -> tuple[Tensor, Tensor]:
    """(destination [S], token [S]), int64: every (token, destination) pair, by destination and then by token."""
    destination, token = is_token_in_rank_TR.t().nonzero(as_tuple=True)
    return destination, token


def local_topk_idx(topk_idx_NK: Tensor, rank: Tensor | int, num_local_experts: int) -> Tensor:
    """Global expert numbers -> those of `rank` (an int, or int64 [N, 1]); -1 where the expert lives elsewhere."""
    local_NK = topk_idx_NK - rank * num_local_experts
    return torch.where((local_NK >= 0) & (local_NK < num_local_experts) & (topk_idx_NK >= 0), local_NK, -1)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


class ExpertRows(NamedTuple):
    """The expert-major arrangement of N received rows: one row per pick of a local expert, grouped by expert, each group in
    received order and padded to a multiple of the alignment.

    Attributes:
        tokens_per_expert: padded group sizes, L of them; their sum is `num_rows`.
        num_rows: M, rows of the arrangement.
        source_row: int64 [M], the received row each row copies; N for a padding row.
        source_pick: int64 [M], the same as an index into the flattened [N, K] picks; N * K for a padding row.
        by_token: int64 [P], the rows that are no padding, by received row and then by ascending expert: the order of
            summation that the contract fixes.
        offsets: int64 [N + 1], where each received row's begin in `by_token`.
    """

    tokens_per_expert: list[int]
    num_rows: int
    source_row: Tensor
    source_pick: Tensor
    by_token: Tensor
    offsets: Tensor


def expert_rows(
    local_topk_idx_NK: Tensor, num_local_experts: int, alignment: int, counts: Sequence[int] | None = None
) -> ExpertRows:
    """Arrange received rows by local expert.

    Args:
        local_topk_idx_NK: int64 [N, K] in [-1, L).
        counts: picks of each local expert, L of them, if they are known: then nothing waits for a GPU, at the price of sorting
            the picks that go nowhere, too.
    """
    num_received, top_k = local_topk_idx_NK.shape
    device = local_topk_idx_NK.device
    flat = local_topk_idx_NK.reshape(-1)
    # Every pick, by (expert, received row, k).
    if counts is None:
        pick = (flat >= 0).nonzero().squeeze(1)
        expert, by_expert = flat[pick].sort(stable=True)
        pick = pick[by_expert]
        counts = torch.bincount(expert, minlength=num_local_experts).tolist()
    else:
        expert, pick = torch.where(flat >= 0, flat, num_local_experts).sort(stable=True)
        expert, pick = expert[: sum(counts)], pick[: sum(counts)]
    padded = [round_up(c, alignment) for c in counts]
    num_rows = sum(padded)
    # A pick's row is its position plus the padding of the groups before its own.
    shift, shifts = 0, []
    for count, size in zip(counts, padded, strict=True):
        shifts.append(shift)
        shift += size - count
    row = (
        torch.arange(pick.numel(), device=device)
        + torch.tensor(shifts, dtype=torch.int64).to(device, non_blocking=True)[expert]
    )

    source_pick = torch.full((num_rows,), num_received * top_k, dtype=torch.int64, device=device)
    source_pick[row] = pick
    source_row = torch.full((num_rows,), num_received, dtype=torch.int64, device=device)
    source_row[row] = pick // max(top_k, 1)

    # `row` ascends by expert, and a stable sort keeps that within a received row.
    received, by_received = source_row[row].sort(stable=True)
    offsets = torch.searchsorted(received, torch.arange(num_received + 1, device=device))
    return ExpertRows(padded, num_rows, source_row, source_pick, row[by_received], offsets)
