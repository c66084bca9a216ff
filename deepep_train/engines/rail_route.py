"""A dispatch's way through `Rails`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from deepep_train.engines.hops import Route
from deepep_train.engines.rail_tables import ExpertTables, Tables
from deepep_train.engines.rails import Rails
from deepep_train.engines.two_level import Forwarding


@dataclass(frozen=True)
class RailRoute(Route):
    """The way of one dispatch's rows through `Rails`, and back; `hops` say how many rows each rank sends and gets.

    Attributes:
        num_tokens, num_received: T and N.
        tables: of one element once they are learned, which is a collective call.
        experts: of one element once they are made.
    """

    rails: Rails = field(kw_only=True)
    forwarding: Forwarding = field(kw_only=True)
    is_token_in_rank: Tensor = field(kw_only=True)
    recv_counts: list[int] = field(kw_only=True)
    tables: list[Tables] = field(kw_only=True, default_factory=list)
    experts: list[ExpertTables] = field(kw_only=True, default_factory=list)

    def learn(self, operation: str) -> None:
        made = self.rails.learn(self.forwarding, self.is_token_in_rank, self.recv_counts, operation)
        self.tables[:] = [made]

    def send_together(
        self, parts: Sequence[Tensor], num_rows: int, experts: ExpertTables | None, signature: int, num_sms: int
    ) -> list[Tensor]:
        return self.rails.dispatch(self.tables[0], parts, sum(self.recv_counts), num_rows, experts, signature, num_sms)

    def send(self, rows: Tensor, spare: int = 0) -> Tensor:
        raise NotImplementedError("rows of this route go with a signature")

    def place(self, row: Tensor) -> Tensor:
        return row

    def add_back(
        self, rows: Tensor, experts: ExpertTables | None, bias: Sequence[Tensor], signature: int, num_sms: int
    ) -> Tensor:
        num_tokens = self.is_token_in_rank.size(0)
        return self.rails.combine(self.tables[0], rows, num_tokens, experts, bias, signature, num_sms)
