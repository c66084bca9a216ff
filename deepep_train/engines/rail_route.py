"""A dispatch's way through `Rails`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from deepep_train.engines.hops import Route
from deepep_train.engines.rail_tables import ExpertTables, Tables
from deepep_train.engines.rails import Crossed, Rails
from deepep_train.engines.two_level import Forwarding


class Known(NamedTuple):
    """What a handle that was rebuilt from its tensors knows, from which its tables are learned when it is used: bool [T, R],
    what this rank forwards, and the rows that come, by their source."""

    is_token_in_rank: Tensor
    forwarding: Forwarding
    recv_counts: list[int]


@dataclass(frozen=True)
class RailRoute(Route):
    """The way of one dispatch's rows through `Rails`, and back; `hops` are not used.

    Attributes:
        num_tokens: T.
        received: int32 [1] on the GPU, how many rows come; None: as many as the received tensor has.
        tables: of one element once they are made or learned; learning is a collective call.
        experts: in expert layout.
        known: of a rebuilt handle.
        ahead: the rows of the dispatch that made this route, if they have crossed before; taken when they are passed on.
    """

    rails: Rails = field(kw_only=True)
    num_tokens: int = field(kw_only=True)
    received: Tensor | None = field(kw_only=True, default=None)
    tables: list[Tables] = field(kw_only=True, default_factory=list)
    experts: ExpertTables | None = field(kw_only=True, default=None)
    known: Known | None = field(kw_only=True, default=None)
    ahead: list[Crossed] = field(kw_only=True, default_factory=list)

    def learn(self, operation: str) -> None:
        assert self.known is not None
        masks, forwarding, recv_counts = self.known
        self.tables[:] = [self.rails.learn(forwarding, masks, recv_counts, operation)]

    def kept(self) -> list[object]:
        """All that a CUDA graph of a call along this route uses."""
        return [*self.tables, self.experts, self.received]

    def send_together(self, parts: Sequence[Tensor], num_rows: int, signature: int, num_sms: int) -> list[Tensor]:
        crossed = self.ahead.pop() if self.ahead else None
        return self.rails.dispatch(self.tables[0], parts, num_rows, self.received, self.experts, signature, num_sms, crossed)

    def send(self, rows: Tensor, spare: int = 0) -> Tensor:
        raise NotImplementedError("rows of this route go with a signature")

    def place(self, row: Tensor) -> Tensor:
        return row

    def add_back(
        self, rows: Tensor, experts: ExpertTables | None, bias: Sequence[Tensor], signature: int, num_sms: int
    ) -> Tensor:
        return self.rails.combine(self.tables[0], rows, self.num_tokens, experts, bias, signature, num_sms)
