"""What the nvlink engine remembers between calls: layouts, and plans, as the other engines do.

The tables' meanings stand in csrc/nvlink/params.hpp.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepep_train.errors import ArgumentError
from deepep_train.handle import Plan
from deepep_train.routing import RankLayout, count_picks


@dataclass(frozen=True)
class NvlinkPlan(Plan):
    """`num_received` is the bound with `num_worst_tokens`; the true number stays on the GPU.

    Attributes:
        tables: where they lie, `_C.Tables`; csrc/nvlink/params.hpp says what they mean.
        kept: the memory in which they lie.
        has_tail: whether the received tensor may have more rows than arrived.
        stream: the id of the stream that its tables were made on; None: unknown.
        as_made: `seen` of the memory of the tables that the caller has tensors of; None: nobody knows.
        kept_at: where the memory was; elsewhere, or nowhere, it has been freed since.
    """

    tables: Any
    kept: tuple[Tensor, ...]
    has_tail: bool
    stream: int | None
    as_made: Seen
    kept_at: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kept_at", self.addresses())  # the way of a frozen class

    def addresses(self) -> tuple[int, ...]:
        return tuple([memory.data_ptr() for memory in self.kept])


Seen = tuple[tuple[int, int] | None, ...] | None


def seen(*tensors: Tensor | None) -> Seen:
    """Where the tensors lie and how often they were written to, as far as torch counts that (a write through `.data` it does
    not); None: it does not count writes to `inference_mode`'s tensors."""
    marks: list[tuple[int, int] | None] = []
    for t in tensors:
        if t is None:
            marks.append(None)
        elif t.is_inference():
            return None
        else:
            marks.append((t.data_ptr(), t._version))
    return tuple(marks)


class Known(NamedTuple):
    """What `is_token_in_rank` remembers of its layout: V1's callers hand the tensors back one by one.

    Attributes:
        checked: int32 [1 + T * R], `out_of_range`, then `send_index` (params.hpp).
        seen: what it was checked against.
        kept: the same, so that nothing else can come to lie there.
    """

    checked: Tensor
    seen: Seen
    kept: tuple[Tensor | None, ...]


def checked_of(layout: RankLayout, topk_idx: Tensor | None, num_experts: int) -> Tensor:
    """What the layout's tensors alone do not say, see `Known`. Indices out of range, and counts that are not those of
    `is_token_in_rank` and `topk_idx`, are flagged for the exchange of counts to find: with these rows would land outside their
    tensors."""
    per_rank, _, per_expert, in_rank = layout
    known: Known | None = getattr(in_rank, "deepep_train_layout", None)
    if (
        known is not None
        and known.seen is not None
        and known.seen == seen(per_rank, per_expert, in_rank, topk_idx)
        and all(_same_view(a, b) for a, b in zip((per_rank, per_expert, topk_idx), known.kept, strict=True))
    ):
        return known.checked
    position = in_rank.cumsum(0, dtype=torch.int32) - 1
    wrong = (in_rank.sum(0, dtype=torch.int32) != per_rank).any()
    if topk_idx is not None:
        wrong = wrong | ((topk_idx < -1) | (topk_idx >= num_experts)).any()
        wrong = wrong | (count_picks(topk_idx, num_experts) != per_expert).any()
    send_index = torch.where(in_rank, position, -1).to(torch.int32)
    return torch.cat([wrong.to(torch.int32).view(1), send_index.view(-1)])


def _same_view(a: Tensor | None, b: Tensor | None) -> bool:
    """Of two tensors that begin at one address."""
    return a is b or (a is not None and b is not None and a.shape == b.shape and a.stride() == b.stride())


class _Remembered(NamedTuple):
    """The attribute of a tensor. What pickle or deepcopy make of the tensor has an empty one: plans cannot leave a process, and
    those of copies are derived."""

    plan: Plan
    maker: object
    then: Seen
    kept: list[Tensor]  # else others might come to lie where these were seen

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, ()  # which torch.load takes with weights_only


def remember(handle: tuple[Tensor, ...], plan: Plan, maker: object) -> None:
    """For callers who hand back V1's six or ten tensors without the handle's class: the plan travels with `recv_src_idx` (with
    several nodes `recv_src_meta`), and so does a token of the buffer that made it."""
    source, *kept = _telling(handle)
    source.deepep_train_plan = _Remembered(plan, maker, seen(source, *kept), kept)  # type: ignore[attr-defined]


def _telling(handle: tuple[Tensor, ...]) -> list[Tensor]:
    """What a plan can be derived from, the one that carries it first."""
    at = (3, 0, 5) if len(handle) == 6 else (7, 0, 4, 6, 9)
    return [handle[i] for i in at]


def remembered(handle: tuple[Tensor, ...], maker: object) -> Plan | None:
    """None: these are not the tensors that dispatch returned, or no longer say the same."""
    source, *others = _telling(handle)
    found = getattr(source, "deepep_train_plan", None)
    if not isinstance(found, _Remembered) or found.then is None or found.then != seen(source, *others):
        return None
    if found.maker is not maker:
        raise ArgumentError("handle was made by another buffer", "handle")
    return found.plan


def words_at(block: Tensor, address: int, rows: int, width: int) -> Tensor:
    """The table [rows, width] at `address` within `block`, one-dimensional, of words of the table's dtype."""
    return block.as_strided((rows, width), (width, 1), (address - block.data_ptr()) // block.element_size())


# What comes beside a dispatch's rows, part by part: the dtype and the width of its rows, 0 for a one-dimensional one. They come
# in one piece of int32 memory (csrc/nvlink/beside.hpp), since every allocation costs several microseconds; none of it is free
# before all of them are.
Kinds = Sequence[tuple[torch.dtype, int] | None]


def words_of(kinds: Kinds) -> list[int]:
    """int32 words of one row of each."""
    return [0 if kind is None else kind[0].itemsize // 4 * (kind[1] or 1) for kind in kinds]


def parts_of(whole: Tensor, beside: Any, kinds: Kinds) -> list[Tensor | None]:
    """Each as a tensor; `beside`: `_C.Beside`, measured.

    Callers may write to them: torch counts writes to each on their own, and since the last step is a change of dtype, none is
    a view to autograd.
    """
    parts: list[Tensor | None] = []
    rooms = beside.rooms
    for kind, part, words, room in zip(kinds, whole.unsafe_split_with_sizes(rooms), beside.words, rooms, strict=True):
        if kind is None:
            parts.append(None)
            continue
        dtype, width = kind
        t = part if words == room else part[:words]
        t = t.view(-1, width * (dtype.itemsize // 4)) if width else t
        parts.append(t if dtype is torch.int32 else t.view(dtype))
    return parts
