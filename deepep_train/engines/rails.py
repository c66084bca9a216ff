"""The rdma engine's two hops on the GPU: over the rail through NVSHMEM, within the node by stores to final places.

The way, the order of sums and the protocol are those of docs/rdma.md; csrc/rdma holds the first hop's kernels, csrc/nvlink the
second's. Rows are bytes here: whatever a dispatch moves, payload, scales or what stands beside, goes the same way.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepep_train import _C  # type: ignore[attr-defined]
from deepep_train.engines import nvshmem, processes
from deepep_train.engines.arena import Arena, ArenaFull
from deepep_train.engines.hops import Route
from deepep_train.engines.low_latency import MAX_RANKS, LowLatency
from deepep_train.engines.low_latency_far import OtherNodes, tensor_at
from deepep_train.engines.nvlink_failures import cuda_failed, device_error, who_ended
from deepep_train.engines.peers import Peers, raise_if_broken
from deepep_train.engines.rail_tables import Counts, Tables, leaving, mask_words, masks_of, node_counts, slots
from deepep_train.engines.sms import default_sms, most_sms
from deepep_train.engines.two_level import Forwarding
from deepep_train.errors import ArgumentError, PeerTimeoutError
from deepep_train.routing import tokens_per_node

DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # that are summed
_STEP = 16  # bytes: rows are padded to a multiple
_PUT_BYTES = 32 << 10  # of one put, about: a quarter of it made FP8 dispatch 26% slower
_SIGNAL_BYTES = 8
_PROCESS = secrets.token_hex(8)  # containers may share host names and process numbers


class Rails:
    """One rank's two hops.

    Args:
        peers: bootstrap.
        num_local_ranks: ranks per node, consecutive.
        arena_bytes: memory that the node's ranks can reach; received rows live in it.
        rail_bytes: of NVSHMEM's memory, half for what leaves and half for what comes.
        num_qps: queue pairs, which take turns.
    """

    def __init__(
        self, peers: Peers, num_local_ranks: int, arena_bytes: int, rail_bytes: int, num_qps: int, num_sms: Any
    ) -> None:
        self.peers, self.local = peers, num_local_ranks
        self.nodes = peers.size // num_local_ranks
        self.node, self.rail = divmod(peers.rank, num_local_ranks)
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.network_bytes = 0  # that this rank has put so far, signals included
        self._num_sms, self._lock = num_sms, threading.RLock()
        kernels = nvshmem.start(peers, self.device)
        self._params = kernels.RailParams, kernels.SumParams
        self._open_node(arena_bytes)
        segment = max(1, rail_bytes // 2 // self.nodes // 128) * 128
        error = ""
        try:
            self._end = kernels.Endpoint(
                self.device.index, peers.rank, peers.size, num_local_ranks, segment, num_qps, float(peers.timeout)
            )
        except RuntimeError as caught:
            error = str(caught)
        raise_if_broken([{"error": text} for text in peers.gather_objects(error, "Buffer")])
        self._segment = segment
        self._received = tensor_at(self._end.recv, self.nodes * segment, self.device)  # what the rail writes to
        self.low_latency = self._low_latency(kernels)

    def _open_node(self, arena_bytes: int) -> None:
        """Map the memory of this node's ranks."""
        peers, first = self.peers, self.node * self.local
        properties = torch.cuda.get_device_properties(self.device)
        total = _C.Communicator.control_bytes() + arena_bytes
        mine: dict[str, Any] = {"process": f"{_PROCESS}/{os.getpid()}", "error": "", "handle": "", "base": 0}
        mine |= {"index": self.device.index, "identity": processes.identity()}
        mine["device"] = f"{os.uname().nodename}/{properties.uuid}"
        try:
            self._comm = _C.Communicator(self.device.index, self.rail, self.local, total, float(peers.timeout))
            mine["base"] = self._comm.base
            mine["handle"] = self._comm.ipc_handle().hex() if self.local > 1 else ""
        except RuntimeError as error:
            mine["error"] = f"no arena of {total} bytes: {error}"
        everyone = peers.gather_objects(mine, "Buffer")
        raise_if_broken(everyone)
        try:
            self._comm.open(
                [
                    (b"" if o["process"] == mine["process"] else bytes.fromhex(o["handle"]), o["base"], o["index"])
                    for o in everyone[first : first + self.local]
                ]
            )
        except RuntimeError as error:
            mine["error"] = str(error)
        raise_if_broken(peers.gather_objects(mine, "Buffer"))
        self._processes = [o["identity"] for o in everyone]
        self._arena = Arena(self._comm, self.device)
        sharing = sum(o["device"] == mine["device"] for o in everyone)
        self._one_gpu = len({o["device"] for o in everyone[first : first + self.local]}) == 1
        sms = properties.multi_processor_count
        self._max_sms = most_sms(sms, sharing)
        self._default_sms = {
            what: default_sms(what, properties.major, sms, peers.size, sharing) for what in ("dispatch", "combine")
        }

    def _low_latency(self, kernels: Any) -> LowLatency | None:
        if self.peers.size > MAX_RANKS:
            return None
        first, size = self.node * self.local, self.peers.size
        arenas = [0] * size
        arenas[first : first + self.local] = self._comm.addresses()
        far = OtherNodes(kernels, self._end, first, self.local, size, self.device)
        how = (self._max_sms, self._one_gpu, lambda: self._operation(None), self.device, far)
        return LowLatency(self.peers, self._arena, arenas, *how)

    # What a route needs ------------------------------------------------------------------------------------------------

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
        tables = leaving(counts, is_token_in_rank, self._stream())
        return replace(tables, slot=slots(counts, tables.recv_at, forwarding.masks))

    def open(self, counts: Counts, is_token_in_rank: Tensor, words: Tensor, num_received: int) -> tuple[Tables, Tensor]:
        """The tables of a new dispatch, and `words` (int32 [T, n]) as they come, [num_received, n].

        A token's masks go with its words; forwarders make their tables from what came over the rail and then forward it.
        """
        with self._operation(None) as stream:
            tables = leaving(counts, is_token_in_rank, stream)
            width = words.size(1)
            sent = torch.cat([words, mask_words(is_token_in_rank)], 1)
            data = _as_rows(sent)
            self._need_room(tables, data.size(1))
            addresses = self._exchange(tables, [data], data.size(1), 0, stream)
            came = self._came(tables, data).view(torch.int32)[:, width : sent.size(1)]
            masks = masks_of(came, self.node, self.local)
            tables = replace(tables, slot=slots(counts, tables.recv_at, masks))
            (got,) = self._forward(tables, [data], addresses, num_received, 0, 0, stream)
            return tables, got.view(torch.int32)[:, :width]

    def _came(self, tables: Tables, data: Tensor) -> Tensor:
        """[F, row_bytes]: a copy of what the rail has brought, and of this node's own among `data`."""
        row_bytes, counts = data.size(1), tables.counts
        own = sum(counts.send[: self.node])
        parts = []
        for n, rows in enumerate(counts.recv):
            if n == self.node:
                parts.append(data.index_select(0, tables.token[own : own + rows]))
            else:
                parts.append(self._received[n * self._segment :][: rows * row_bytes].view(rows, row_bytes))
        return torch.cat(parts)

    def _need_room(self, tables: Tables, row_bytes: int) -> None:
        """Raise, on every rank alike, if the streams have no room for rows of this width."""
        if tables.counts.most * row_bytes > self._segment:
            need = 2 * self.nodes * (tables.counts.most * row_bytes + 127)
            raise ArgumentError(
                f"{tables.counts.most} rows of {row_bytes} bytes between two nodes do not fit into the {self._segment} bytes "
                f"for one node; pass num_rdma_bytes={need} or more to Buffer",
                "num_rdma_bytes",
            )

    def dispatch(
        self, tables: Tables, parts: Sequence[Tensor], num_received: int, spare: int, num_sms: int = 0
    ) -> list[Tensor]:
        """One or two tensors' rows, which travel together, [T, n] each -> [num_received + spare, n] each, by (source rank,
        token), zeros at the end."""
        data = [_as_rows(part) for part in parts]
        wire_bytes = sum(d.size(1) for d in data)
        self._need_room(tables, wire_bytes)
        with self._operation(tables) as stream:
            addresses = self._exchange(tables, data, wire_bytes, num_sms, stream)
            got = self._forward(tables, data, addresses, num_received, spare, num_sms, stream)
            return [_as_elements(rows, part) for rows, part in zip(got, parts, strict=True)]

    def _forward(
        self,
        tables: Tables,
        data: Sequence[Tensor],
        addresses: Tensor,
        num_received: int,
        spare: int,
        num_sms: int,
        stream: int,
    ) -> list[Tensor]:
        """Rows from their `addresses` to the ranks of this node: for each of `data` [num_received + spare, its row's bytes]."""
        try:
            landings = self._arena.land([((num_received + spare, d.size(1)), torch.uint8) for d in data])
        except ArenaFull as full:
            self._comm.refuse("dispatch", full.num_bytes, stream)
            raise self._arena.too_small(self.peers.rank, full.num_bytes) from None
        d = _C.DispatchParams()
        rows, *beside = data
        offsets, sizes = [0] * 5, [0] * 5
        for i, (landing, part) in enumerate(zip(landings, data, strict=True)):
            assert landing is not None
            offsets[i], sizes[i] = self._arena.offset(landing.visible), num_received * part.size(1)
        d.x, d.row_from = rows.data_ptr(), addresses[0].data_ptr()
        d.row_bytes, d.num_tokens = rows.size(1), tables.forwarded
        if beside:
            d.scales_from = addresses[1].data_ptr()
            d.scale_words, d.scale_word_stride = beside[0].size(1) // 4, 1
        d.send_slot = d.send_row = tables.slot.data_ptr()
        d.offsets, d.sizes = offsets, sizes
        d.signature, d.num_sms = sum(part.size(1) << (32 * i) for i, part in enumerate(data)), self._sms(num_sms, "dispatch")
        self._comm.dispatch(d, stream)
        got = []
        for landing in landings:
            assert landing is not None
            if spare:
                landing.visible[num_received:].zero_()
            if landing.tensor is not landing.visible:
                landing.tensor.copy_(landing.visible)
            got.append(landing.tensor)
        return got

    def combine(self, tables: Tables, rows: Tensor, num_tokens: int, bias: Sequence[Tensor], num_sms: int = 0) -> Tensor:
        """[num_received, n] -> [num_tokens, n]: each node's rows by ascending rank, then the biases and the nodes' sums by
        ascending node, each in float32, rounded once."""
        data, biases = _as_rows(rows), [_as_rows(b) for b in bias]
        row_bytes = data.size(1)
        self._need_room(tables, row_bytes)
        with self._operation(tables) as stream:
            if not self._arena.holds(data) and data.numel():
                try:
                    data = self._arena.temporary(data.shape, data.dtype).copy_(data)
                except ArenaFull as full:
                    self._comm.refuse("combine", full.num_bytes, stream)
                    raise self._arena.too_small(self.peers.rank, full.num_bytes) from None
            c = _C.CombineParams()
            c.y, c.out, c.row_bytes, c.num_tokens = data.data_ptr(), self._end.send, row_bytes, tables.forwarded
            c.pull_row = c.send_slot = tables.slot.data_ptr()
            c.offsets = [self._arena.offset(data), 0, 0, 0, 0]
            c.signature, c.dtype = row_bytes, DTYPES[rows.dtype]
            c.num_sms = self._sms(num_sms, "combine")
            self._comm.combine(c, stream)
            self._exchange(tables, (), row_bytes, num_sms, stream)
            out = torch.empty(num_tokens, row_bytes, dtype=torch.uint8, device=self.device)
            s = self._params[1]()
            s.out, s.row_bytes, s.num_tokens, s.dtype = out.data_ptr(), row_bytes, num_tokens, DTYPES[rows.dtype]
            s.bias_0 = biases[0].data_ptr() if biases else 0
            s.bias_1 = biases[1].data_ptr() if len(biases) > 1 else 0
            s.place, s.recv_at = tables.place.data_ptr(), tables.recv_at.data_ptr()
            s.num_sms = c.num_sms
            self._end.sum(s, stream)
            return _as_elements(out, rows)

    # Inside ------------------------------------------------------------------------------------------------------------

    def _exchange(self, tables: Tables, data: Sequence[Tensor], wire_bytes: int, num_sms: int, stream: int) -> Tensor:
        """Along the rail: a dispatch's rows, of `wire_bytes` together, or, without `data`, what a combine has left in `send`.

        Returns: where they lie once they have come, this node's in `data`: int64 [len(data), F].
        """
        p = self._params[0]()
        addresses = torch.empty(len(data), tables.forwarded, dtype=torch.int64, device=self.device)
        there, back = tables.send_at.data_ptr(), tables.recv_at.data_ptr()
        p.send_at, p.recv_at = (there, back) if data else (back, there)
        p.row_bytes = wire_bytes
        if data:
            p.rows, p.row_bytes, p.token = data[0].data_ptr(), data[0].size(1), tables.token.data_ptr()
            p.addresses = addresses[0].data_ptr()
        if len(data) > 1:
            p.beside, p.beside_bytes, p.beside_addresses = data[1].data_ptr(), data[1].size(1), addresses[1].data_ptr()
        p.rows_per_put = max(1, _PUT_BYTES // wire_bytes)
        p.num_sms = self._sms(num_sms, "dispatch" if data else "combine")
        self._end.rail(p, stream)
        counts = tables.counts.send if data else tables.counts.recv
        sent = [count for node, count in enumerate(counts) if node != self.node]
        puts = sum(-(-n // p.rows_per_put) for n in sent)
        self.network_bytes += sum(sent) * wire_bytes + _SIGNAL_BYTES * (puts + self.nodes - 1)
        return addresses

    @contextmanager
    def _operation(self, tables: Tables | None) -> Iterator[int]:
        """Gives the stream; operations of all streams follow each other."""
        with self._lock, torch.cuda.device(self.device):
            stream = self._stream()
            self._comm.enter(stream)
            self._arena.begin_operation()
            if tables is not None and tables.stream != stream:
                # A handle may die as soon as a call that uses it returns: its tables must not.
                current = torch.cuda.current_stream(self.device)
                for table in tables.tensors():
                    table.record_stream(current)
            try:
                yield stream
            finally:
                self._comm.leave(stream)

    def _stream(self) -> int:
        return torch._C._cuda_getCurrentRawStream(self.device.index)

    def _sms(self, asked: int, operation: str) -> int:
        return min(asked or self._num_sms() or self._default_sms[operation], self._max_sms)

    # Life --------------------------------------------------------------------------------------------------------------

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        with self._lock, torch.cuda.device(self.device):
            try:
                return self._arena.empty(shape, dtype)
            except ArenaFull as full:
                raise self._arena.too_small(self.peers.rank, full.num_bytes) from None

    def stats(self) -> dict[str, int]:
        return self._arena.stats() | {"rail": 2 * self.nodes * self._segment, "network bytes put": self.network_bytes}

    def check(self) -> None:
        rank, timeout = self.peers.rank, self.peers.timeout
        if (failure := self._end.failure()) is not None:
            who = ", ".join(map(str, failure.ranks))
            raise PeerTimeoutError(
                f"exchange {failure.number} over the rail on rank {rank}: waited {timeout:g} s in vain for {failure.meeting}, "
                f"of rank {who}{who_ended(self._processes)}; this buffer can no longer be used",
                failure.ranks,
                "rail",
            )
        if not self._comm.is_well():
            found = self._comm.failure()
            names = ("epoch", "operation", "meeting", "cause", "bytes", "rows", "bounds")
            told = SimpleNamespace(**{name: getattr(found, name) for name in names})
            told.ranks = [self.node * self.local + r for r in found.ranks]
            raise device_error(told, rank, timeout, self._processes)
        if text := self._comm.cuda_error(self._stream()):
            raise cuda_failed(text, rank, self._processes)

    def close(self) -> None:
        with self._lock:
            if self.low_latency is not None:
                self.low_latency.close()
            self._comm.close(self._arena.was_captured)
            del self._arena


@dataclass(frozen=True)
class RailRoute(Route):
    """The way of one dispatch's rows through `Rails`, and back; `hops` say how many rows each rank sends and gets.

    Attributes:
        num_tokens, num_received: T and N.
        tables: of one element once they are learned, which is a collective call.
    """

    rails: Rails = field(kw_only=True)
    forwarding: Forwarding = field(kw_only=True)
    is_token_in_rank: Tensor = field(kw_only=True)
    recv_counts: list[int] = field(kw_only=True)
    tables: list[Tables] = field(kw_only=True, default_factory=list)

    def learn(self, operation: str) -> None:
        made = self.rails.learn(self.forwarding, self.is_token_in_rank, self.recv_counts, operation)
        self.tables[:] = [made]

    def send_together(self, parts: Sequence[Tensor], spare: int = 0) -> list[Tensor]:
        return self.rails.dispatch(self.tables[0], parts, sum(self.recv_counts), spare)

    def send(self, rows: Tensor, spare: int = 0) -> Tensor:
        return self.send_together([rows], spare)[0]

    def place(self, row: Tensor) -> Tensor:
        return row

    def sum_back(self, rows: Tensor, bias: Sequence[Tensor] = ()) -> Tensor:
        return self.rails.combine(self.tables[0], rows, self.is_token_in_rank.size(0), bias)


def _padded(row_bytes: int) -> int:
    return -(-row_bytes // _STEP) * _STEP


def _as_rows(t: Tensor) -> Tensor:
    """[rows, n] of any dtype -> uint8 [rows, padded bytes], aligned; the same memory where it can be."""
    t = t.detach()
    if not t.is_contiguous() or t.stride(-1) != 1:  # what has no rows counts as contiguous whatever its strides are
        t = t.clone(memory_format=torch.contiguous_format)
    width = t.size(1) * t.element_size()
    rows = t.view(torch.uint8).view(t.size(0), width)
    if padding := _padded(width) - width:
        rows = F.pad(rows, (0, padding))
    return rows if rows.data_ptr() % _STEP == 0 else rows.clone()


def _as_elements(rows: Tensor, like: Tensor) -> Tensor:
    """The reverse, in `like`'s dtype and width."""
    width = like.size(1) * like.element_size()
    return rows[:, :width].contiguous().view(like.dtype).view(rows.size(0), like.size(1))
