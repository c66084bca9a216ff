"""One rank's end of an NVLink domain: its life, its memory, the order of its operations, and what has failed in it.

What the operations are stands in nvlink.py; docs/kernels.md explains the protocol.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

from deepep_train import _C  # type: ignore[attr-defined]
from deepep_train.engines.arena import ArenaFull
from deepep_train.engines.base import MAX_NVLINK_RANKS, Engine, need_own_device
from deepep_train.engines.low_latency import LowLatency, weakly
from deepep_train.engines.node_memory import map_memory
from deepep_train.engines.nvlink_failures import check_cuda, device_error, leave
from deepep_train.engines.peers import Peers
from deepep_train.errors import ArgumentError, DeepEPError

_NOTHING = nullcontext()


class NvlinkDomain(Engine):
    """See the module.

    Args:
        peers: bootstrap, and carry the texts of errors; these ranks must reach each other's memory.
        arena_bytes: memory that peers can reach; received tensors live in it.
        num_sms: gives the SMs that a call may occupy; 0: what the links need, see `sms.default_sms`.
        name: that it goes by; the low-latency kernels come with it under any.
    """

    checks_layout = True

    def __init__(self, peers: Peers, arena_bytes: int, num_sms: Callable[[], int], name: str = "nvlink") -> None:
        self.peers = peers
        self.name = name
        self.rank = self.peers.rank
        self.device: torch.device = torch.device("cuda", torch.cuda.current_device())
        self._num_sms = num_sms
        self._lock = threading.RLock()
        self._is_destroyed = False
        self._owed = ""  # the operation in which peers wait for this rank
        self._is_capturing = False  # whether the current operation is captured into a CUDA graph
        size = self.peers.size
        if size > MAX_NVLINK_RANKS:
            raise ArgumentError(f"engine='nvlink' serves up to {MAX_NVLINK_RANKS} ranks, the group has {size}", "engine")
        memory = map_memory(peers, range(size), arena_bytes, self.device)
        self._comm, self._arena, self._processes = memory.comm, memory.arena, memory.processes
        self._max_sms, self._default_sms = memory.max_sms, memory.default_sms
        one_gpu, one_process = (len(set(map(str, of))) == 1 for of in (memory.gpus, memory.processes))
        self.low_latency = LowLatency(
            self.peers,
            self._arena,
            self._comm.addresses(),
            self._max_sms,
            one_gpu,
            weakly(self._ordered),
            self.device,
            at_once=one_gpu and (one_process or _C.Communicator.has_mps(self.device.index)),
        )

    # Memory ------------------------------------------------------------------------------------------------------------

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | None) -> Tensor:
        need_own_device(device, self.device)
        with self._lock, self._here():
            self._need_open()
            try:
                return self._arena.empty(shape, dtype)
            except ArenaFull as full:
                raise self._arena.too_small_for(self.rank, full.num_bytes) from None

    def memory_stats(self) -> dict[str, int]:
        with self._lock:
            self._need_open()
            return self._arena.stats()

    def _need_open(self) -> None:
        """Under the lock, where another thread may have destroyed the buffer while this one waited."""
        if self._is_destroyed:
            raise DeepEPError("this Buffer has been destroyed")

    def _operation(self) -> _Operation:
        return _Operation(self)

    @contextmanager
    def _ordered(self) -> Iterator[int]:
        """Around launches and uses of the arena that nobody waits for at once; as `_operation` else."""
        with self._lock, self._here():
            self._need_open()
            stream = self._stream()
            self._comm.enter(stream)
            try:
                yield stream
            except BaseException as error:
                self._check_cuda(error)  # if so, there is no order to keep
                leave(self._comm, stream, self.rank, self._processes)
                raise
            leave(self._comm, stream, self.rank, self._processes)

    def _here(self) -> AbstractContextManager[Any]:
        """Makes the engine's device the current one."""
        return _NOTHING if torch.cuda.current_device() == self.device.index else torch.cuda.device(self.device)

    def _stream(self) -> int:
        return torch._C._cuda_getCurrentRawStream(self.device.index)  # torch.cuda.current_stream costs 4 us

    def _sms(self, asked: int, operation: str = "dispatch") -> int:
        return min(asked or self._num_sms() or self._default_sms[operation], self._max_sms)

    # Failures ----------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        self.peers.check()
        if not self._comm.is_well():
            raise device_error(self._comm.failure(), self.rank, self.peers.timeout, self._processes)
        self._check_cuda()
        low_latency = self.low_latency  # None once the buffer is gone, whose events may still be waited for
        if low_latency is not None:
            low_latency.check()

    def _check_cuda(self, error: BaseException | None = None) -> None:
        """Raise if CUDA has failed for good."""
        check_cuda(self._comm, self._stream(), self.rank, self._processes, error)

    def destroy(self) -> None:
        with self._lock:
            try:
                try:
                    self.low_latency.close()
                finally:
                    self._comm.close(self._arena.was_captured)
            except RuntimeError as error:
                self._check_cuda(error)
                raise
            finally:
                self._is_destroyed = True
                del self._arena, self.low_latency
                with suppress(RuntimeError):  # of CUDA, which has failed for good, as is told already
                    torch.cuda.empty_cache()  # which the arena's memory is in, unless tensors still use it


class _Operation:
    """One operation: gives the stream; operations of all streams follow each other.

    If it raises while peers wait for this rank's rows (`_owed`), they are told that there will be none. Whatever the caller's
    current device is, here it is the engine's: torch's questions about "the current stream" are about that one's. A class: a
    context made of a generator costs 2 us, in every call.
    """

    def __init__(self, domain: NvlinkDomain) -> None:
        self._domain = domain

    def __enter__(self) -> int:
        domain = self._domain
        domain._lock.acquire()
        self._here: AbstractContextManager[Any] = _NOTHING
        try:
            domain._need_open()
            here = domain._here()
            here.__enter__()
            self._here = here
            self._stream = domain._stream()
            domain._is_capturing = domain._comm.enter(self._stream)
        except BaseException:
            self._exit()
            raise
        domain._arena.begin_operation()
        domain._owed = ""
        return self._stream

    def _exit(self) -> None:
        self._here.__exit__(None, None, None)
        self._domain._lock.release()

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        domain = self._domain
        try:
            if error is not None:
                domain._check_cuda(error)  # if so, nothing can be launched any more, and there is no order to keep
                if domain._owed:
                    num_bytes = error.num_bytes if isinstance(error, ArenaFull) else 0
                    domain._comm.refuse(domain._owed, num_bytes, self._stream)
            domain._owed = ""
            leave(domain._comm, self._stream, domain.rank, domain._processes)
            if isinstance(error, ArenaFull):
                raise domain._arena.too_small(domain.rank, error.num_bytes) from None
        finally:
            self._exit()
