"""The rdma engine's two hops on the GPU: over the rail through NVSHMEM, within the node by stores to final places.

The way, the order of sums and the protocol are those of docs/rdma.md; csrc/rdma holds the first hop's kernels, csrc/nvlink the
second's. Rows are bytes here: whatever a dispatch moves, payload, scales or what stands beside, goes the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepep_train import _C  # type: ignore[attr-defined]
from deepep_train.engines.arena import Landing
from deepep_train.engines.base import address_of
from deepep_train.engines.peers import Peers
from deepep_train.engines.rail_domain import BEHIND_WORDS, RailDomain
from deepep_train.engines.rail_rows import as_elements, as_rows
from deepep_train.engines.rail_stages import Turns
from deepep_train.engines.rail_tables import ExpertTables, Tables, leaving, node_counts, slots, to_everyone
from deepep_train.engines.two_level import Forwarding
from deepep_train.routing import tokens_per_node

DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # that are summed
Step = Callable[[Turns, int], None]  # on this stream
_PUT_BYTES = 32 << 10  # of one put, about: a quarter of it made FP8 dispatch 26% slower
_SIGNATURES = (1 << 24) - 1  # on the rail, the last one apart: rail.cu's kSignatureBits and kRefuses


class Crossed(NamedTuple):
    """A dispatch's rows that are put along the rail, and passed on later.

    Attributes:
        data: one or two tensors, uint8 [T, n] each.
        addresses: int64 [len(data), F or more], where they lie once they have come; this node's in `data`.
    """

    data: list[Tensor]
    addresses: Tensor

    @property
    def row_bytes(self) -> int:
        return sum(d.size(1) for d in self.data)


class Rails(RailDomain):
    """One rank's two hops; the arguments are `RailDomain`'s."""

    def __init__(
        self, peers: Peers, num_local_ranks: int, arena_bytes: int, rail_bytes: int, num_qps: int, num_sms: Any
    ) -> None:
        super().__init__(peers, num_local_ranks, arena_bytes, rail_bytes, num_qps, num_sms)
        self.everyone = to_everyone(peers.rank, num_local_ranks, self.nodes, self.device, self.stream())

    def learn(self, forwarding: Forwarding, is_token_in_rank: Tensor, recv_counts: list[int], operation: str) -> Tables:
        """The tables of a handle that knows its masks alone; a collective call, since who forwards must know where its rows
        begin at every rank of its node.

        Args:
            is_token_in_rank: bool [T, R].
            recv_counts: rows that come to this rank, by their source.
        """
        peers = self.peers
        send, recv = tokens_per_node(is_token_in_rank, self.nodes).tolist(), list(forwarding.counts)
        mine = torch.tensor([max(send + recv), *recv_counts], dtype=torch.int64, device=peers.header_device)
        table = peers.all_gather(mine, operation).cpu()
        counts = node_counts(peers.rank, self.local, send, recv, table[:, 1:].t(), int(table[:, 0].max()))
        tables = leaving(counts, is_token_in_rank, self.stream())
        return replace(tables, slot=slots(counts, tables.recv_at, forwarding.masks))

    # Operations --------------------------------------------------------------------------------------------------------

    def dispatch(
        self,
        tables: Tables,
        parts: Sequence[Tensor],
        num_rows: int,
        received: Tensor | None,
        experts: ExpertTables | None,
        signature: int,
        num_sms: int = 0,
        crossed: Crossed | None = None,
    ) -> list[Tensor]:
        """One or two tensors' rows, which travel together, [T, n] each -> [num_rows, n] each.

        Args:
            received: int32 [1] on the GPU, how many rows come, zeros behind them; None: all of them.
            experts: how they are arranged; None: by (source rank, token).
            signature: of what all ranks must agree on, which the kernels compare.
            crossed: these parts, if they have crossed before: `cross`.
        """
        is_across = crossed is not None
        with self.operation(tables, *(BEHIND_WORDS if is_across else self.dispatch_steps), also=experts) as stream:
            crossed = crossed or self.to_cross(parts, tables.capacity)
            (data, addresses), row_bytes = crossed, crossed.row_bytes
            self.need_room(tables.most, row_bytes)
            landings: list[Landing] = []
            visible: list[Tensor] = []
            by_expert: list[Tensor] = []
            network_sms, node_sms = self._shares(self.sms(num_sms, "dispatch"))

            def cross(turns: Turns, on: int) -> None:
                self._cross(tables, data, addresses, row_bytes, signature, network_sms, on, turns)

            def make_room() -> list[Tensor]:
                if experts is not None:
                    by_expert.extend(torch.empty(num_rows, d.size(1), dtype=torch.uint8, device=self.device) for d in data)
                    return [self.arena.temporary((experts.rows_of.size(0), d.size(1)), torch.uint8) for d in data]
                landed = self.arena.land([((num_rows, d.size(1)), torch.uint8) for d in data])
                landings.extend(one for one in landed if one)
                return [one.visible for one in landings]

            def forward(turns: Turns, on: int) -> None:
                visible[:] = visible or make_room()  # while the network is at work
                self.forward(tables, data, addresses, visible, signature, node_sms, on, turns)

            if is_across:
                forward(self.stages.dispatch[0], stream)
                self.owe_no_more()
            else:
                self._overlap(self.stages.dispatch, cross, forward, stream, network_is_first=True)
            if experts is None:
                got = [self._arrive(one, received, num_sms, stream) for one in landings]
                self.arena.watch(landings)
            else:
                got = by_expert
                for came, rows in zip(visible, got, strict=True):
                    self._expand(came, rows, experts, num_sms, stream)
            return [as_elements(rows, part) for rows, part in zip(got, parts, strict=True)]

    def combine(
        self,
        tables: Tables,
        rows: Tensor,
        num_tokens: int,
        experts: ExpertTables | None,
        bias: Sequence[Tensor],
        signature: int,
        num_sms: int = 0,
    ) -> Tensor:
        """[num_rows, n] -> [num_tokens, n]: with `experts` a token's rows here by ascending row, then each node's by ascending
        rank, then the biases and the nodes' sums by ascending node; each in float32, rounded once. `signature` as above."""
        with self.operation(tables, *self.combine_steps, also=experts) as stream:
            data, biases = as_rows(rows), [as_rows(b) for b in bias]
            row_bytes = data.size(1)
            self.need_room(tables.most, row_bytes)
            if experts is not None:
                data = self._reduce(data, experts, DTYPES[rows.dtype], num_sms, stream)
            elif not self.arena.holds(data) and data.numel():
                data = self.arena.temporary(data.shape, data.dtype).copy_(data)
            c = _C.CombineParams()
            c.y, c.out, c.row_bytes = data.data_ptr(), self.end.send, row_bytes
            c.num_tokens, c.num_tokens_at = tables.capacity, tables.forwarded_at
            c.pull_row = c.send_slot = tables.slot.data_ptr()
            c.offsets = [self.arena.offset(data), 0, 0, 0, 0]
            c.signature, c.rail_failed, c.dtype = signature, self.end.failed_flag, DTYPES[rows.dtype]
            all_sms = self.sms(num_sms, "combine")
            network_sms, c.num_sms = self._shares(all_sms)

            def add_up(turns: Turns, on: int) -> None:
                c.parts = self._parts(tables, turns, turns.destinations(self.node, self.nodes))
                self.comm.combine(c, on)
                self._owed.pop(0)

            def cross(turns: Turns, on: int) -> None:
                self._cross(tables, (), None, row_bytes, signature, network_sms, on, turns)

            self._overlap(self.stages.combine, add_up, cross, stream, network_is_first=False)
            out = torch.empty(num_tokens, row_bytes, dtype=torch.uint8, device=self.device)
            s = self.kernels.SumParams()
            s.out, s.row_bytes, s.num_tokens, s.dtype = out.data_ptr(), row_bytes, num_tokens, DTYPES[rows.dtype]
            s.bias_0 = biases[0].data_ptr() if biases else 0
            s.bias_1 = biases[1].data_ptr() if len(biases) > 1 else 0
            s.place, s.recv_at = tables.place.data_ptr(), tables.recv_at.data_ptr()
            s.num_sms = all_sms
            self.end.sum(s, stream)
            return as_elements(out, rows)

    # Their steps -------------------------------------------------------------------------------------------------------

    @property
    def crosses_ahead(self) -> bool:
        """Whether a dispatch's rows may cross before it; not in stages, where they cross while others are passed on."""
        return self._network is None

    def to_cross(self, parts: Sequence[Tensor], capacity: int) -> Crossed:
        """These rows, which have not crossed yet, with room for where so many will lie that come."""
        data = [as_rows(part) for part in parts]
        return Crossed(data, self.addresses(len(data), capacity))

    def cross(self, tables: Tables, rows: Crossed, signature: int, num_sms: int, stream: int, goes: Tensor | None) -> None:
        """The rows of a dispatch along the rail, ahead of `dispatch`, which passes on what has come: of `tables` only what
        leaves and what comes need be known. If int32 [1] `goes` is 0 there, it is on all ranks, and nothing happens."""
        sms = self.sms(num_sms, "dispatch")
        self._cross(tables, rows.data, rows.addresses, rows.row_bytes, signature, sms, stream, goes=goes)

    def exchange(
        self,
        tables: Tables,
        data: Sequence[Tensor],
        wire_bytes: int,
        signature: int,
        num_sms: int,
        stream: int,
        behind: int = 0,
    ) -> Tensor:
        """A dispatch's rows along the rail, of `wire_bytes` together; `behind` its rows of so many bytes that have come before
        and are still wanted.

        Returns: where they lie once they have come, this node's in `data`: int64 [len(data), `tables.capacity`].
        """
        addresses = self.addresses(len(data), tables.capacity)
        sms = self.sms(num_sms, "dispatch")
        self._cross(tables, data, addresses, wire_bytes, signature, sms, stream, recv_offset=tables.most * behind)
        return addresses

    def addresses(self, num_parts: int, capacity: int) -> Tensor:
        """Room for `Crossed.addresses`."""
        return torch.empty(num_parts, capacity, dtype=torch.int64, device=self.device)

    def _cross(
        self,
        tables: Tables,
        data: Sequence[Tensor],
        addresses: Tensor | None,
        wire_bytes: int,
        signature: int,
        num_sms: int,
        stream: int,
        turns: Turns | None = None,
        recv_offset: int = 0,
        goes: Tensor | None = None,
    ) -> None:
        """As `exchange`, in these turns; or, without `data`, what a combine has left in `send`. `goes` as for `cross`."""
        p = self.kernels.RailParams()
        there, back = tables.send_at.data_ptr(), tables.recv_at.data_ptr()
        p.send_at, p.recv_at = (there, back) if data else (back, there)
        p.row_bytes = wire_bytes
        if addresses is not None:
            p.rows, p.row_bytes, p.token = data[0].data_ptr(), data[0].size(1), tables.token.data_ptr()
            p.addresses = addresses[0].data_ptr()
        if addresses is not None and len(data) > 1:
            p.beside, p.beside_bytes, p.beside_addresses = data[1].data_ptr(), data[1].size(1), addresses[1].data_ptr()
        p.rows_per_put = max(1, _PUT_BYTES // wire_bytes)
        p.recv_offset, p.signature, p.num_sms = recv_offset, signature % _SIGNATURES, num_sms
        p.goes = address_of(goes)
        if turns is not None:
            p.first_turn, p.end_turn = turns
        self.end.rail(p, stream)
        self._owed.pop(0)

    def forward(
        self,
        tables: Tables,
        data: Sequence[Tensor],
        addresses: Tensor,
        visible: Sequence[Tensor],
        signature: int,
        num_sms: int,
        stream: int,
        turns: Turns | None = None,
    ) -> None:
        """Rows from their `addresses` to the ranks of this node, here to `visible`, one for each of `data`; those that came in
        these turns."""
        d = _C.DispatchParams()
        if turns is not None:
            d.parts = self._parts(tables, turns, turns.sources(self.node, self.nodes))
        rows, *beside = data
        offsets, sizes = [0] * 5, [0] * 5
        for i, there in enumerate(visible):
            offsets[i], sizes[i] = self.arena.offset(there), there.numel()
        d.x, d.row_from, d.row_bytes = rows.data_ptr(), addresses[0].data_ptr(), rows.size(1)
        d.num_tokens, d.num_tokens_at = tables.capacity, tables.forwarded_at
        if beside:
            d.scales_from = addresses[1].data_ptr()
            d.scale_words = beside[0].size(1) // 4
        d.send_slot = d.send_row = tables.slot.data_ptr()
        d.offsets, d.sizes = offsets, sizes
        d.signature, d.rail_failed, d.num_sms = signature, self.end.failed_flag, self.sms(num_sms, "dispatch")
        self.comm.dispatch(d, stream)
        self._owed.pop(0)

    def _parts(self, tables: Tables, turns: Turns, first: int) -> Any:
        """Of the rows that this rank forwards, those of `turns`, from the node `first` on."""
        parts = _C.Parts()
        if self._network is not None:
            parts.at, parts.num_parts = tables.recv_at.data_ptr(), self.nodes
            parts.first, parts.count = first, turns.end - turns.first
        return parts

    def _shares(self, num_sms: int) -> tuple[int, int]:
        """SMs for the network and for the node, one each at least: all, where they take turns; else few need to feed a card."""
        if self._network is None:
            return num_sms, num_sms
        few = max(1, num_sms // 4)
        return few, max(1, num_sms - few)

    def _overlap(self, stages: list[Turns], first: Step, second: Step, stream: int, network_is_first: bool) -> None:
        """Both hops of every stage, each hop on a stream of its own, `second` behind `first`; `stream` then waits for all."""
        if self._network is None:
            first(stages[0], stream)
            second(stages[0], stream)
            return
        node, network = torch.cuda.current_stream(self.device), self._network
        if torch.cuda.is_current_stream_capturing():  # a capture's streams are nobody else's until it ends
            network = torch.cuda.Stream(self.device, priority=-1)
        ahead, behind = (network, node) if network_is_first else (node, network)
        network.wait_stream(node)
        try:
            done: list[torch.cuda.Event] = []
            for stage in range(len(stages) + 1):
                if stage < len(stages):
                    first(stages[stage], ahead.cuda_stream)
                    done.append(ahead.record_event())
                if stage > 0:
                    behind.wait_event(done[stage - 1])
                    second(stages[stage - 1], behind.cuda_stream)
        finally:
            node.wait_stream(network)

    def _arrive(self, landing: Landing, received: Tensor | None, num_sms: int, stream: int) -> Tensor:
        """What lies where peers put it, once the rows that did not come are zero."""
        rows = landing.visible
        if received is not None:
            p = _C.ExpandParams()
            p.num_rows, p.row_bytes = rows.shape
            p.x, p.num_received, p.num_sms = rows.data_ptr(), received.data_ptr(), self.sms(num_sms, "dispatch")
            self.comm.expand(p, stream)
        return rows if landing.tensor is rows else landing.tensor.copy_(rows)

    def _expand(self, came: Tensor, out: Tensor, experts: ExpertTables, num_sms: int, stream: int) -> None:
        """[N, row_bytes] -> [M, row_bytes]."""
        num_rows, row_bytes = out.shape
        p = _C.ExpandParams()
        p.x, p.source, p.row_bytes, p.num_rows = out.data_ptr(), came.data_ptr(), row_bytes, num_rows
        p.rows_of, p.row_slot, p.top_k = experts.rows_of.data_ptr(), experts.row_slot.data_ptr(), experts.rows_of.size(1)
        p.num_several = p.num_received = experts.received.data_ptr()
        p.num_sms = self.sms(num_sms, "dispatch")
        self.comm.expand(p, stream)

    def _reduce(self, rows: Tensor, experts: ExpertTables, dtype: int, num_sms: int, stream: int) -> Tensor:
        """[M, row_bytes] -> [N, row_bytes], which peers can read."""
        partials = self.arena.temporary((experts.rows_of.size(0), rows.size(1)), torch.uint8)
        p = _C.ReduceParams()
        p.y, p.partials, p.rows_of = rows.data_ptr(), partials.data_ptr(), experts.rows_of.data_ptr()
        p.num_tokens, p.top_k = experts.received.data_ptr(), experts.rows_of.size(1)
        p.row_bytes, p.dtype, p.num_sms = rows.size(1), dtype, self.sms(num_sms, "combine")
        self.comm.reduce(p, stream)
        return partials
