"""The expert layout as index arithmetic over received rows, for engines whose dispatch delivers rank layout."""

from __future__ import annotations

import torch
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


def sum_by_token(rows: Tensor, experts: ExpertRows, num_received: int) -> Tensor:
    """Expert rows -> received rows: from +0.0, ascending local expert, rounded to the payload's dtype."""
    if not experts.sums:
        return rows.new_zeros(num_received, rows.size(1))
    dtype = accumulator(rows.dtype)
    # Every received row has a first local expert, and the first list is in received order.
    total = rows.index_select(0, experts.sums[0][1]).to(dtype).add_(0.0)
    for received, row in experts.sums[1:]:
        total.index_add_(0, received, rows.index_select(0, row).to(dtype))
    return total.to(rows.dtype)
