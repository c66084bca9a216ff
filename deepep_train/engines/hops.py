"""How rows travel between ranks: hops, each one exchange, and the route that strings them together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepep_train.engines.expert_layout import accumulator, extend, ordered_sums
from deepep_train.engines.peers import Peers
from deepep_train.routing import send_order


@dataclass(frozen=True)
class Hop:
    """One exchange of rows, there and back.

    Attributes:
        num_rows: rows that this rank holds before the hop.
        send_row: int64 [S], which of them each row sent is, by destination and then ascending.
        send_counts, recv_counts: rows sent to and received from each rank of the group.
    """

    peers: Peers
    num_rows: int
    send_row: Tensor
    send_counts: list[int]
    recv_counts: list[int]

    def send(self, rows: Tensor, spare: int = 0) -> Tensor:
        """[num_rows, n] -> [sum(recv_counts) + spare, n], by source and then as the source holds them; zeros at the end."""
        is_alone = self.peers.size == 1  # then these very rows may be the result
        sent = None if is_alone else self.peers.outgoing((self.send_row.numel(), *rows.shape[1:]), rows)
        sent = torch.index_select(rows.detach(), 0, self.send_row, out=sent)
        return self.peers.all_to_all_rows(sent, self.send_counts, self.recv_counts, "dispatch", spare)

    def gather(self, rows: Tensor) -> Tensor:
        """[num_rows, n] -> [sum(recv_counts) + 1, n]: this rank's rows to itself, which go straight to their place, then the
        others' by source, then one of zeros; until the next exchange."""
        rows, rank = rows.detach(), self.peers.rank
        give, take, own = list(self.send_counts), list(self.recv_counts), self.recv_counts[rank]
        first = sum(give[:rank])
        before, mine, behind = self.send_row.tensor_split([first, first + own])
        give[rank] = take[rank] = 0
        got = self.peers.scratch.empty("received", (own + sum(take) + 1, *rows.shape[1:]), rows)
        torch.index_select(rows, 0, mine, out=got[:own])
        sent = self.peers.outgoing((sum(give), *rows.shape[1:]), rows)
        torch.index_select(rows, 0, before, out=sent[:first])
        torch.index_select(rows, 0, behind, out=sent[first:])
        self.peers.all_to_all_rows(sent, give, take, "dispatch", 1, got[own:])
        return got

    def place(self, row: Tensor) -> Tensor:
        """Numbers of rows as `send` gives them (int64, any shape) as numbers of `gather`'s."""
        first, own = sum(self.recv_counts[: self.peers.rank]), self.recv_counts[self.peers.rank]
        is_own = (row >= first) & (row < first + own)
        return torch.where(is_own, row - first, torch.where(row < first, row + own, row))

    def sum_back(self, rows: Tensor, bias: Sequence[Tensor] = ()) -> Tensor:
        """[sum(recv_counts), n] -> [num_rows, n]: from +0.0, the biases in order, then ascending ranks, rounded once."""
        back = self.peers.scratch.empty("received", (self.send_row.numel(), *rows.shape[1:]), rows)
        back = self.peers.all_to_all_rows(rows, self.recv_counts, self.send_counts, "combine", out=back)
        if not bias and rows.device.type == "cpu":
            # Sorted by row and stable, what was sent stays in order of ranks.
            row, index = self.send_row.sort(stable=True)
            offsets = torch.searchsorted(row, torch.arange(self.num_rows + 1, device=row.device))
            return ordered_sums(back, index, offsets)
        total = torch.zeros(self.num_rows, rows.size(1), dtype=accumulator(rows.dtype), device=rows.device)
        for b in bias:
            total.add_(b)
        start = 0
        for count in self.send_counts:
            here = slice(start, start + count)
            # A row is sent to a rank once, so no two additions meet and the order is the loop's.
            total.index_add_(0, self.send_row[here], back[here].to(total.dtype))
            start += count
        return total.to(rows.dtype)


@dataclass(frozen=True)
class Route:
    """The way of one dispatch's rows, and back.

    Attributes:
        hops: in the order in which a dispatch makes them.
        order: int64 [N], where among the rows that the last hop brings each row stands in the contract's order, by (source
            rank, token); None if they come in it.
    """

    hops: tuple[Hop, ...]
    order: Tensor | None = None

    def send(self, rows: Tensor, spare: int = 0) -> Tensor:
        """[T, n] -> [N + spare, n] in the order of arrival, zeros at the end."""
        *first, last = self.hops
        for hop in first:
            rows = hop.send(rows)
        return last.send(rows, spare)

    def gather(self, rows: Tensor) -> Tensor:
        """[T, n] -> [N + 1, n], the last row zeros, in an order that `place` knows; until the next exchange."""
        *first, last = self.hops
        for hop in first:
            rows = hop.send(rows)
        return last.gather(rows)

    def place(self, row: Tensor) -> Tensor:
        """Numbers of rows by (source rank, token), N for the row of zeros (int64 [M]), as numbers of `gather`'s."""
        if self.order is not None:
            row = extend(self.order, self.order.numel() + 1, self.order.numel())[row]
        return self.hops[-1].place(row)

    def deliver(self, rows: Tensor) -> Tensor:
        """[T, n] -> [N, n] by (source rank, token)."""
        arrived = self.send(rows)
        return arrived if self.order is None else arrived.index_select(0, self.order)

    def sum_back(self, rows: Tensor, bias: Sequence[Tensor] = ()) -> Tensor:
        """[N, n] by (source rank, token) -> [T, n]: every hop sums what comes back to it, rounded to the rows' dtype; the
        biases are the start of the last of these sums."""
        if self.order is not None:
            rows = rows.index_select(0, self.order.argsort())
        first, *later = self.hops
        for hop in reversed(later):
            rows = hop.sum_back(rows)
        return first.sum_back(rows, bias)


def to_device(t: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU's on `device`, without waiting for what runs there: memory that may be paged is read at once."""
    return t.to(device, non_blocking=True)


def direct(peers: Peers, is_token_in_rank: Tensor, recv_counts: list[int]) -> Route:
    """Every row goes straight to each of its ranks; `is_token_in_rank` bool [T, R], `recv_counts` by source."""
    send_counts = is_token_in_rank.sum(0).tolist()
    return Route((Hop(peers, is_token_in_rank.size(0), send_order(is_token_in_rank)[1], send_counts, recv_counts),))
