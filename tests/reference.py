"""What every rank must get, worked out from what all of them gave: plain loops over ranks, tokens and picks.

Nothing here is shared with the package. Sums add one row after another in the contract's order, so results compare bit for
bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Rows = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Given:
    """What one rank passes to dispatch."""

    x: Rows
    topk_idx: Tensor
    topk_weights: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.topk_idx.size(0)


class Row(NamedTuple):
    """Where a received row comes from; `k` is the pick it stands for, -1 in rank layout."""

    source: int
    token: int
    k: int = -1


@dataclass(frozen=True)
class Arrived:
    """What one rank gets; `rows` lists the origin of each row of `x`, None for padding."""

    x: Rows
    topk_idx: Tensor | None
    topk_weights: Tensor | None
    tokens_per_expert: list[int]
    rows: list[Row | None]


class Picture:
    """All ranks at once.

    Args:
        given: every rank's arguments.
        num_experts: over all ranks; rank r owns the r-th equal share.
    """

    def __init__(self, given: Sequence[Given], num_experts: int) -> None:
        self.given = list(given)
        self.size = len(self.given)
        self.num_experts = num_experts
        self.num_local = num_experts // self.size

    # Counts ------------------------------------------------------------------------------------------------------------

    def goes_to(self, source: int, token: int, rank: int) -> bool:
        return any(e >= 0 and e // self.num_local == rank for e in self._picks(source, token))

    def is_token_in_rank(self, source: int) -> Tensor:
        tokens = range(self.given[source].num_tokens)
        table = [[self.goes_to(source, t, r) for r in range(self.size)] for t in tokens]
        return torch.tensor(table, dtype=torch.bool).view(-1, self.size)

    def num_tokens_per_rank(self, source: int) -> list[int]:
        return [sum(self.goes_to(source, t, r) for t in range(self.given[source].num_tokens)) for r in range(self.size)]

    def num_tokens_per_node(self, source: int, num_local_ranks: int) -> list[int]:
        nodes = [range(first, first + num_local_ranks) for first in range(0, self.size, num_local_ranks)]
        tokens = range(self.given[source].num_tokens)
        return [sum(any(self.goes_to(source, t, r) for r in node) for t in tokens) for node in nodes]

    def num_tokens_per_expert(self, source: int) -> list[int]:
        picks = [e for t in range(self.given[source].num_tokens) for e in self._picks(source, t)]
        return [picks.count(e) for e in range(self.num_experts)]

    def prefix_matrix(self) -> Tensor:
        """[i, j]: rows that rank j gets from ranks 0 … i."""
        counts = [self.num_tokens_per_rank(source) for source in range(self.size)]
        table = [[sum(counts[s][r] for s in range(i + 1)) for r in range(self.size)] for i in range(self.size)]
        return torch.tensor(table, dtype=torch.int32)

    def tokens_per_expert(self, rank: int, alignment: int) -> list[int]:
        """Picks of this rank's experts from everywhere, each rounded up."""
        sent = [self.num_tokens_per_expert(source) for source in range(self.size)]
        mine = range(rank * self.num_local, (rank + 1) * self.num_local)
        totals = [sum(counts[e] for counts in sent) for e in mine]
        return [n + (-n) % alignment for n in totals]

    # Dispatch ----------------------------------------------------------------------------------------------------------

    def arrive(self, rank: int, layout: str, alignment: int = 1, worst: int = 0) -> Arrived:
        """What `dispatch` gives this rank; `worst` is its `num_worst_tokens`."""
        rows = self._rank_rows(rank) if layout == "rank" else self._expert_rows(rank, alignment)
        rows = rows + [None] * (worst - len(rows))
        idx = weights = None
        if layout == "rank":
            idx = self._local_idx(rank, rows)
        if self.given[rank].topk_weights is not None:
            weights = self._weights(rank, rows, layout)
        return Arrived(self.gather(rows), idx, weights, self.tokens_per_expert(rank, alignment), rows)

    def gather(self, rows: Sequence[Row | None], xs: Sequence[Rows] | None = None) -> Rows:
        """The rows themselves, of what was given or of other tensors with a row per token; zeros for None."""
        xs = [g.x for g in self.given] if xs is None else xs
        if isinstance(xs[0], tuple):
            first, second = ([x[i] for x in xs] for i in (0, 1))
            return _pick(rows, first), _pick(rows, second)
        return _pick(rows, xs)

    def _rank_rows(self, rank: int) -> list[Row | None]:
        sources = range(self.size)
        return [Row(s, t) for s in sources for t in range(self.given[s].num_tokens) if self.goes_to(s, t, rank)]

    def _expert_rows(self, rank: int, alignment: int) -> list[Row | None]:
        rows: list[Row | None] = []
        for expert in range(rank * self.num_local, (rank + 1) * self.num_local):
            for source in range(self.size):
                for token in range(self.given[source].num_tokens):
                    for k, picked in enumerate(self._picks(source, token)):
                        if picked == expert:
                            rows.append(Row(source, token, k))
            while len(rows) % alignment:
                rows.append(None)
        return rows

    def _local_idx(self, rank: int, rows: Sequence[Row | None]) -> Tensor:
        top_k = self.given[rank].topk_idx.size(1)
        table = []
        for row in rows:
            picks = [-1] * top_k if row is None else self._picks(row.source, row.token)
            table.append([e - rank * self.num_local if self._lives_on(e, rank) else -1 for e in picks])
        return torch.tensor(table, dtype=torch.int64).view(-1, top_k)

    def _weights(self, rank: int, rows: Sequence[Row | None], layout: str) -> Tensor:
        top_k = self.given[rank].topk_idx.size(1)
        out = torch.zeros(len(rows), top_k)
        for i, row in enumerate(rows):
            if row is not None:
                for k, expert in enumerate(self._picks(row.source, row.token)):
                    if self._lives_on(expert, rank) and row.k in (-1, k):
                        out[i, k] = self.given[row.source].topk_weights[row.token, k]
        if layout == "rank":
            return out
        picked = [out[i, row.k] if row is not None else torch.zeros(()) for i, row in enumerate(rows)]
        return torch.stack(picked) if picked else torch.zeros(0)

    # Combine -----------------------------------------------------------------------------------------------------------

    def combine(
        self,
        rank: int,
        ys: Sequence[Tensor],
        origins: Sequence[Sequence[Row | None]],
        biases: Sequence[Tensor] = (),
        per_node: int = 1,
    ) -> Tensor:
        """What `combine` gives this rank, where rank r combines ys[r], whose rows come from origins[r].

        From +0.0, the biases in order, then each rank's part by ascending rank, in float32 (float64 for float64), rounded
        once. A part of several rows (expert layout) is first summed the same way in the order of the rows, which is by
        ascending expert and pick, and rounded. With nodes of `per_node` ranks the parts of a node are first summed by
        ascending rank and rounded, and then the nodes' sums; a node of one rank leaves nothing to round.
        """
        dtype = ys[rank].dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        parts = [self._parts(rank, y, rows) for y, rows in zip(ys, origins, strict=True)]
        out = torch.zeros(self.given[rank].num_tokens, ys[rank].size(1), dtype=dtype)
        for token in range(out.size(0)):
            total = torch.zeros(out.size(1), dtype=wide)
            for bias in biases:
                total = total + bias[token].to(wide)
            for first in range(0, self.size, per_node):
                here = [_local_sum(part[token]) for part in parts[first : first + per_node] if token in part]
                if here:
                    total = total + _local_sum(here).to(wide)
            out[token] = total.to(dtype)
        return out

    def combine_weights(
        self, rank: int, ws: Sequence[Tensor], origins: Sequence[Sequence[Row | None]], per_node: int = 1
    ) -> Tensor:
        """[T, K] from ws[r]: [rows, K] in rank layout, [rows] in expert layout, where each stands for its own pick; by node
        first, as rows are."""
        shape = (self.given[rank].num_tokens, self.given[rank].topk_idx.size(1))
        total = torch.zeros(shape)
        for first in range(0, self.size, per_node):
            node = torch.zeros(shape)
            for w, rows in zip(ws[first : first + per_node], origins[first : first + per_node], strict=True):
                for i, row in enumerate(rows):
                    if row is None or row.source != rank:
                        continue
                    if row.k < 0:
                        node[row.token] += w[i]
                    else:
                        node[row.token, row.k] += w[i]
            total += node
        return total

    @staticmethod
    def _parts(rank: int, y: Tensor, rows: Sequence[Row | None]) -> dict[int, list[Tensor]]:
        parts: dict[int, list[Tensor]] = {}
        for i, row in enumerate(rows):
            if row is not None and row.source == rank:
                parts.setdefault(row.token, []).append(y[i])
        return parts

    def _picks(self, source: int, token: int) -> list[int]:
        return self.given[source].topk_idx[token].tolist()

    def _lives_on(self, expert: int, rank: int) -> bool:
        return expert >= 0 and expert // self.num_local == rank


def _local_sum(rows: list[Tensor]) -> Tensor:
    total = torch.zeros_like(rows[0], dtype=torch.float64 if rows[0].dtype == torch.float64 else torch.float32)
    for row in rows:
        total = total + row.to(total.dtype)
    return total.to(rows[0].dtype)


def _pick(rows: Sequence[Row | None], xs: Sequence[Tensor]) -> Tensor:
    out = torch.zeros(len(rows), xs[0].size(1), dtype=xs[0].dtype)
    for i, row in enumerate(rows):
        if row is not None:
            out[i] = xs[row.source][row.token]
    return out
