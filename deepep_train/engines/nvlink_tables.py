"""What the nvlink engine remembers between calls: plans, layouts, counts under way.

The tables' meanings stand in csrc/nvlink/params.hpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from deepep_train.errors import ArgumentError
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
        stream: the id of the stream that its tables were made on; None: unknown.
    """

    send_slot: Tensor
    received: Tensor
    experts: ExpertPlan | None
    has_tail: bool
    stream: int | None

    def tables(self) -> list[Tensor]:
        return [self.send_slot, self.received, *(vars(self.experts).values() if self.experts is not None else ())]


Seen = tuple[tuple[int, int] | None, ...] | None


def seen(*tensors: Tensor | None) -> Seen:
    """Where the tensors lie and how often they were written to, as far as torch counts that (a write through `.data` it does
    not); None: it does not count writes to `inference_mode`'s tensors."""
    if any(t is not None and t.is_inference() for t in tensors):
        return None
    return tuple(None if t is None else (t.data_ptr(), t._version) for t in tensors)


class NvlinkLayout(RankLayout):
    """A `RankLayout` that carries along `checked`, int32 [1 + T * R]: `out_of_range`, then `send_index` (params.hpp); and what
    it was checked against, kept, so that nothing else can come to lie there."""

    checked: Tensor
    seen: Seen
    kept: tuple[Tensor | None, ...]


class Known(NamedTuple):
    """What `is_token_in_rank` remembers of its layout: V1's callers hand the tensors back one by one."""

    checked: Tensor
    seen: Seen
    kept: tuple[Tensor | None, ...]


def remember(handle: tuple[Tensor, ...], plan: Plan, maker: object) -> None:
    """For callers who hand back V1's six or ten tensors without the handle's class: the plan travels with `recv_src_idx` (with
    several nodes `recv_src_meta`), and so does a token of the buffer that made it."""
    source, *kept = _telling(handle)  # kept: else others might come to lie where these were seen
    source.deepep_train_plan = plan, maker, seen(source, *kept), kept  # type: ignore[attr-defined]


def remembered(handle: tuple[Tensor, ...], maker: object) -> Plan | None:
    """None: these are not the tensors that dispatch returned, or no longer say the same."""
    source, *others = _telling(handle)
    plan, by, then, _ = getattr(source, "deepep_train_plan", (None, None, None, None))
    if then is None or then != seen(source, *others):
        return None
    if by is not maker:
        raise ArgumentError("handle was made by another buffer", "handle")
    return plan


def _telling(handle: tuple[Tensor, ...]) -> list[Tensor]:
    """What a plan can be derived from, the one that carries it first."""
    at = (3, 0, 5) if len(handle) == 6 else (7, 0, 4, 6, 9)
    return [handle[i] for i in at]


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
