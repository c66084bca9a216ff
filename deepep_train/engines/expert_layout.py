"""The expert layout as index arithmetic over received rows, for engines whose dispatch delivers rank layout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deepep_train.routing import ExpertRows


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def extend(rows: Tensor, num_rows: int, value: float) -> Tensor:
    """Append rows of `value` up to `num_rows`."""
    if rows.size(0) == num_rows:
        return rows
    out = rows.new_full((num_rows, *rows.shape[1:]), value)
    out[: rows.size(0)] = rows
    return out


def weights_by_row(weights_NK: Tensor, experts: ExpertRows) -> Tensor:
    """Received weights [N, K] -> one per expert row [M], 0.0 on padding."""
    flat = torch.cat([weights_NK.reshape(-1), weights_NK.new_zeros(1)])
    return flat.index_select(0, experts.source_pick)


def weights_by_pick(weights_M: Tensor, experts: ExpertRows, num_received: int, top_k: int) -> Tensor:
    """The reverse: [M] -> [N, K], 0.0 where the expert lives elsewhere; padding is dropped."""
    flat = weights_M.new_zeros(num_received * top_k + 1)
    flat[experts.source_pick] = weights_M[: experts.num_rows]
    return flat[:-1].view(num_received, top_k)


def ordered_sums(rows: Tensor, index: Tensor, offsets: Tensor) -> Tensor:
    """[…, n] -> [N, n]: sum i adds rows[index[j]] for j from offsets[i] to offsets[i + 1] - 1, in this order, from +0.0, in
    float32 (float64 for float64), rounded once."""
    if rows.device.type != "cpu" or rows.dtype != torch.float32 or not index.numel():
        return _ordered_sums_in_rounds(rows, index, offsets)
    # One pass over memory instead of two for each round. It adds one row after another, as the tests see in the bits.
    return F.embedding_bag(index, rows.contiguous(), offsets, mode="sum", include_last_offset=True)


def _ordered_sums_in_rounds(rows: Tensor, index: Tensor, offsets: Tensor) -> Tensor:
    counts = offsets.diff()
    total = torch.zeros(counts.numel(), rows.size(1), dtype=accumulator(rows.dtype), device=rows.device)
    for j in range(int(counts.max()) if counts.numel() else 0):
        (at,) = (counts > j).nonzero(as_tuple=True)
        # A sum occurs once in a round, so no two additions meet and the order is the loop's.
        total.index_add_(0, at, rows.index_select(0, index[offsets[at] + j]).to(total.dtype))
    return total.to(rows.dtype)
