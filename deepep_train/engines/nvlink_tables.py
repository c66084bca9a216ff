"""What the nvlink engine remembers between calls: plans, layouts, counts under way.

The tables' meanings stand in csrc/nvlink/params.hpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from deepep_train.handle import Plan
from deepep_train.routing import RankLayout


@dataclass(frozen=True)
class ExpertPlan:
    """The expert layout's part of a plan; see csrc/nvlink/params.hpp for what the tables mean. `group_rows`: int64 [L], the
    padded counts, on the GPU."""

    send_row: Tensor
    pull_row: Tensor
    pick_row: Tensor
    pick_rank: Tensor
    rows_of: Tensor
    row_slot: Tensor
    several: Tensor
    num_several: Tensor
    summed: Tensor
    num_summed: Tensor
    group_rows: Tensor


@dataclass(frozen=True)
class NvlinkPlan(Plan):
    """`num_received` is the bound with `num_worst_tokens`; the true number stays on the GPU.

    Attributes:
        send_slot: int32 [T, R], see csrc/nvlink/params.hpp.
        received: int32 [1], the number of rows that arrived.
        experts: None in rank layout.
        has_tail: whether the received tensor may have more rows than arrived.
        stream: the id of the stream that it was made on.
    """

    send_slot: Tensor
    received: Tensor
    experts: ExpertPlan | None
    has_tail: bool
    stream: int

    def tables(self) -> list[Tensor]:
        return [self.send_slot, self.received, *(vars(self.experts).values() if self.experts is not None else ())]


class NvlinkLayout(RankLayout):
    """A `RankLayout` that carries along `checked`, int32 [1 + T * R]: `out_of_range`, then `send_index` (params.hpp)."""

    checked: Tensor
    versions: tuple[int, int] | None


class Known(NamedTuple):
    """What `is_token_in_rank` remembers of its layout: V1's callers hand the tensors back one by one."""

    num_tokens_per_rank: Tensor
    checked: Tensor
    versions: tuple[int, int] | None


def versions(layout: RankLayout) -> tuple[int, int] | None:
    """They change when somebody writes to the tensors; None: torch does not count writes to `inference_mode`'s tensors."""
    per_rank, in_rank = layout.num_tokens_per_rank, layout.is_token_in_rank
    if per_rank.is_inference() or in_rank.is_inference():
        return None
    return per_rank._version, in_rank._version


@dataclass
class Counting:
    """An exchange of counts under way: a checked layout, and what the exchange fills in (csrc/nvlink/params.hpp)."""

    layout: NvlinkLayout
    prefix_RR: Tensor
    send_base: Tensor
    received: Tensor
    expert_base: Tensor | None
    tokens_per_expert: Tensor
    signature: int
    ticket: int
