"""What a dispatch leaves behind for its combine, for cached dispatches and for the backward passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor

LAYOUTS = ("rank", "expert")


@dataclass(frozen=True)
class Plan:
    """The part of a handle that every engine has; engines add theirs in a subclass.

    Attributes:
        number: which of the buffer's calls made it, the same on all ranks; 0 if that is not known.
        num_tokens: T, tokens this rank dispatched.
        num_received: N, rows that arrived (a token once, however many local experts it has).
        num_rows: rows of the dispatched tensor: N in rank layout, the padded expert rows in expert layout, the given bound
            with `num_worst_tokens`.
        num_experts, top_k, layout, alignment: as in the call; `top_k` 0 where it carried no indices.
        tokens_per_expert: int64 [local experts], rounded up to the alignment; on the CPU unless `num_worst_tokens` asked not to
            wait for it.
        recv_topk_idx: int64 [num_rows or num_received, top_k] local expert numbers, None without indices.
    """

    number: int
    num_tokens: int
    num_received: int
    num_rows: int
    num_experts: int
    top_k: int
    layout: str
    alignment: int
    tokens_per_expert: Tensor
    recv_topk_idx: Tensor | None


class OfBuffer(tuple):
    """A tuple that belongs to what a buffer knows: copies are itself, and other processes have no use for it."""

    def __copy__(self) -> OfBuffer:
        return self

    def __deepcopy__(self, _: Any) -> OfBuffer:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} cannot be pickled: it belongs to a Buffer of this process")


class Handle(OfBuffer):
    """A tuple of tensors, in the places where DeepEP V1's users read them, that also knows its buffer and its plan.

    Handles are independent of each other and may be used any number of times, in any order.
    """

    plan: Plan
    buffer: Any  # the Buffer that made it; typed loosely because handles stand below buffers

    def __new__(cls, tensors: Sequence[Tensor], plan: Plan, buffer: Any) -> Handle:
        self = super().__new__(cls, tensors)
        self.plan = plan
        self.buffer = buffer
        return self

    def __repr__(self) -> str:
        p = self.plan
        return f"Handle({p.layout} layout, {p.num_tokens} tokens sent, {p.num_rows} rows, {p.num_experts} experts)"
