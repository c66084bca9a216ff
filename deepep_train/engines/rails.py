"""The rdma engine's two hops on the GPU: over the rail through NVSHMEM, within the node by stores to final places.

The way, the order of sums and the protocol are those of docs/rdma.md; csrc/rdma holds the first hop's kernels, csrc/nvlink the
second's. Rows are bytes here: whatever a dispatch moves, payload, scales or what stands beside, goes the same way.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from torch import Tensor

from deepep_train import _C  # type: ignore[attr-defined]
from deepep_train.engines import nvshmem, processes
from deepep_train.engines.arena import Arena, ArenaFull, Landing
from deepep_train.engines.low_latency import MAX_RANKS, LowLatency, weakly
from deepep_train.engines.low_latency_far import OtherNodes, tensor_at
from deepep_train.engines.nvlink_failures import AWAITED, cuda_failed, device_error, rail_error, who_ended
from deepep_train.engines.peers import Peers, raise_if_broken
from deepep_train.engines.rail_rows import as_elements, as_rows
from deepep_train.engines.rail_tables import (
    Counts,
    ExpertTables,
    Tables,
    leaving,
    mask_words,
    masks_of,
    node_counts,
    num_words,
    slots,
    to_everyone,
)
from deepep_train.engines.sms import default_sms, most_sms
from deepep_train.engines.two_level import Forwarding
from deepep_train.errors import ArgumentError, DeepEPError, PeerTimeoutError
from deepep_train.routing import tokens_per_node

DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # that are summed
_PUT_BYTES = 32 << 10  # of one put, about: a quarter of it made FP8 dispatch 26% slower
_SIGNAL_BYTES = 8
_SEGMENT_STEP = 128  # bytes
_SIGNATURES = (1 << 24) - 1  # on the rail, the last one apart: rail.cu's kSignatureBits and kRefuses
_PROCESS = secrets.token_hex(8)  # containers may share host names and process numbers


# What the ranks wait for in a dispatch and a combine, in order: the rail's exchange, and nvlink's operation.
RAIL = "rail"
DISPATCH, COMBINE = (RAIL, "dispatch"), ("combine", RAIL)


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
        self.network_bytes = 0  # that this rank's normal calls have put so far, signals included
        self._num_sms, self._lock = num_sms, threading.RLock()
        self._owed: list[str] = []  # of the operation under way: what other ranks still wait for, in order
        kernels = nvshmem.start(peers, self.device)
        self._params = kernels.RailParams, kernels.SumParams
        self._open_node(arena_bytes)
        segment = max(1, rail_bytes // 2 // self.nodes // _SEGMENT_STEP) * _SEGMENT_STEP
        error = ""
        try:
            how = (self.device.index, peers.rank, peers.size, num_local_ranks, segment, num_qps, float(peers.timeout))
            self._end = nvshmem.before_deadline(peers, lambda: kernels.Endpoint(*how, self._comm.failed_flag))
        except RuntimeError as caught:
            error = str(caught)
        raise_if_broken([{"error": text} for text in peers.gather_objects(error, "Buffer")])
        self._everyone = to_everyone(peers.rank, num_local_ranks, self.nodes, self.device, self._stream())
        self._look_at_memory()
        self.low_latency = self._low_latency(kernels)

    def _look_at_memory(self) -> None:
        """Python's eyes on the memory that the rail writes to."""
        self._segment = self._end.segment_bytes
        self._received = tensor_at(self._end.recv, self.nodes * self._segment, self.device)

    def _open_node(self, arena_bytes: int) -> None:
        """Map the memory of this node's ranks."""
        peers, first = self.peers, self.node * self.local
        properties = torch.cuda.get_device_properties(self.device)
        total = _C.Communicator.control_bytes() + arena_bytes
        mine: dict[str, Any] = {"process": f"{_PROCESS}/{os.getpid()}", "error": "", "handle": "", "base": 0}
        mine |= {"index": self.device.index, "identity": processes.identity()}
        mine["device"] = f"{os.uname().nodename}/{properties.uuid}"
        torch.cuda.empty_cache()  # arenas of buffers that are gone are in it
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
        how = (self._max_sms, self._one_gpu, weakly(self._ordered), self.device, far)
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

    def gather(self, words: Tensor, signature: int) -> Tensor:
        """int32 [n] of every rank, n the same on all -> [R, n] on the CPU, which waits for the GPU. What has failed on the
        device has then made it meaningless."""
        data = as_rows(words.unsqueeze(0))
        with self._operation(self._everyone, *DISPATCH) as stream:
            addresses = self._exchange(self._everyone, [data], data.size(1), signature, 0, stream)
            (got,) = self._forward(self._everyone, [data], addresses, self.peers.size, None, signature, 0, stream)
            return got.cpu().view(torch.int32)[:, : words.numel()]

    def open(
        self, counts: Counts, is_token_in_rank: Tensor, words: Tensor, num_received: int, signature: int
    ) -> tuple[Tables, Tensor]:
        """The tables of a new dispatch, and `words` (int32 [T, n]) as they come, [num_received, n].

        A token's masks go with its words; forwarders make their tables from what came over the rail and then forward it.
        """
        width = words.size(1)
        data = as_rows(torch.cat([words, mask_words(is_token_in_rank)], 1))
        self._need_room(counts, data.size(1))
        with self._operation(None, *DISPATCH) as stream:
            tables = leaving(counts, is_token_in_rank, stream)
            addresses = self._exchange(tables, [data], data.size(1), signature, 0, stream)
            came = self._came(tables, data).view(torch.int32)[:, width : width + num_words(is_token_in_rank.size(1))]
            masks = masks_of(came, self.node, self.local)
            tables = replace(tables, slot=slots(counts, tables.recv_at, masks))
            (got,) = self._forward(tables, [data], addresses, num_received, 0, signature, 0, stream)
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

    def make_room(self, counts: Counts, row_bytes: int) -> None:
        """Memory for rows of this width between any two nodes; a collective call, which all ranks make alike."""
        need = -(-counts.most * row_bytes // _SEGMENT_STEP) * _SEGMENT_STEP
        if need <= self._segment:
            return
        error = ""
        try:
            # A quarter more than before, so that slowly growing batches do not leave many outgrown segments behind.
            size = max(need, self._segment * 5 // 4 // _SEGMENT_STEP * _SEGMENT_STEP)
            nvshmem.before_deadline(self.peers, lambda: self._end.resize(size))
        except RuntimeError as caught:
            error = f"rows of {row_bytes} bytes need {2 * self.nodes * need} bytes between {self.nodes} nodes: {caught}"
        raise_if_broken([{"error": text} for text in self.peers.gather_objects(error, "dispatch")], "dispatch")
        self._look_at_memory()

    def _need_room(self, counts: Counts, row_bytes: int) -> None:
        """Raise, on every rank alike, if there is no room for rows of this width."""
        if counts.most * row_bytes > self._segment:
            need = 2 * self.nodes * (counts.most * row_bytes + _SEGMENT_STEP)
            raise ArgumentError(
                f"{counts.most} rows of {row_bytes} bytes between two nodes do not fit into the {self._segment} bytes for one "
                f"node, which were made for the rows of dispatches; pass num_rdma_bytes={need} or more to Buffer",
                "num_rdma_bytes",
            )

    def dispatch(
        self,
        tables: Tables,
        parts: Sequence[Tensor],
        num_received: int,
        num_rows: int,
        experts: ExpertTables | None,
        signature: int,
        num_sms: int = 0,
    ) -> list[Tensor]:
        """One or two tensors' rows, which travel together, [T, n] each -> [num_rows, n] each.

        Args:
            experts: how they are arranged; None: by (source rank, token), zeros at the end.
            signature: of what all ranks must agree on, which the kernels compare.
        """
        data = [as_rows(part) for part in parts]
        wire_bytes = sum(d.size(1) for d in data)
        self._need_room(tables.counts, wire_bytes)
        with self._operation(tables, *DISPATCH, also=experts) as stream:
            addresses = self._exchange(tables, data, wire_bytes, signature, num_sms, stream)
            how = (signature, num_sms, stream)
            if experts is None:
                got = self._forward(tables, data, addresses, num_received, num_rows - num_received, *how)
            else:
                came = self._forward(tables, data, addresses, num_received, None, *how)
                got = [self._expand(rows, experts, num_sms, stream) for rows in came]
            return [as_elements(rows, part) for rows, part in zip(got, parts, strict=True)]

    def _forward(
        self,
        tables: Tables,
        data: Sequence[Tensor],
        addresses: Tensor,
        num_received: int,
        spare: int | None,
        signature: int,
        num_sms: int,
        stream: int,
    ) -> list[Tensor]:
        """Rows from their `addresses` to the ranks of this node: for each of `data` [num_received + spare, its row's bytes],
        None: needed in this operation only."""
        shapes = [((num_received + (spare or 0), d.size(1)), torch.uint8) for d in data]
        landings: list[Landing | None]
        if spare is None:
            landings = [Landing(t, t) for t in (self._arena.temporary(*shape) for shape in shapes)]
        else:
            landings = self._arena.land(shapes)
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
            d.scale_words = beside[0].size(1) // 4
        d.send_slot = d.send_row = tables.slot.data_ptr()
        d.offsets, d.sizes = offsets, sizes
        d.signature, d.rail_failed, d.num_sms = signature, self._end.failed_flag, self._sms(num_sms, "dispatch")
        self._comm.dispatch(d, stream)
        self._owed.pop(0)
        if spare is not None:
            self._arena.watch(landings)
        got = []
        for landing in landings:
            assert landing is not None
            if spare:
                landing.visible[num_received:].zero_()
            if landing.tensor is not landing.visible:
                landing.tensor.copy_(landing.visible)
            got.append(landing.tensor)
        return got

    def _expand(self, came: Tensor, experts: ExpertTables, num_sms: int, stream: int) -> Tensor:
        """[N, row_bytes] -> [M, row_bytes]."""
        num_rows, row_bytes = experts.row_slot.numel(), came.size(1)
        out = torch.empty(num_rows, row_bytes, dtype=torch.uint8, device=self.device)
        p = _C.ExpandParams()
        p.x, p.source, p.row_bytes, p.num_rows = out.data_ptr(), came.data_ptr(), row_bytes, num_rows
        p.rows_of, p.row_slot, p.top_k = experts.rows_of.data_ptr(), experts.row_slot.data_ptr(), experts.rows_of.size(1)
        p.num_several = p.num_received = experts.received.data_ptr()
        p.num_sms = self._sms(num_sms, "dispatch")
        self._comm.expand(p, stream)
        return out

    def _reduce(self, rows: Tensor, experts: ExpertTables, dtype: int, num_sms: int, stream: int) -> Tensor:
        """[M, row_bytes] -> [N, row_bytes], which peers can read."""
        partials = self._arena.temporary((experts.rows_of.size(0), rows.size(1)), torch.uint8)
        p = _C.ReduceParams()
        p.y, p.partials, p.rows_of = rows.data_ptr(), partials.data_ptr(), experts.rows_of.data_ptr()
        p.num_tokens, p.top_k = experts.received.data_ptr(), experts.rows_of.size(1)
        p.row_bytes, p.dtype, p.num_sms = rows.size(1), dtype, self._sms(num_sms, "combine")
        self._comm.reduce(p, stream)
        return partials

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
        data, biases = as_rows(rows), [as_rows(b) for b in bias]
        row_bytes = data.size(1)
        self._need_room(tables.counts, row_bytes)
        with self._operation(tables, *COMBINE, also=experts) as stream:
            if experts is not None:
                data = self._reduce(data, experts, DTYPES[rows.dtype], num_sms, stream)
            elif not self._arena.holds(data) and data.numel():
                data = self._arena.temporary(data.shape, data.dtype).copy_(data)
            c = _C.CombineParams()
            c.y, c.out, c.row_bytes, c.num_tokens = data.data_ptr(), self._end.send, row_bytes, tables.forwarded
            c.pull_row = c.send_slot = tables.slot.data_ptr()
            c.offsets = [self._arena.offset(data), 0, 0, 0, 0]
            c.signature, c.rail_failed, c.dtype = signature, self._end.failed_flag, DTYPES[rows.dtype]
            c.num_sms = self._sms(num_sms, "combine")
            self._comm.combine(c, stream)
            self._owed.pop(0)
            self._exchange(tables, (), row_bytes, signature, num_sms, stream)
            out = torch.empty(num_tokens, row_bytes, dtype=torch.uint8, device=self.device)
            s = self._params[1]()
            s.out, s.row_bytes, s.num_tokens, s.dtype = out.data_ptr(), row_bytes, num_tokens, DTYPES[rows.dtype]
            s.bias_0 = biases[0].data_ptr() if biases else 0
            s.bias_1 = biases[1].data_ptr() if len(biases) > 1 else 0
            s.place, s.recv_at = tables.place.data_ptr(), tables.recv_at.data_ptr()
            s.num_sms = c.num_sms
            self._end.sum(s, stream)
            return as_elements(out, rows)

    # Inside ------------------------------------------------------------------------------------------------------------

    def refuse(self, steps: Sequence[str], error: Exception) -> NoReturn:
        """Raise `error`, after having told the ranks that wait for this one's part in these `steps`; their results are NaN.
        If all ranks do so, nothing has happened."""
        with self._operation(None, *steps):
            raise error

    def _exchange(
        self, tables: Tables, data: Sequence[Tensor], wire_bytes: int, signature: int, num_sms: int, stream: int
    ) -> Tensor:
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
        p.signature, p.num_sms = signature % _SIGNATURES, self._sms(num_sms, "dispatch" if data else "combine")
        self._end.rail(p, stream)
        self._owed.pop(0)
        counts = tables.counts.send if data else tables.counts.recv
        sent = [count for node, count in enumerate(counts) if node != self.node]
        puts = sum(-(-n // p.rows_per_put) for n in sent)
        self.network_bytes += sum(sent) * wire_bytes + _SIGNAL_BYTES * (puts + self.nodes - 1)
        return addresses

    @contextmanager
    def _operation(self, tables: Tables | None, *steps: str, also: ExpertTables | None = None) -> Iterator[int]:
        """Gives the stream; operations of all streams follow each other.

        `steps` are what other ranks wait for; each is taken from `_owed` once it is launched. If an exception comes first, the
        ranks are told that the rest will not come.
        """
        with self._lock, torch.cuda.device(self.device):
            stream = self._stream()
            self._comm.enter(stream)
            self._arena.begin_operation()
            self._owed = list(steps)
            if tables is not None and tables.stream != stream and not torch.cuda.is_current_stream_capturing():
                # A handle may die as soon as a call that uses it returns: its tables must not.
                current = torch.cuda.current_stream(self.device)
                for table in [*tables.tensors(), *(() if also is None else also.tensors())]:
                    table.record_stream(current)
            try:
                yield stream
            except BaseException as error:
                if text := self._comm.cuda_error(stream):  # nothing can be launched any more
                    raise cuda_failed(text, self.peers.rank, self._processes) from error
                for step in self._owed:
                    if step == RAIL:
                        self._end.refuse(False, stream)
                    else:
                        self._comm.refuse(step, error.num_bytes if isinstance(error, ArenaFull) else 0, stream)
                if isinstance(error, ArenaFull):
                    raise self._arena.too_small(self.peers.rank, error.num_bytes) from None
                raise
            finally:
                self._comm.leave(stream)

    def _ordered(self) -> AbstractContextManager[int]:
        return self._operation(None)

    def keep(self, used: Any) -> None:
        """A CUDA graph is being captured that uses this."""
        self._arena.keep(used)

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
        put = self.network_bytes + (0 if self.low_latency is None else self.low_latency.put_bytes())
        return self._arena.stats() | {"rail": 2 * self.nodes * self._segment, "network bytes put": put}

    def failure(self) -> DeepEPError | None:
        """What has failed on the device or in CUDA, once it has; then the other ranks have been told that this one is gone."""
        rail, node = self._end.failure(), None if self._comm.is_well() else self._comm.failure()
        if rail is None and node is None:
            text = self._comm.cuda_error(self._stream())
            return cuda_failed(text, self.peers.rank, self._processes) if text else None
        with suppress(RuntimeError), self._lock, torch.cuda.device(self.device):  # CUDA may be broken, too
            stream = self._stream()
            self._end.refuse(True, stream)
            if node is None:
                self._comm.refuse("dispatch", 0, stream)
        if rail is not None:
            told, awaited = rail_error(rail, self.peers.rank, self.peers.timeout), rail.cause in AWAITED
        else:
            told, awaited = self._told_by_the_node(node)
        if not awaited:
            self.peers.say_here()
            return told
        # Those that this rank has waited for may have waited themselves: who does not answer now is whom all wait for.
        if silent := self.peers.roll_call():
            who = ", ".join(map(str, silent))
            text = f"{told}; no sign of life from rank {who}{who_ended(self._processes)}"
            return PeerTimeoutError(text, silent, "rail")
        return told

    def _told_by_the_node(self, failure: Any) -> tuple[DeepEPError, bool]:
        names = ("epoch", "operation", "meeting", "cause", "bytes", "rows", "bounds")
        told = SimpleNamespace(**{name: getattr(failure, name) for name in names})
        told.ranks = [self.node * self.local + r for r in failure.ranks]
        awaited = failure.cause in ("missing", "blamed") or (failure.cause == "refused" and failure.bytes < 0)
        return device_error(told, self.peers.rank, self.peers.timeout, self._processes), awaited

    def close(self) -> None:
        with self._lock:
            if self.low_latency is not None:
                self.low_latency.close()
            self._comm.close(self._arena.was_captured)
            del self._arena, self.low_latency
            torch.cuda.empty_cache()  # which the arena's memory is in, unless tensors still use it
