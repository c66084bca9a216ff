"""One rank's end of its rail and of its node: its life, its memory, the order of its operations, and what has failed in it.

What the operations are stands in rails.py; docs/rdma.md explains the protocol.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from torch import Tensor

from deepep_train.engines import nvshmem
from deepep_train.engines.arena import ArenaFull
from deepep_train.engines.low_latency import MAX_RANKS, LowLatency, weakly
from deepep_train.engines.low_latency_far import OtherNodes
from deepep_train.engines.node_memory import map_memory
from deepep_train.engines.nvlink_failures import check_cuda, cuda_failed, device_error, leave, who_ended
from deepep_train.engines.peers import Peers, raise_if_broken, raise_if_different
from deepep_train.engines.rail_failures import AWAITED, counts_error, rail_error
from deepep_train.engines.rail_stages import VARIABLE, asked, in_order, stages_of
from deepep_train.engines.rail_tables import ExpertTables, Tables
from deepep_train.errors import ArgumentError, DeepEPError, PeerTimeoutError

_SEGMENT_STEP = 128  # bytes
# What graphs of buffers that are gone read. Their kernels find that the buffer has failed, but ask their tables how much of the
# memory that peers have written is NaN then; and nobody says when a graph dies.
_OUTLIVING: list[list[object]] = []

# What the ranks wait for in an exchange that is not in stages, in order: the rail's part, and nvlink's operation.
RAIL = "rail"
DISPATCH = (RAIL, "dispatch")
# What a rank owes that raises once its rows and words have crossed: its part in the node, and word to its rail, which has all
# that it waits for, in the next exchange.
BEHIND_WORDS = ("dispatch", RAIL)


class RailDomain:
    """See the module.

    Args:
        peers: bootstrap.
        num_local_ranks: ranks per node, consecutive.
        arena_bytes: memory that the node's ranks can reach; received rows live in it.
        rail_bytes: of NVSHMEM's memory, half for what leaves and half for what comes.
        num_qps: queue pairs, which take turns.
        num_sms: gives the SMs that a call may occupy; 0: what the links need.
    """

    _is_closed = False

    def __init__(
        self, peers: Peers, num_local_ranks: int, arena_bytes: int, rail_bytes: int, num_qps: int, num_sms: Any
    ) -> None:
        try:
            rail_stages, error = asked(), ""
        except ArgumentError as wrong:  # told once the ranks have met
            rail_stages, error = 1, str(wrong)
        self.peers, self.local = peers, num_local_ranks
        self.nodes = peers.size // num_local_ranks
        self.node, self.rail = divmod(peers.rank, num_local_ranks)
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._num_sms, self._lock = num_sms, threading.RLock()
        self._of_graphs: list[object] = []  # tables that captured calls read
        weakref.finalize(self, _OUTLIVING.append, self._of_graphs).atexit = False
        self._owed: list[str] = []  # of the operation under way: what other ranks still wait for, in order
        self.kernels = nvshmem.start(peers, self.device)
        first = self.node * num_local_ranks
        memory = map_memory(peers, range(first, first + num_local_ranks), arena_bytes, self.device)
        self.comm, self.arena, self._processes = memory.comm, memory.arena, memory.processes
        self._max_sms, self._default_sms = memory.max_sms, memory.default_sms
        segment = max(1, rail_bytes // 2 // self.nodes // _SEGMENT_STEP) * _SEGMENT_STEP
        mine = {"error": error, "agreed": {VARIABLE: rail_stages, "bytes between two nodes (num_rdma_bytes)": segment}}
        everyone = peers.gather_objects(mine, "Buffer")
        raise_if_broken(everyone)
        raise_if_different("Buffer", [other["agreed"] for other in everyone])
        error = ""
        # What they wait for where rows move.
        self.stages = stages_of(self.nodes, rail_stages)
        num_stages = len(self.stages.dispatch)
        self.dispatch_steps = in_order(*DISPATCH, num_stages)
        self.combine_steps = in_order("combine", RAIL, num_stages)
        self._network = torch.cuda.Stream(self.device, priority=-1) if num_stages > 1 else None  # as streams.py's is
        try:
            how = (self.device.index, peers.rank, peers.size, num_local_ranks, segment, num_qps, float(peers.timeout))
            self.end = nvshmem.before_deadline(peers, lambda: self.kernels.Endpoint(*how, self.comm.failed_flag))
            # What the kernels leave when a dispatch's counts do not allow it: csrc/rdma/fresh.hpp's `report`.
            words = self.kernels.report_head + 3 * peers.size
            self.report = torch.zeros(words, dtype=torch.int64, device="cpu", pin_memory=True)
        except RuntimeError as caught:
            error = str(caught)
        raise_if_broken(peers.gather_objects({"error": error}, "Buffer"))
        one_gpu = len(set(memory.gpus[first : first + num_local_ranks])) == 1
        self.low_latency = self._low_latency(first, one_gpu) if peers.size <= MAX_RANKS else None

    def _low_latency(self, first: int, one_gpu: bool) -> LowLatency:
        size = self.peers.size
        arenas = [0] * size
        arenas[first : first + self.local] = self.comm.addresses()
        far = OtherNodes(self.kernels, self.end, first, self.local, size, self.device)
        how = (self._max_sms, one_gpu, weakly(self._ordered), self.device, far)
        return LowLatency(self.peers, self.arena, arenas, *how)

    # Memory ------------------------------------------------------------------------------------------------------------

    def room(self, row_bytes: int) -> int:
        """Rows of this width that fit between two nodes; the same on all ranks."""
        return self.end.segment_bytes // row_bytes

    def make_room(self, most: int, row_bytes: int) -> None:
        """Memory for `most` rows of this width between any two nodes; a collective call, which all ranks make alike."""
        need, segment = -(-most * row_bytes // _SEGMENT_STEP) * _SEGMENT_STEP, self.end.segment_bytes
        if need <= segment:
            return
        error = ""
        try:
            # A quarter more than before, so that slowly growing batches do not leave many outgrown segments behind.
            size = max(need, segment * 5 // 4 // _SEGMENT_STEP * _SEGMENT_STEP)
            nvshmem.before_deadline(self.peers, lambda: self.end.resize(size))
        except RuntimeError as caught:
            error = f"rows of {row_bytes} bytes need {2 * self.nodes * need} bytes between {self.nodes} nodes: {caught}"
        raise_if_broken([{"error": text} for text in self.peers.gather_objects(error, "dispatch")], "dispatch")

    def need_room(self, most: int, row_bytes: int) -> None:
        """Raise, on every rank alike, if there is no room for `most` rows of this width."""
        if most * row_bytes > self.end.segment_bytes:
            need = self.bytes_for(most, row_bytes)
            raise ArgumentError(
                f"{most} rows of {row_bytes} bytes between two nodes do not fit into the {self.end.segment_bytes} bytes for "
                f"one node, which were made for the rows of dispatches; pass num_rdma_bytes={need} or more to a Buffer "
                "without low_latency_mode, or dispatch rows as wide before, without num_worst_tokens",
                "num_rdma_bytes",
            )

    def bytes_for(self, most: int, row_bytes: int) -> int:
        """The `num_rdma_bytes` that these rows need."""
        return 2 * self.nodes * (most * row_bytes + _SEGMENT_STEP)

    # Operations --------------------------------------------------------------------------------------------------------

    def refuse(self, steps: Sequence[str], error: Exception) -> NoReturn:
        """Raise `error`, after having told the ranks that wait for this one's part in these `steps`; their results are NaN.
        If all ranks do so, nothing has happened."""
        with self.operation(None, *steps):
            raise error

    @contextmanager
    def operation(self, tables: Tables | None, *steps: str, also: ExpertTables | None = None) -> Iterator[int]:
        """Gives the stream; operations of all streams follow each other.

        `steps` are what other ranks wait for; each is taken from `_owed` once it is launched. If an exception comes first, the
        ranks are told that the rest will not come.
        """
        with self._lock, torch.cuda.device(self.device):
            self._need_open()
            stream = self.stream()
            self.comm.enter(stream)
            self.arena.begin_operation()
            self._owed = list(steps)
            if tables is not None and tables.stream != stream and not torch.cuda.is_current_stream_capturing():
                # A handle may die as soon as a call that uses it returns: its tables must not.
                current = torch.cuda.current_stream(self.device)
                for table in [*tables.tensors(), *(() if also is None else also.tensors())]:
                    table.record_stream(current)
            try:
                yield stream
            except BaseException as error:
                # If so, nothing can be launched any more, and there is no order to keep.
                check_cuda(self.comm, stream, self.peers.rank, self._processes, error)
                for step in self._owed:
                    if step == RAIL:
                        self.end.refuse(False, stream)
                    else:
                        self.comm.refuse(step, error.num_bytes if isinstance(error, ArenaFull) else 0, stream)
                leave(self.comm, stream, self.peers.rank, self._processes)
                if isinstance(error, ArenaFull):
                    raise self.arena.too_small(self.peers.rank, error.num_bytes) from None
                raise
            leave(self.comm, stream, self.peers.rank, self._processes)

    def owe_no_more(self) -> None:
        """What other ranks still wait for is the next operation's, or was to be told of a failure."""
        self._owed.clear()

    def uninterrupted(self) -> AbstractContextManager[object]:
        """No other thread's operation comes between those within."""
        return self._lock

    def _need_open(self) -> None:
        """Under the lock, where another thread may have destroyed the buffer while this one waited."""
        if self._is_closed:
            raise DeepEPError("this Buffer has been destroyed")

    def _ordered(self) -> AbstractContextManager[int]:
        return self.operation(None)

    def keep(self, used: Sequence[object]) -> None:
        """A CUDA graph is being captured that uses this."""
        self.arena.keep(used)
        self._of_graphs.extend(used)

    def stream(self) -> int:
        return torch._C._cuda_getCurrentRawStream(self.device.index)

    def sms(self, asked: int, operation: str) -> int:
        return min(asked or self._num_sms() or self._default_sms[operation], self._max_sms)

    # Life --------------------------------------------------------------------------------------------------------------

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        with self._lock, torch.cuda.device(self.device):
            self._need_open()
            try:
                return self.arena.empty(shape, dtype)
            except ArenaFull as full:
                raise self.arena.too_small_for(self.peers.rank, full.num_bytes) from None

    def stats(self) -> dict[str, int]:
        with self._lock:
            self._need_open()
            put = self.end.put_bytes + (0 if self.low_latency is None else self.low_latency.put_bytes())
            return self.arena.stats() | {"rail": 2 * self.nodes * self.end.segment_bytes, "network bytes put": put}

    def failure(self) -> DeepEPError | None:
        """What has failed on the device or in CUDA, once it has; then the other ranks have been told that this one is gone."""
        rail, node = self.end.failure(), None if self.comm.is_well() else self.comm.failure()
        if rail is None and node is None:
            text = self.comm.cuda_error(self.stream())
            return cuda_failed(text, self.peers.rank, self._processes) if text else None
        with suppress(RuntimeError), self._lock, torch.cuda.device(self.device):  # CUDA may be broken, too
            stream = self.stream()
            self.end.refuse(True, stream)
            if node is None and not self._is_closed:
                assert rail is not None
                # -1: whom this rank has waited for is not the node's other ranks' to see; they hold a roll call, too.
                self.comm.refuse("dispatch", -1 if rail.cause in AWAITED else 0, stream)
        if rail is not None and rail.cause == "counts":
            told, awaited = counts_error(self.report.tolist(), rail.number, self.peers.rank, self.bytes_for), False
        elif rail is not None:
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
            try:
                try:
                    if self.low_latency is not None:
                        self.low_latency.close()  # which launches
                finally:
                    self._is_closed = True
                    self.comm.close(self.arena.was_captured)
            finally:
                del self.arena, self.low_latency
                with suppress(RuntimeError):  # of CUDA, which has failed for good, as is told already
                    torch.cuda.empty_cache()  # which the arena's memory is in, unless tensors still use it
