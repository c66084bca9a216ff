"""The low-latency engine's kernels: rows go into slots at the receiver without a round of counting first.

docs/low_latency.md explains the protocol; csrc/low_latency holds the kernels, csrc/low_latency/params.hpp the names used here.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from deepep_train import _C, checks, fp8  # type: ignore[attr-defined]
from deepep_train.engines.arena import Arena, ArenaFull
from deepep_train.engines.low_latency_far import OtherNodes
from deepep_train.engines.peers import Peers, raise_if_different
from deepep_train.errors import ArgumentError, DeepEPError

MAX_RANKS = _C.low_latency.max_ranks
T = TypeVar("T")
MAX_HIDDEN, MAX_EXPERTS = _C.low_latency.max_hidden, _C.low_latency.max_experts
MAX_TOP_K = _C.low_latency.max_top_k
_MAX_TOKENS = 1 << 16
_SETS = 2  # of slots, hence of results that may be alive


class Shape(NamedTuple):
    """What the ranks of one `Space` agree on."""

    max_tokens: int
    hidden: int
    num_experts: int
    top_k: int


class _Life:
    """Lives as long as a handle: there are no weak references to tuples."""


class KernelHandle(tuple):
    """V1's tuple: src_info int32 [L, R*M], layout_range int64 [L, R], M, hidden, num_experts; and what combine needs.

    Attributes:
        set, number: which slots it came through, and which use of them it is.
        pick_index: int32 [T, K], each pick's number among this rank's picks of its expert.
        life: see `_Life`.
    """

    space: Space
    buffer: Any
    set: int
    number: int
    pick_index: Tensor
    life: _Life

    def __new__(cls, items: tuple, space: Space, buffer: Any, slots: int, number: int, pick_index: Tensor) -> KernelHandle:
        self = super().__new__(cls, items)
        self.space, self.buffer, self.set, self.number, self.pick_index = space, buffer, slots, number, pick_index
        self.life = _Life()
        return self


class Space:
    """The memory, of every rank, through which calls of one shape go; see csrc/low_latency/space.cuh.

    Args:
        memory: this rank's, uint8.
        addresses: int64 [R], every rank's, as this process maps them; 0 for those of other nodes.
    """

    def __init__(self, shape: Shape, memory: Tensor, addresses: Tensor) -> None:
        self.shape, self.memory, self.addresses = shape, memory, addresses
        self.combine_buffers: list[Tensor | None] = [None] * _SETS
        self.forget()

    def forget(self) -> None:
        """No call has been made, as far as this process knows."""
        self.numbers = [0] * _SETS
        self.waiting = [""] * _SETS  # a hook to be called
        self._lives: list[weakref.ref[_Life] | None] = [None] * _SETS
        self.are_over = [True] * _SETS  # whether the newest result of the slots has been combined
        self._next = 0

    def close(self) -> None:
        at = _C.low_latency.closed_offset()
        self.memory[at : at + 4].fill_(1)

    def take(self) -> int:
        """The slots for the next dispatch; `follow` makes them so."""
        slots, life = self._next, self._lives[self._next]
        if life is not None and life() is not None and not self.are_over[slots]:
            raise DeepEPError(
                f"low_latency_dispatch: {_SETS} results are alive, and there are slots for no more; combine the oldest, or "
                "drop its handle, before the next dispatch"
            )
        self.check_hook(slots)
        return slots

    def check_hook(self, slots: int) -> None:
        if self.waiting[slots]:
            raise DeepEPError(f"the hook of an earlier {self.waiting[slots]} through the same slots has not been called")

    def follow(self, slots: int, handle: KernelHandle) -> None:
        self._lives[slots], self.are_over[slots] = weakref.ref(handle.life), False
        self._next = (slots + 1) % _SETS


def weakly(method: Callable[[], T]) -> Callable[[], T]:
    """Calls a method of an object that it does not keep: engines own their `LowLatency`, and each would keep the other."""
    alive = weakref.WeakMethod(method)

    def call() -> T:
        found = alive()
        assert found is not None
        return found()

    return call


class LowLatency:
    """See the module.

    Args:
        peers: bootstrap.
        arena: of this rank; what this node's peers reach lies in it.
        addresses: of every rank's arena, as this process maps it; 0 for those of other nodes.
        num_sms: that a launch may occupy.
        one_gpu: whether all ranks of this node share one; may be changed at any time, for this rank alone.
        ordered: a context in which launches follow each other, whatever streams they are on; gives the stream.
        far: how ranks of other nodes are reached; None: there are none.
    """

    def __init__(
        self,
        peers: Peers,
        arena: Arena,
        addresses: list[int],
        num_sms: int,
        one_gpu: bool,
        ordered: Callable[[], AbstractContextManager[int]],
        device: torch.device,
        far: OtherNodes | None = None,
    ) -> None:
        self._peers, self._arena, self._far = peers, arena, far
        self._arenas = torch.tensor(addresses, device=device)
        self._num_sms, self.one_gpu, self._ordered, self._device = num_sms, one_gpu, ordered, device
        self._spaces: dict[Shape, Space] = {}
        self._mask = torch.zeros(peers.size, dtype=torch.int32, device=device)
        self._bad_index = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        # Every call of the engine looks at it, and `item` takes ten times as long.
        self._seen_bad_index = ctypes.c_int32.from_address(self._bad_index.data_ptr())

    # Calls -------------------------------------------------------------------------------------------------------------

    def dispatch(
        self,
        buffer: Any,
        x: Tensor,
        topk_idx: Tensor,
        max_tokens: int,
        num_experts: int,
        cumulative_stats: Tensor | None,
        wait_stats: Tensor | None,
        use_fp8: bool,
        round_scale: bool,
        use_ue8m0: bool,
        with_hook: bool,
    ) -> tuple[Any, Tensor, KernelHandle, Callable[[], None] | None]:
        """See `Buffer.low_latency_dispatch`; gives (recv_x, recv_count, handle, hook)."""
        size, shape, error = self._peers.size, None, None
        try:
            checks.integer(max_tokens, "num_max_dispatch_tokens_per_rank", 1)
            checks.experts(num_experts, size)
            checks.tensor(x, "x", [None, None], (torch.bfloat16,), self._device)
            checks.topk_idx(topk_idx, x.size(0), num_experts, self._device, check_range=False)
            shape = Shape(max_tokens, x.size(1), num_experts, topk_idx.size(1))
            self._check(x, shape, use_fp8, round_scale, use_ue8m0, cumulative_stats, wait_stats)
        except Exception as caught:
            if shape in self._spaces:
                raise
            error = caught
        space = self._space_for(shape, error)
        assert shape is not None
        slots = space.take()
        num_local, num_slots = num_experts // size, size * max_tokens

        def new(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device=self._device)

        x, topk_idx = x.contiguous(), topk_idx.contiguous()
        data = new(num_local, num_slots, shape.hidden, dtype=torch.float8_e4m3fn if use_fp8 else torch.bfloat16)
        words = shape.hidden // fp8.BLOCK // (4 if use_ue8m0 else 1)
        # V1 gives scales with their last two dimensions column-major.
        scales = new(num_local, words, num_slots, dtype=torch.int32 if use_ue8m0 else torch.float32) if use_fp8 else None
        source, count = new(num_local, num_slots), new(num_local)
        ranges, pick_index = new(num_local, size, dtype=torch.int64), new(*topk_idx.shape)
        p = self._params(_C.low_latency.DispatchParams(), space, slots)
        p.x, p.topk_idx, p.pick_index, p.num_tokens = x.data_ptr(), topk_idx.data_ptr(), pick_index.data_ptr(), x.size(0)
        p.scales = 0 if not use_fp8 else 3 if use_ue8m0 else 2 if round_scale else 1
        # Rows that need not cross a link while others compute wait where they are quantized: the receiver reads them once.
        p.keep = int(not with_hook or self.one_gpu)
        p.bad_index = self._bad_index.data_ptr()
        p.recv_x, p.recv_scales, p.src_info = data.data_ptr(), _address(scales), source.data_ptr()
        p.ranges, p.recv_count = ranges.data_ptr(), count.data_ptr()
        p.cumulative, p.wait_ns = _address(cumulative_stats), _address(wait_stats)
        space.numbers[slots] += 1
        items = (source, ranges, max_tokens, shape.hidden, num_experts)
        handle = KernelHandle(items, space, buffer, slots, space.numbers[slots], pick_index)
        space.follow(slots, handle)
        written = (data, scales, source, ranges, count, cumulative_stats, wait_stats)
        hook = self._launch("dispatch", p, handle, written, with_hook)
        return (data if scales is None else (data, scales.transpose(1, 2))), count, handle, hook

    def combine(
        self,
        buffer: Any,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: Any,
        use_logfmt: bool,
        zero_copy: bool,
        out: Tensor | None,
        wait_stats: Tensor | None,
        with_hook: bool,
    ) -> tuple[Tensor, Callable[[], None] | None]:
        """See `Buffer.low_latency_combine`; gives (combined_x, hook)."""
        handle = self._check_handle(buffer, handle)
        checks.wire_format(use_logfmt, zero_copy)
        space, size = handle.space, self._peers.size
        shape, top_k = space.shape, handle.pick_index.size(1)
        num_tokens = handle.pick_index.size(0)
        rows = [shape.num_experts // size, size * shape.max_tokens, shape.hidden]
        checks.tensor(x, "x", rows, (torch.bfloat16,), self._device)
        checks.tensor(topk_idx, "topk_idx", [num_tokens, top_k], (torch.int64,), self._device)
        checks.tensor(topk_weights, "topk_weights", [num_tokens, top_k], (torch.float32,), self._device)
        if out is None:
            out = torch.empty(num_tokens, shape.hidden, dtype=torch.bfloat16, device=self._device)
        checks.tensor(out, "out", [num_tokens, shape.hidden], (torch.bfloat16,), self._device)
        checks.need(out.is_contiguous() and out.data_ptr() % 16 == 0, "out", "contiguous and aligned to 16 bytes", out)
        self._check_stats(wait_stats, "combine_wait_recv_cost_stats")
        if zero_copy and not (self._arena.holds(x) and x.is_contiguous()):
            raise ArgumentError(
                "x must be what get_next_low_latency_combine_buffer(handle) gave, or a contiguous tensor from Buffer.empty, "
                "with zero_copy=True",
                "x",
            )
        space.check_hook(handle.set)
        x, topk_idx, topk_weights = x.contiguous(), topk_idx.contiguous(), topk_weights.contiguous()
        p = self._params(_C.low_latency.CombineParams(), space, handle.set)
        p.y, p.zero_copy, p.logfmt = x.data_ptr(), int(zero_copy), int(use_logfmt)
        p.out, p.topk_idx, p.topk_weights = out.data_ptr(), topk_idx.data_ptr(), topk_weights.data_ptr()
        p.pick_index, p.wait_ns, p.num_tokens = handle.pick_index.data_ptr(), _address(wait_stats), num_tokens
        hook = self._launch("combine", p, handle, (out, topk_idx, topk_weights, wait_stats, x), with_hook)
        return out, hook

    def _launch(
        self, name: str, p: Any, handle: KernelHandle, used: tuple[Tensor | None, ...], with_hook: bool
    ) -> Callable[[], None] | None:
        """The send phase, and the receive phase, now or as a hook."""
        space, slots = handle.space, handle.set

        def launch(phase: str, stream: int) -> None:
            getattr(_C.low_latency, name + phase)(p, stream)
            if self._far is not None:
                self._far.follow(name + phase, p, stream)

        with self._ordered() as stream:
            launch("_send", stream)
            if not with_hook:
                launch("_receive", stream)
            if torch.cuda.is_current_stream_capturing():
                self._arena.keep((space, handle.pick_index))
        if not with_hook:
            space.are_over[slots] |= name == "combine"
            return None
        space.waiting[slots] = f"low_latency_{name}"
        sent_on = torch.cuda.current_stream(self._device)

        def hook() -> None:
            if not space.waiting[slots] or space.numbers[slots] != handle.number:
                raise DeepEPError(f"the hook of a low_latency_{name} may be called once")
            here = torch.cuda.current_stream(self._device)
            if here != sent_on and not torch.cuda.is_current_stream_capturing():
                for t in (*used, handle.pick_index):
                    if t is not None:
                        t.record_stream(here)
            with self._ordered() as stream:
                launch("_receive", stream)
            space.waiting[slots] = ""
            space.are_over[slots] |= name == "combine"

        return hook

    def combine_buffer(self, buffer: Any, handle: Any) -> Tensor:
        """bf16 [L, R*M, H] that peers reach; the same for every use of the same slots."""
        handle = self._check_handle(buffer, handle)
        space, size = handle.space, self._peers.size
        kept = space.combine_buffers[handle.set]
        if kept is None:
            rows = (space.shape.num_experts // size, size * space.shape.max_tokens, space.shape.hidden)
            kept = space.combine_buffers[handle.set] = self._take(rows, torch.bfloat16)
        return kept

    # Masks -------------------------------------------------------------------------------------------------------------

    def update_mask(self, rank: int, mask: bool) -> None:
        checks.integer(rank, "rank_to_mask")
        checks.need(rank < self._peers.size, "rank_to_mask", f"below the group's {self._peers.size} ranks", rank)
        checks.need(rank != self._peers.rank, "rank_to_mask", "another rank", rank)
        checks.flag(mask, "mask")
        with self._ordered() as stream:
            self._mask[rank] = int(mask)
            for space in self._spaces.values() if not mask else ():
                _C.low_latency.forget(self._params(_C.low_latency.Common(), space, 0), rank, stream)

    def query_mask(self, status: Tensor) -> None:
        checks.tensor(status, "mask_status", [self._peers.size], (torch.int32,), self._device)
        with self._ordered():
            status.copy_(self._mask != 0)

    def clean_mask(self) -> None:
        for rank in range(self._peers.size):
            if rank != self._peers.rank:
                self.update_mask(rank, False)

    def clean(self, max_tokens: int, hidden: int, num_experts: int) -> None:
        """Start anew, on all ranks together; results that are alive are lost."""
        spaces = [s for k, s in self._spaces.items() if k[:3] == (max_tokens, hidden, num_experts)]
        if not spaces or torch.cuda.is_current_stream_capturing():
            return
        with self._ordered():
            torch.cuda.current_stream(self._device).synchronize()
            self._peers.gather_objects({}, "clean_low_latency_buffer")
            for space in spaces:
                space.forget()
                space.memory[: _C.low_latency.control_bytes()].zero_()
            torch.cuda.current_stream(self._device).synchronize()
            self._peers.gather_objects({}, "clean_low_latency_buffer")

    # Life --------------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        if self._seen_bad_index.value:
            self._bad_index.zero_()
            raise ArgumentError(
                "topk_idx of an earlier low_latency_dispatch on this rank had values outside [-1, num_experts); they were "
                "taken for -1",
                "topk_idx",
            )

    def close(self) -> None:
        """A graph that is replayed from now on does nothing."""
        for space in self._spaces.values():
            space.close()
        self._spaces.clear()

    # Inside ------------------------------------------------------------------------------------------------------------

    def _check(
        self,
        x: Tensor,
        shape: Shape,
        use_fp8: bool,
        round_scale: bool,
        use_ue8m0: bool,
        cumulative_stats: Tensor | None,
        wait_stats: Tensor | None,
    ) -> None:
        limits = {
            "num_max_dispatch_tokens_per_rank": (shape.max_tokens, _MAX_TOKENS),
            "x": (shape.hidden, MAX_HIDDEN),
            "num_experts": (shape.num_experts, MAX_EXPERTS),
            "topk_idx": (shape.top_k, MAX_TOP_K),
        }
        for name, (value, most) in limits.items():
            if value > most:
                what = {"x": "x's hidden size", "topk_idx": "topk_idx's top-k"}.get(name, name)
                raise ArgumentError(f"the low-latency kernels take {what} up to {most}, got {value}", name)
        if x.size(0) > shape.max_tokens:
            raise ArgumentError(f"x has {x.size(0)} tokens, above num_max_dispatch_tokens_per_rank={shape.max_tokens}", "x")
        if use_ue8m0 and not (use_fp8 and round_scale):
            raise ArgumentError("use_ue8m0=True needs use_fp8=True and round_scale=True", "use_ue8m0")
        multiple = 4 * fp8.BLOCK if use_ue8m0 else fp8.BLOCK
        if shape.hidden % multiple or not shape.hidden:
            raise ArgumentError(f"x must have a hidden size that is a multiple of {multiple}, got {shape.hidden}", "x")
        if cumulative_stats is not None:
            local = [shape.num_experts // self._peers.size]
            checks.tensor(cumulative_stats, "cumulative_local_expert_recv_stats", local, (torch.int32,), self._device)
            contiguous = cumulative_stats.is_contiguous()
            checks.need(contiguous, "cumulative_local_expert_recv_stats", "contiguous", cumulative_stats)
        self._check_stats(wait_stats, "dispatch_wait_recv_cost_stats")

    def _check_stats(self, stats: Tensor | None, name: str) -> None:
        if stats is not None:
            checks.tensor(stats, name, [self._peers.size], (torch.int64,), self._device)
            checks.need(stats.is_contiguous(), name, "contiguous", stats)

    @staticmethod
    def _check_handle(buffer: Any, handle: Any) -> KernelHandle:
        if not isinstance(handle, KernelHandle) or handle.buffer is not buffer:
            raise ArgumentError("handle must be what this buffer's low_latency_dispatch returned", "handle")
        if handle.space.numbers[handle.set] != handle.number:
            raise ArgumentError("handle is of a result whose slots a later low_latency_dispatch has taken", "handle")
        return handle

    def _params(self, p: Any, space: Space, slots: int) -> Any:
        p.spaces, p.own = space.addresses.data_ptr(), space.memory.data_ptr()
        p.arenas, p.mask = self._arenas.data_ptr(), self._mask.data_ptr()
        p.timeout_ns = int(self._peers.timeout * 1e9)
        p.set, p.num_sms = slots, self._num_sms
        return self._describe(p, space.shape)

    def _describe(self, p: Any, shape: Shape) -> Any:
        p.rank, p.num_ranks = self._peers.rank, self._peers.size
        far = self._far
        p.first_local, p.num_local = (0, p.num_ranks) if far is None else (far.first_local, far.num_local)
        p.max_tokens, p.hidden, p.num_experts, p.top_k = shape
        return p

    def _take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        try:
            return self._arena.empty(shape, dtype)
        except ArenaFull as full:
            raise DeepEPError(
                f"the arena of rank {self._peers.rank} has no room for {full.num_bytes} bytes of the low-latency calls; pass "
                "num_rdma_bytes=Buffer.get_low_latency_rdma_size_hint(…) to Buffer"
            ) from None

    def _space_for(self, shape: Shape | None, error: Exception | None) -> Space:
        """The first call of a shape is a collective one."""
        if shape is not None and shape in self._spaces:
            return self._spaces[shape]
        if torch.cuda.is_current_stream_capturing():
            raise DeepEPError("the first low_latency_dispatch of a shape cannot be captured in a CUDA graph; make one before")
        self._agree({"agreed": {} if shape is None else shape._asdict()}, error)
        assert shape is not None
        error, memory, offset = None, None, 0
        where: list[int] = []
        with self._ordered():
            try:
                num_bytes = _C.low_latency.space_bytes(self._describe(_C.low_latency.Common(), shape))
                if self._far is not None:
                    memory, where = self._far.take(num_bytes)
                else:
                    memory = self._take((num_bytes,), torch.uint8)
                    offset = self._arena.offset(memory)
                memory[: _C.low_latency.control_bytes()].zero_()
                torch.cuda.current_stream(self._device).synchronize()
            except RuntimeError as caught:
                error = caught
            # When this returns, every rank's flags are 0.
            everyone = self._agree({"agreed": {}, "offset": offset}, error)
            assert memory is not None
            if self._far is None:
                where = [base + other["offset"] for base, other in zip(self._arenas.tolist(), everyone, strict=True)]
            space = self._spaces[shape] = Space(shape, memory, torch.tensor(where, device=self._device))
        return space

    def _agree(self, mine: dict[str, Any], error: Exception | None) -> list[dict[str, Any]]:
        """What every rank gives, if none has an error and all have the same "agreed"; else raise, on every rank."""
        mine |= {"error": "" if error is None else str(error), "argument": getattr(error, "argument", "")}
        everyone = self._peers.gather_objects(mine, "low_latency_dispatch")
        broken = [r for r, other in enumerate(everyone) if other["error"]]
        if broken:
            what = "low_latency_dispatch: " + "; ".join(f"rank {r}: {everyone[r]['error']}" for r in broken)
            if all(everyone[r]["argument"] for r in broken):
                raise ArgumentError(what, everyone[broken[0]]["argument"], broken) from error
            raise DeepEPError(what) from error
        raise_if_different("low_latency_dispatch", [other["agreed"] for other in everyone])
        return everyone


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
