"""The low-latency engine's kernels: rows go into slots at the receiver without a round of counting first.

docs/low_latency.md explains the protocol; csrc/low_latency holds the kernels, csrc/low_latency/params.hpp the names used here.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor

from deepep_train import _C, checks, fp8  # type: ignore[attr-defined]
from deepep_train.engines.arena import Arena
from deepep_train.engines.base import address_of, aligned
from deepep_train.engines.low_latency_arguments import Shape, check_combine, check_dispatch, check_limits, shape_of
from deepep_train.engines.low_latency_far import OtherNodes
from deepep_train.engines.low_latency_space import KernelHandle, Space, Waiting, handle_of
from deepep_train.engines.low_latency_spaces import Spaces
from deepep_train.engines.peers import Peers
from deepep_train.errors import ArgumentError, DeepEPError
from deepep_train.streams import used_here

MAX_RANKS = _C.low_latency.max_ranks
_MOST_SECONDS = 1e9  # of a timeout, four of which the kernels count as nanoseconds in 64 bits
T = TypeVar("T")


def weakly(method: Callable[[], T]) -> Callable[[], T]:
    """Calls a method of an object that it does not keep: engines own their `LowLatency`, and each would keep the other."""
    alive = weakref.WeakMethod(method)

    def call() -> T:
        found = alive()
        assert found is not None
        return found()

    return call


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Of contiguous tensors."""
    return a.data_ptr() < b.data_ptr() + b.nbytes and b.data_ptr() < a.data_ptr() + a.nbytes


class LowLatency:
    """See the module.

    Args:
        peers: bootstrap.
        arena: of this rank; what this node's peers reach lies in it.
        addresses: of every rank's arena, as this process maps it; 0 for those of other nodes.
        num_sms: that a launch may occupy.
        one_gpu: whether all ranks of this node share one.
        ordered: a context in which launches follow each other, whatever streams they are on; gives the stream.
        far: how ranks of other nodes are reached; None: there are none.
        at_once: whether the kernels of all ranks run on one GPU at the same time.

    Attributes, which may be changed at any time, for this rank alone:
        keeps_rows: whether rows that are dispatched with a hook stay here until they are received; at first, if `one_gpu`.
        in_slices: whether a combine that can be one launch, slice by slice, is; None: if it is faster.
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
        at_once: bool = False,
    ) -> None:
        self._peers, self._arena, self._far = peers, arena, far
        self._num_sms, self._one_gpu, self._ordered, self._device = num_sms, one_gpu, ordered, device
        self._at_once = at_once
        self.keeps_rows = one_gpu
        self.in_slices: bool | None = None
        self._l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
        self._spaces = Spaces(peers, arena, addresses, ordered, device, far)
        self._mask = torch.zeros(peers.size, dtype=torch.int32, device=device)
        self._bad_index = torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")
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
        async_finish: bool,
        with_hook: bool,
    ) -> tuple[Any, Tensor, KernelHandle, Callable[[], None] | None]:
        """See `Buffer.low_latency_dispatch`; gives (recv_x, recv_count, handle, hook)."""
        size, error = self._peers.size, None
        shape: Shape | None = None
        try:
            shape = shape_of(x, topk_idx, max_tokens, num_experts, size, self._device, check_range=False)
            check_limits(shape)
            stats = (cumulative_stats, wait_stats)
            check_dispatch(x, shape, size, use_fp8, round_scale, use_ue8m0, *stats, async_finish, with_hook)
        except Exception as caught:
            if shape in self._spaces:
                raise
            error = caught
        space = self._spaces.of(shape, error)
        assert shape is not None
        slots = space.take()
        num_local, num_slots = num_experts // size, size * max_tokens

        def new(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device=self._device)

        x, topk_idx = aligned(x), topk_idx.contiguous()
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
        p.keep = int(not with_hook or self.keeps_rows)
        p.bad_index = self._bad_index.data_ptr()
        p.recv_x, p.recv_scales, p.src_info = data.data_ptr(), address_of(scales), source.data_ptr()
        p.ranges, p.recv_count = ranges.data_ptr(), count.data_ptr()
        p.cumulative, p.wait_ns = address_of(cumulative_stats), address_of(wait_stats)
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
        async_finish: bool,
        with_hook: bool,
    ) -> tuple[Tensor, Callable[[], None] | None]:
        """See `Buffer.low_latency_combine`; gives (combined_x, hook)."""
        handle = handle_of(buffer, handle)
        space, num_tokens = handle.space, handle.pick_index.size(0)
        where = (space.shape, num_tokens, self._peers.size, self._device)
        how = (use_logfmt, zero_copy, out, wait_stats, async_finish, with_hook)
        check_combine(x, topk_idx, topk_weights, *where, False, *how)
        if out is None:
            out = torch.empty(num_tokens, space.shape.hidden, dtype=torch.bfloat16, device=self._device)
        if zero_copy and not (self._arena.holds(x) and x.is_contiguous() and x.data_ptr() % 16 == 0):
            raise ArgumentError(
                "x must be what get_next_low_latency_combine_buffer(handle) gave, or a contiguous tensor from Buffer.empty, "
                "aligned to 16 bytes, with zero_copy=True",
                "x",
            )
        if zero_copy and out is not None and _overlap(x, out):
            raise ArgumentError("out must not overlap x with zero_copy=True, which peers read while out is written", "out")
        space.check_hook(handle.set)
        x, topk_idx, topk_weights = aligned(x), topk_idx.contiguous(), topk_weights.contiguous()
        if zero_copy:
            space.shown[handle.set] = x
        p = self._params(_C.low_latency.CombineParams(), space, handle.set)
        p.y, p.zero_copy, p.logfmt = x.data_ptr(), int(zero_copy), int(use_logfmt)
        p.out, p.topk_idx, p.topk_weights = out.data_ptr(), topk_idx.data_ptr(), topk_weights.data_ptr()
        p.pick_index, p.wait_ns, p.num_tokens = handle.pick_index.data_ptr(), address_of(wait_stats), num_tokens
        used = (out, topk_idx, topk_weights, wait_stats, x)
        as_they_are = not (with_hook or zero_copy or use_logfmt or _overlap(x, out))
        if as_they_are and self._takes_slices(space.shape, num_tokens):
            self._launch("combine", p, handle, used, False, ("_slices",))
            return out, None
        return out, self._launch("combine", p, handle, used, with_hook)

    def _takes_slices(self, shape: Shape, num_tokens: int) -> bool:
        """Of a combine of rows as they are, that are copied, and without a hook: whether it is one launch.

        The copies of all ranks then stay in the L2 cache, which otherwise they would not (docs/low_latency.md). Ranks need not
        agree.
        """
        row_bytes, rows = 2 * shape.hidden, self._peers.size * num_tokens * shape.top_k
        if self._far is not None or not self._one_gpu or row_bytes % _C.low_latency.slice_bytes:
            return False
        if num_tokens > _C.low_latency.most_tokens_in_slices(self._num_sms):
            return False
        if self.in_slices is not None:
            return self.in_slices
        fits = rows * _C.low_latency.slice_bytes * _C.low_latency.slices_in_flight < 0.6 * self._l2_bytes
        return self._at_once and rows * row_bytes > self._l2_bytes and fits

    def _launch(
        self,
        name: str,
        p: Any,
        handle: KernelHandle,
        used: tuple[Tensor | None, ...],
        with_hook: bool,
        phases: tuple[str, ...] = ("_send", "_receive"),
    ) -> Callable[[], None] | None:
        """The phases now, or the last as a hook."""
        space, slots = handle.space, handle.set

        def received() -> None:
            if name == "combine":
                space.are_over[slots] = True
            else:
                space.shown[slots] = None

        def launch(phase: str, stream: int) -> None:
            getattr(_C.low_latency, name + phase)(p, stream)
            if self._far is not None:
                self._far.follow(name + phase, p, stream)

        with self._ordered() as sent_on:
            for phase in phases[:1] if with_hook else phases:
                launch(phase, sent_on)
            if torch.cuda.is_current_stream_capturing():
                self._arena.keep((space, handle.pick_index))
                space.was_captured = True
            if name == "dispatch":
                handle.stream = sent_on
            else:
                used_here((handle.pick_index,), handle.stream)
        if not with_hook:
            received()
            return None
        space.waiting[slots] = waiting = Waiting(f"low_latency_{name}")

        def hook() -> None:
            space.check_open()
            if space.waiting[slots] is not waiting:
                raise DeepEPError(f"the hook of a low_latency_{name} may be called once")
            used_here((*used, handle.pick_index), sent_on)
            with self._ordered() as stream:
                launch(phases[-1], stream)
                space.was_captured |= torch.cuda.is_current_stream_capturing()
            space.waiting[slots] = None
            received()

        return hook

    def combine_buffer(self, buffer: Any, handle: Any) -> Tensor:
        handle = handle_of(buffer, handle)
        with self._ordered():
            return self._spaces.combine_buffer(handle.space, handle.set)

    # Masks -------------------------------------------------------------------------------------------------------------

    def update_mask(self, rank: int, mask: bool) -> None:
        checks.integer(rank, "rank_to_mask")
        checks.need(rank < self._peers.size, "rank_to_mask", f"below the group's {self._peers.size} ranks", rank)
        checks.need(rank != self._peers.rank, "rank_to_mask", "another rank", rank)
        checks.flag(mask, "mask")
        with self._ordered() as stream:
            for space in self._spaces if not mask else ():  # while it is masked, if it is
                _C.low_latency.forget(self._params(_C.low_latency.Common(), space, 0), rank, stream)
            self._mask[rank] = int(mask)

    def query_mask(self, status: Tensor) -> None:
        checks.tensor(status, "mask_status", [self._peers.size], (torch.int32,), self._device)
        with self._ordered():
            status.copy_(self._mask != 0)

    def clean_mask(self) -> None:
        for rank in range(self._peers.size):
            if rank != self._peers.rank:
                self.update_mask(rank, False)

    def clean(self, max_tokens: int, hidden: int, num_experts: int) -> None:
        self._spaces.clean(max_tokens, hidden, num_experts)

    # Life --------------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        if self._seen_bad_index.value:
            self._bad_index.zero_()
            raise ArgumentError(
                "topk_idx of an earlier low_latency_dispatch on this rank had values outside [-1, num_experts); they were "
                "taken for -1",
                "topk_idx",
            )

    def put_bytes(self) -> int:
        """What this rank has put to other nodes so far, by all calls and replays before this in stream order, which the CPU
        waits for."""
        if self._far is None or not self._spaces:
            return 0
        if torch.cuda.is_current_stream_capturing():
            raise DeepEPError(
                "what low-latency calls have put cannot be asked in a CUDA graph's capture: the GPU has counted it"
            )
        with self._ordered():
            return int(self._far.put_bytes)

    def close(self) -> None:
        self._spaces.close()

    def _params(self, p: Any, space: Space, slots: int) -> Any:
        p.mask, p.num_sms = self._mask.data_ptr(), self._num_sms
        p.timeout_ns = int(min(self._peers.timeout, _MOST_SECONDS) * 1e9)
        return self._spaces.params(p, space, slots)
