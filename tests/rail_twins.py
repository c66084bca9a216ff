"""In torch, on any device, what the kernels of the rdma engine's fresh dispatches do; the tests compare."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deepep_train.engines.rail_rows import num_words
from deepep_train.engines.rail_tables import Counts, node_counts

_BITS = 32  # of a word


def counts_of(rank: int, local: int, counts_RR: Tensor, per_node_RN: Tensor) -> Counts:
    """Args:
    counts_RR: int64 [R, R], rows from each rank to each rank.
    per_node_RN: int64 [R, nodes], the same to each node.
    """
    node, rail = divmod(rank, local)
    recv = per_node_RN[rail::local, node].tolist()
    return node_counts(rank, local, per_node_RN[rank].tolist(), recv, counts_RR, int(per_node_RN.max()))


def mask_words(is_row_for_rank: Tensor) -> Tensor:
    """bool [rows, local ranks] -> int32 [rows, words], a bit a rank of one node: what rows tell their forwarder."""
    num_rows, local = is_row_for_rank.shape
    words = num_words(local)
    bits = F.pad(is_row_for_rank, (0, words * _BITS - local)).view(num_rows, words, _BITS).to(torch.int64)
    return (bits << torch.arange(_BITS, device=bits.device)).sum(2).to(torch.int32)


def masks_of(words: Tensor, local: int) -> Tensor:
    """int32 [F, words] -> bool [F, local]: which ranks of the node rows are for."""
    rank = torch.arange(local, dtype=torch.int32, device=words.device)
    return ((words[:, rank // _BITS] >> rank % _BITS) & 1).to(torch.bool)


def placed_picks(idx: Tensor, expert_base: Tensor) -> Tensor:
    """int64 [N, K] local experts, int32 [L] -> int32 [N, K]: the row of every pick, its expert's rows in order of picks."""
    row, following = torch.full(idx.shape, -1, dtype=torch.int32), expert_base.tolist()
    for n, picks in enumerate(idx.tolist()):
        for k, e in enumerate(picks):
            if e >= 0:
                row[n, k] = following[e]
                following[e] += 1
    return row


def arranged(pick_row: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """-> `ExpertTables`' rows_of and row_slot."""
    rows_of, row_slot = torch.full_like(pick_row, -1), torch.full((num_rows,), -1, dtype=torch.int32)
    for n, picks in enumerate(pick_row.tolist()):
        rows = sorted(row for row in picks if row >= 0)
        rows_of[n, : len(rows)] = torch.tensor(rows, dtype=torch.int32)
        row_slot[rows] = n
    return rows_of, row_slot
