"""Where the rows of one dispatch go over the rail and within the node. The tables of a fresh dispatch are made by kernels
(rail_fresh.py); those of handles that were rebuilt from their tensors, whose counts the CPU knows, by the functions here, with
which the tests compare the kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from deepep_train.engines.hops import to_device
from deepep_train.routing import counted_down


@dataclass(frozen=True)
class Counts:
    """What one rank's streams carry in a dispatch, on the CPU.

    Attributes:
        send, recv: rows that leave this rank, and that come to it to be forwarded, by node; this node's included.
        theirs: int64 [nodes, local ranks], rows that each rank of this node gets from each source on the rail.
        begin: the same shape, where these begin in that rank's tensor.
        most: the most rows of one stream, over all ranks.
    """

    send: list[int]
    recv: list[int]
    theirs: Tensor
    begin: Tensor
    most: int


def node_counts(rank: int, local: int, send: list[int], recv: list[int], counts_RR: Tensor, most: int) -> Counts:
    """`counts_RR`: int64 [R, R], rows from each rank to each rank; the rest as in `Counts`."""
    node, rail = divmod(rank, local)
    counts_RL = counts_RR[:, node * local : (node + 1) * local]
    begin_RL = counts_RL.cumsum(0) - counts_RL
    return Counts(send, recv, counts_RL[rail::local], begin_RL[rail::local], most)


@dataclass(frozen=True)
class Tables:
    """One dispatch's places, on the GPU, int32. S rows leave over the rail, F come to be forwarded, by node and then by token;
    both count this node's, which stay. The CPU need not know how many these are: the tables may have room for more.

    Attributes:
        token: [S], the token of each row that leaves.
        send_at, recv_at: [nodes + 1], where each node's begin among the S and the F.
        slot: [F, local ranks], where a row stands in the tensor of each rank of this node; -1: not there.
        place: [T, nodes], the number of a token among its rank's rows for a node; -1: none.
        most: no stream of any rank has more rows; the same on all ranks.
        stream: the id of the stream that made them.
    """

    token: Tensor
    send_at: Tensor
    recv_at: Tensor
    slot: Tensor
    place: Tensor
    most: int
    stream: int

    @property
    def capacity(self) -> int:
        """Of F."""
        return self.slot.size(0)

    @property
    def forwarded_at(self) -> int:
        """Where F lies."""
        return self.recv_at[-1:].data_ptr()

    def tensors(self) -> list[Tensor]:
        return [self.token, self.send_at, self.recv_at, self.slot, self.place]


@dataclass(frozen=True)
class ExpertTables:
    """The expert layout as nvlink's kernels want it; csrc/nvlink/params.hpp has the names.

    Attributes:
        rows_of: int32 [N, K], the rows of each received token, ascending; -1 behind them.
        row_slot: int32 [M], whose row each is; -1: padding.
        pick_row: int32 [N, K], the row of each pick; -1: none.
        received: int32 [1], N, where there may be room for more.
    """

    rows_of: Tensor
    row_slot: Tensor
    pick_row: Tensor
    received: Tensor

    def tensors(self) -> list[Tensor]:
        return [self.rows_of, self.row_slot, self.pick_row, self.received]


def to_everyone(rank: int, local: int, nodes: int, device: torch.device, stream: int) -> Tables:
    """Of one row that each rank has for all: where it stands at every rank is its source's number."""
    at = torch.arange(nodes + 1, dtype=torch.int32, device=device)
    slot = (at[:-1] * local + rank % local).unsqueeze(1).expand(nodes, local).contiguous()
    return Tables(torch.zeros(nodes, dtype=torch.int32, device=device), at, at, slot, at[None, :-1], 1, stream)


def leaving(counts: Counts, is_token_in_rank: Tensor, stream: int) -> Tables:
    """The tables as far as the sender knows them: no row that comes is forwarded to anybody."""
    (num_tokens, num_ranks), nodes, device = is_token_in_rank.shape, len(counts.send), is_token_in_rank.device
    ends = torch.tensor([[0, *counts.send], [0, *counts.recv]], dtype=torch.int32).cumsum(1, dtype=torch.int32)
    send_at, recv_at = to_device(ends, device).unbind()
    token_in_node = is_token_in_rank.view(num_tokens, nodes, num_ranks // nodes).any(2)
    place = (counted_down(token_in_node) - 1).masked_fill_(~token_in_node, -1)
    num_rows = sum(counts.send)
    token = torch.empty(num_rows + 1, dtype=torch.int32, device=device)  # the spare one takes what does not leave
    where = torch.where(token_in_node, place + send_at[:-1], num_rows)
    number = torch.arange(num_tokens, dtype=torch.int32, device=device)
    token.scatter_(0, where.flatten().long(), number.unsqueeze(1).expand(-1, nodes).reshape(-1))
    nowhere = torch.empty(sum(counts.recv), num_ranks // nodes, dtype=torch.int32, device=device).fill_(-1)
    return Tables(token[:num_rows], send_at, recv_at, nowhere, place.contiguous(), counts.most, stream)


def slots(counts: Counts, recv_at: Tensor, masks: Tensor) -> Tensor:
    """int32 [F, local ranks]: `Tables.slot` of rows for these ranks (bool, the same shape).

    A source's rows beyond those that it has counted for a rank have none there, whatever its mask says: a stream that failed
    brings masks full of ones.
    """
    device, num_rows = masks.device, masks.size(0)
    upto = F.pad(counted_down(masks), (0, 0, 1, 0))
    both = to_device(torch.stack([counts.theirs, counts.begin]).to(torch.int32), device)
    source = torch.searchsorted(recv_at[1:], torch.arange(num_rows, dtype=torch.int32, device=device), right=True)
    within = upto[:-1] - upto[recv_at[:-1].long()][source]
    theirs, begin = both[:, source]
    return torch.where(masks & (within < theirs), within + begin, -1).to(torch.int32)
