"""DeepEP V1's low-latency methods of `Buffer`: on the kernels where there are any, else over the normal dispatch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from deepep_train import checks, low_latency
from deepep_train.engines import low_latency_sizes
from deepep_train.engines.base import Engine, Payload
from deepep_train.engines.low_latency_arguments import Shape, check_limits
from deepep_train.errors import DeepEPError
from deepep_train.events import EventOverlap
from deepep_train.streams import CommStream

PayloadArgument = Tensor | tuple[Tensor, Tensor] | Payload


class LowLatencyCalls:
    """A part of `Buffer`.

    L local experts, R ranks, M most tokens of a rank, H hidden. On the nvlink, low_latency and rdma engines these calls have
    kernels of their own, described in docs/low_latency.md; the first call of a shape (M, H, experts, top-k) is then a
    collective one. On the collective engine every call is, goes over its dispatch, and has everything when it returns: hooks
    do nothing, and wait statistics stay as they are.

    CUDA graphs: what these methods raise of results and hooks, the CPU finds out when it makes, or captures, a call. It does
    not see replays: each of their dispatches overwrites what its set of slots holds, and a result from outside the graph that
    was there is then combined wrongly, without an error. Combine, or give up, every result of the shape before a replay, call
    captured hooks in the capture, and capture and replay alike on every rank: docs/low_latency.md, "CUDA graphs".
    """

    _engine: Engine
    _comm: CommStream
    engine: str

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """The `num_rdma_bytes` of a `Buffer(low_latency_mode=True)` that make its arena hold one shape of low-latency calls
        besides all else: its space, and a buffer for each of two results that are combined with `zero_copy`.

        Enough for any top-k, within a node and across; there the space lies in NVSHMEM's memory, and what is left over is for
        other calls.

        Raises:
            ArgumentError: a number below 1, or experts that the ranks do not divide.
        """
        checks.integer(num_max_dispatch_tokens_per_rank, "num_max_dispatch_tokens_per_rank", 1)
        checks.integer(hidden, "hidden", 1)
        checks.integer(num_ranks, "num_ranks", 1)
        checks.experts(num_experts, num_ranks)
        return low_latency_sizes.arena_bytes(num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts)

    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        dispatch_wait_recv_cost_stats: Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[PayloadArgument, Tensor, tuple, EventOverlap, Callable[[], None] | None]:
        """Send every pick of an expert into that expert's rows.

        A result lives until it has been combined, or its handle is dropped, and must not live when the second dispatch of its
        shape behind it is made, which takes its slots: so at most two are alive. Replays of CUDA graphs end results, too, which
        nobody checks: see `LowLatencyCalls`.

        Args:
            x: bfloat16 [T, H], T at most M; H a multiple of 128 with `use_fp8` and on the kernels, of 512 with `use_ue8m0`.
            topk_idx: int64 [T, K] in [-1, num_experts). On the kernels the range is not waited for: other values count as -1,
                and `check()`, or the next call, raises.
            cumulative_local_expert_recv_stats: int32 [L], to which the rows received are added.
            dispatch_wait_recv_cost_stats: int64 [R], to which the nanoseconds are added that each rank's rows were waited for.
            use_fp8: quantize in blocks of 128, see `deepep_train.fp8.quantize_blocks`.
            round_scale, use_ue8m0: scales as powers of two; packed as UE8M0, four to an int32.
            return_recv_hook: only send; nothing of this library runs until the hook is called, which receives.

        Returns:
            recv_x bfloat16 [L, R*M, H], or a pair with float8_e4m3fn data and scales float32 [L, R*M, H/128] or int32
            [L, R*M, H/512]; recv_count int32 [L], rows that are valid, the first ones, by (source rank, token); handle; event;
            hook (None unless asked for).

        Raises:
            ArgumentError: before a first call of a shape on every rank, later on this rank alone; on the collective engine
                always on every rank, also for indices out of range.
            DeepEPError: the result of the dispatch before the last lives, or its slots' last hook was not called (both on the
                kernels, and not in replays); a first call of a shape in a capture; no room for a shape's memory.
            PeerTimeoutError: a rank did not come to a first call of a shape.
        """
        self.check()
        stats = (cumulative_local_expert_recv_stats, dispatch_wait_recv_cost_stats)
        inputs = [x, topk_idx, *stats]
        given = (x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts, *stats)
        how = (use_fp8, round_scale, use_ue8m0, async_finish, return_recv_hook)
        kernels = self._engine.low_latency
        if kernels is None:
            (recv, count, handle), event = self._comm.run(
                lambda: low_latency.dispatch(self._engine, self, *given, *how), inputs, None, async_finish
            )
            return recv, count, handle, event, low_latency.NO_HOOK if return_recv_hook else None
        (recv, count, handle, hook), event = self._comm.run(
            lambda: kernels.dispatch(self, *given, *how), inputs, None, async_finish
        )
        return recv, count, handle, event, hook

    def low_latency_combine(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: tuple,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: Tensor | None = None,
        combine_wait_recv_cost_stats: Tensor | None = None,
    ) -> tuple[Tensor, EventOverlap, Callable[[], None] | None]:
        """Bring rows back from their experts and sum them with their weights, over k in ascending order in float32.

        Rows of ranks that are masked, or do not come in time, count as zero.

        Args:
            x: bfloat16 [L, R*M, H], the experts' results in the places of `low_latency_dispatch`'s rows.
            topk_idx, topk_weights: int64 and float32 [T, K], as dispatched; -1 contributes nothing.
            use_logfmt: this rank's experts' rows travel in 10 bits a value, see docs/low_latency.md; not with `zero_copy`.
                Without effect on the collective engine.
            zero_copy: peers read x where it is: what `get_next_low_latency_combine_buffer(handle)` gave.
            out: bfloat16 [T, H] to write the result to; with `zero_copy` no part of x.
            combine_wait_recv_cost_stats: int64 [R], to which the nanoseconds are added that each rank was waited for.

        Returns:
            combined_x bfloat16 [T, H], event, hook.

        Raises:
            ArgumentError: on this rank alone; on the collective engine on every rank, if its group has a CPU backend. On the
                kernels also if a later dispatch has taken the result's slots, unless a replay of a CUDA graph did.
            DeepEPError: the dispatch's, or the last combine's, hook was not called.
        """
        self.check()
        wait = combine_wait_recv_cost_stats
        inputs = [x, topk_idx, topk_weights, out, wait]
        given = (x, topk_idx, topk_weights, handle, use_logfmt, zero_copy, out, wait, async_finish, return_recv_hook)
        kernels = self._engine.low_latency
        if kernels is None:
            z, event = self._comm.run(lambda: low_latency.combine(self._engine, self, *given), inputs, None, async_finish)
            return z, event, low_latency.NO_HOOK if return_recv_hook else None
        (z, hook), event = self._comm.run(lambda: kernels.combine(self, *given), inputs, None, async_finish)
        return z, event, hook

    def check_low_latency_limits(self, shape: Shape, names: Sequence[str]) -> None:
        """Raise `ArgumentError` if this buffer has low-latency kernels, and they do not serve calls of this shape: so that what
        will make such calls can say so before the first.

        Args:
            names: what the caller calls the numbers in `shape`.
        """
        if self._engine.low_latency is not None:
            check_limits(shape, names)

    def refuse_low_latency_dispatch(self, error: Exception) -> NoReturn:
        """As `Buffer.refuse_dispatch` where low-latency calls go over the normal dispatch. Kernels of the peers wait for this
        rank, give it up, and go on without it."""
        self.check()
        if self._engine.low_latency is None:
            self.refuse_dispatch(error)
        raise error

    def get_next_low_latency_combine_buffer(self, handle: tuple) -> Tensor:
        """A bfloat16 tensor [L, R*M, H] to fill, when the dispatch has been received, and pass to
        `low_latency_combine(zero_copy=True)`. The dispatch after the next gets the same one.

        Raises:
            ArgumentError: the handle is none of this buffer's, or a later dispatch has taken its slots.
            DeepEPError: the arena has no room for it, with the `num_nvl_bytes` that has.
        """
        self.check()
        if self._engine.low_latency is not None:
            return self._engine.low_latency.combine_buffer(self, handle)
        source, _, _, hidden, _ = low_latency.handle_of(self, handle)
        return self.empty((*source.shape, hidden), torch.bfloat16, source.device)

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        """Start anew with calls of this shape, on all ranks together: what brings a rank back that has missed some, once it is
        unmasked. Results that are alive are lost: their handles and hooks raise.

        A collective call of ranks that have all called the shape before; nothing happens on one that has not, or in a capture.
        Never needed else, though V1 wants it after normal calls.

        Raises:
            ArgumentError: a number below 1; on this rank alone.
        """
        self.check()
        checks.integer(num_max_dispatch_tokens_per_rank, "num_max_dispatch_tokens_per_rank", 1)
        checks.integer(hidden, "hidden", 1)
        checks.integer(num_experts, "num_experts", 1)
        if self._engine.low_latency is not None:
            self._engine.low_latency.clean(num_max_dispatch_tokens_per_rank, hidden, num_experts)

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Leave a rank out of low-latency calls, or take it in again; needs an engine with low-latency kernels.

        This rank's own view, of all shapes: from the next call on, in the order of this buffer's calls, the rank is neither
        waited for nor sent to, and its rows count as zero. The other rank masks this one before the same call, or waits its
        timeout for it, once. Unmasked, its rows count from the next dispatch on if it has made all calls meanwhile and has
        unmasked this rank before the same one; in combines of dispatches before they do not. If it has missed calls it is given
        up again after a timeout, unless `clean_low_latency_buffer` follows. docs/low_latency.md, "Ranks that stop".

        Args:
            rank_to_mask: another rank of the group.

        Raises:
            ArgumentError: this rank, none of the group, or a mask that is no bool; on this rank alone.
        """
        self._with_masks().update_mask(rank_to_mask, mask)

    def low_latency_query_mask_buffer(self, mask_status: Tensor) -> None:
        """Write 1 for every rank that this one masks into int32 [R], 0 for the others, as of all calls before; those that did
        not come in time are masked. Needs an engine with low-latency kernels."""
        self._with_masks().query_mask(mask_status)

    def low_latency_clean_mask_buffer(self) -> None:
        """Unmask all ranks, see `low_latency_update_mask_buffer`; needs an engine with low-latency kernels. Ranks that have
        missed calls need `clean_low_latency_buffer`, too."""
        self._with_masks().clean_mask()

    def _with_masks(self) -> Any:
        self.check()
        if self._engine.low_latency is None:
            raise DeepEPError(f"the {self.engine} engine cannot leave ranks out: its collectives need every rank of the group")
        return self._engine.low_latency

    # Of the rest of `Buffer`.
    if TYPE_CHECKING:

        def check(self) -> None: ...
        def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str | None = None) -> Tensor: ...
        def refuse_dispatch(self, error: Exception) -> NoReturn: ...
