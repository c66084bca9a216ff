"""The engine of one NVLink domain: kernels that store every row once, straight into its final place in a peer's memory.

docs/kernels.md explains the protocol; csrc/nvlink holds the kernels, csrc/nvlink/params.hpp the names used here.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor

from deepep_train import _C  # type: ignore[attr-defined]
from deepep_train.engines import processes
from deepep_train.engines.arena import Arena, ArenaFull, Parts
from deepep_train.engines.base import (
    MAX_EXPERTS,
    MAX_NVLINK_RANKS,
    MAX_TOP_K,
    CombineRequest,
    DispatchRequest,
    Engine,
    NoPeerAccess,
    Payload,
    Prepared,
    Received,
    RedispatchRequest,
    need_own_device,
    need_rows_of,
)
from deepep_train.engines.low_latency import LowLatency
from deepep_train.engines.nvlink_failures import cuda_failed, device_error, layout_error
from deepep_train.engines.nvlink_tables import (
    Counting,
    ExpertPlan,
    Known,
    NvlinkLayout,
    NvlinkPlan,
    remember,
    remembered,
    seen,
)
from deepep_train.engines.peers import Peers, raise_if_broken
from deepep_train.engines.signature import hashed, signature
from deepep_train.engines.sms import default_sms, most_sms
from deepep_train.engines.v1_handle import checked_prefix
from deepep_train.errors import ArgumentError, DeepEPError
from deepep_train.handle import Plan
from deepep_train.routing import RankLayout, count_picks
from deepep_train.scale_blocks import ScaleBlocks

_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_CHUNKS = 128  # params.hpp's kChunks
_MAX_ALIGNMENT = 1 << 16  # with 4096 experts, row numbers still fit into 32 bits
# What scales get that asked for no blocks, in expert layout: one group, column by column, given as [M, n].
_COLUMNS = ScaleBlocks(True, 4, 0)
_PROCESS = secrets.token_hex(8)  # containers may share host names and process numbers


class NvlinkEngine(Engine):
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
        self._owed = ""  # the operation in which peers wait for this rank
        self._token = object()  # of this engine, for what travels with tensors
        self._no_offset_R1 = torch.zeros(self.peers.size, 1, dtype=torch.int32, device=self.device)
        size = self.peers.size
        if size > MAX_NVLINK_RANKS:
            raise ArgumentError(f"engine='nvlink' serves up to {MAX_NVLINK_RANKS} ranks, the group has {size}", "engine")
        total = _C.Communicator.control_bytes() + arena_bytes
        mine: dict[str, Any] = {"process": f"{_PROCESS}/{os.getpid()}", "error": "", "handle": "", "base": 0}
        mine["index"], mine["identity"] = self.device.index, processes.identity()
        properties = torch.cuda.get_device_properties(self.device)
        mine["device"] = str(properties.uuid)  # without the host's name: containers that share a GPU may differ in it
        try:
            self._comm = _C.Communicator(self.device.index, self.rank, size, total, float(peers.timeout))
            mine["base"] = self._comm.base
            mine["handle"] = self._comm.ipc_handle().hex() if size > 1 else ""
        except RuntimeError as error:
            mine["error"] = f"no arena of {total} bytes: {error}"
        everyone = self.peers.gather_objects(mine, "Buffer")
        raise_if_broken(everyone)
        mine["error"] = ""
        try:
            self._comm.open(
                [
                    (b"" if o["process"] == mine["process"] else bytes.fromhex(o["handle"]), o["base"], o["index"])
                    for o in everyone
                ]
            )
        except RuntimeError as error:
            mine["error"] = str(error)
        try:
            raise_if_broken(self.peers.gather_objects(mine, "Buffer"))  # besides: nobody starts before all have mapped all
        except DeepEPError as error:
            raise NoPeerAccess(str(error)) from None
        self._processes = [o["identity"] for o in everyone]
        self._arena = Arena(self._comm, self.device)
        sharing = sum(o["device"] == mine["device"] for o in everyone)
        sms = properties.multi_processor_count
        self._max_sms = most_sms(sms, sharing)
        self._default_sms = {
            operation: default_sms(operation, properties.major, sms, size, sharing) for operation in ("dispatch", "combine")
        }
        self.low_latency = LowLatency(
            self.peers, self._arena, self._comm.addresses(), self._max_sms, sharing == size, self._ordered, self.device
        )

    # Memory ------------------------------------------------------------------------------------------------------------

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | None) -> Tensor:
        need_own_device(device, self.device)
        with self._lock, torch.cuda.device(self.device):
            try:
                return self._arena.empty(shape, dtype)
            except ArenaFull as full:
                raise self._arena.too_small(self.rank, full.num_bytes) from None

    def memory_stats(self) -> dict[str, int]:
        return self._arena.stats()

    @contextmanager
    def _operation(self) -> Iterator[int]:
        """One operation: gives the stream; operations of all streams follow each other.

        If it raises while peers wait for this rank's rows (`_owed`), they are told that there will be none. Whatever the
        caller's current device is, here it is the engine's: torch's questions about "the current stream" are about that one's.
        """
        with self._lock, torch.cuda.device(self.device):
            stream = self._stream()
            self._comm.enter(stream)
            self._arena.begin_operation()
            self._owed = ""
            try:
                yield stream
            except BaseException as error:
                self._check_cuda(error)  # if so, nothing can be launched any more, and there is no order to keep
                if self._owed:
                    self._comm.refuse(self._owed, error.num_bytes if isinstance(error, ArenaFull) else 0, stream)
                self._finish(stream)
                if isinstance(error, ArenaFull):
                    raise self._arena.too_small(self.rank, error.num_bytes) from None
                raise
            self._finish(stream)

    @contextmanager
    def _ordered(self) -> Iterator[int]:
        """Around launches and uses of the arena that nobody waits for at once; as `_operation` else."""
        with self._lock, torch.cuda.device(self.device):
            stream = self._stream()
            self._comm.enter(stream)
            try:
                yield stream
            finally:
                self._comm.leave(stream)

    def _finish(self, stream: int) -> None:
        self._owed = ""
        self._comm.leave(stream)

    def _plan_for(self, plan: Plan, stream: int) -> NvlinkPlan:
        """A handle may die as soon as a call that uses it returns, on whatever stream: its tables must not."""
        assert isinstance(plan, NvlinkPlan)
        if torch.cuda.is_current_stream_capturing():
            self._arena.keep(plan)
        elif plan.stream != stream:  # None, of a handle rebuilt from copies: nobody knows
            current = torch.cuda.current_stream(self.device)
            for table in plan.tables():
                table.record_stream(current)
        return plan

    # Checks ------------------------------------------------------------------------------------------------------------

    def check_payload(self, payload: Payload, argument: str = "x") -> None:
        need_rows_of(payload, argument, self.device, _DTYPES, "nvlink")
        data = payload.data
        if data.size(1) * data.element_size() % 16:
            raise ArgumentError(
                f"{argument} must have rows of a multiple of 16 bytes on the nvlink engine, got {data.size(1)} elements of "
                f"{data.element_size()}",
                argument,
            )
        if payload.scales is not None and payload.scales.element_size() != 4:
            raise ArgumentError(
                f"{argument}[1] must be float32 or int32 on the nvlink engine, got {payload.scales.dtype}", f"{argument}[1]"
            )

    def layout(self, topk_idx: Tensor, num_experts: int) -> RankLayout:
        num_tokens, top_k = topk_idx.shape
        if num_experts > MAX_EXPERTS or top_k > MAX_TOP_K:
            raise ArgumentError(
                f"the nvlink engine serves up to {MAX_EXPERTS} experts and top-{MAX_TOP_K}, got num_experts={num_experts} and "
                f"topk_idx {list(topk_idx.shape)}",
                "num_experts" if num_experts > MAX_EXPERTS else "topk_idx",
            )
        if topk_idx.device != self.device:
            raise ArgumentError(f"topk_idx must lie on {self.device}, this engine's device, got {topk_idx.device}", "topk_idx")
        idx, size = topk_idx.contiguous(), self.peers.size
        places = num_tokens * size
        parts = [size, num_experts, 1 + places, -(-places // 4)]  # the last: bools
        # One allocation and one call: at 40 us for everything, a second tensor or setting ten attributes would show.
        block = self._ints(sum(parts))
        self._comm.layout(idx.data_ptr(), num_tokens, top_k, num_experts, block.data_ptr(), self._stream())
        per_rank, per_expert, checked, bools = block.unsafe_split_with_sizes(parts)  # writes to each are counted on their own
        in_rank = bools.view(torch.bool)
        if places % 4:
            in_rank = in_rank[:places]
        in_rank = in_rank.view(num_tokens, size)
        layout = NvlinkLayout(per_rank, None, per_expert, in_rank)
        layout.checked, layout.seen = checked, seen(per_rank, per_expert, in_rank, topk_idx)
        layout.kept = per_rank, per_expert, topk_idx
        in_rank.deepep_train_layout = Known(checked, layout.seen, layout.kept)  # type: ignore[attr-defined]
        return layout

    def _known(self, layout: RankLayout, topk_idx: Tensor | None, num_experts: int) -> NvlinkLayout:
        """The layout with what its tensors alone do not say. Indices out of range, and counts that are not those of
        `is_token_in_rank` and `topk_idx`, are flagged for the exchange of counts to find: with these rows would land outside
        their tensors."""
        per_rank, per_expert, in_rank = layout.num_tokens_per_rank, layout.num_tokens_per_expert, layout.is_token_in_rank
        now = seen(per_rank, per_expert, in_rank, topk_idx)
        if isinstance(layout, NvlinkLayout) and layout.seen is not None and layout.seen == now:
            return layout
        earlier: Known | None = getattr(in_rank, "deepep_train_layout", None)
        known = NvlinkLayout(per_rank.contiguous(), layout.num_tokens_per_rdma_rank, per_expert.contiguous(), in_rank)
        if earlier is not None and earlier.seen is not None and earlier.seen == now:
            known.checked = earlier.checked
        else:
            position = in_rank.cumsum(0, dtype=torch.int32) - 1
            wrong = (in_rank.sum(0, dtype=torch.int32) != per_rank).any()
            if topk_idx is not None:
                wrong = wrong | ((topk_idx < -1) | (topk_idx >= num_experts)).any()
                wrong = wrong | (count_picks(topk_idx, num_experts) != per_expert).any()
            send_index = torch.where(in_rank, position, -1).to(torch.int32)
            known.checked = torch.cat([wrong.to(torch.int32).view(1), send_index.view(-1)])
        known.seen, known.kept = now, (per_rank, per_expert, topk_idx)
        return known

    def _ints(self, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.int32, device=self.device)

    def _stream(self) -> int:
        return torch._C._cuda_getCurrentRawStream(self.device.index)  # torch.cuda.current_stream costs 4 us

    def _sms(self, asked: int, operation: str = "dispatch") -> int:
        return min(asked or self._num_sms() or self._default_sms[operation], self._max_sms)

    # Dispatch ----------------------------------------------------------------------------------------------------------

    def dispatch(self, prepared: Prepared[DispatchRequest]) -> Received:
        self.check()
        with torch.cuda.device(self.device):
            if torch.cuda.is_current_stream_capturing() and not prepared.require().num_worst_tokens:
                # No peer waits yet, and nothing of a capture that is given up will ever run.
                raise ArgumentError(
                    "a dispatch in a CUDA graph's capture needs num_worst_tokens or a handle: without them its tensors' sizes "
                    "are counts, which the CPU waits for",
                    "num_worst_tokens",
                )
        with self._operation() as stream:
            return self._dispatch(prepared, stream)

    def _open_counts(self, prepared: Prepared[DispatchRequest], stream: int) -> Counting:
        """Give this rank's counts to the peers, or, whatever goes wrong before, word that it has none."""
        try:
            request = prepared.require()
            if request.num_experts > MAX_EXPERTS or request.alignment > _MAX_ALIGNMENT:
                raise ArgumentError(
                    f"the nvlink engine serves up to {MAX_EXPERTS} experts and alignments up to {_MAX_ALIGNMENT}, got "
                    f"num_experts={request.num_experts} and alignment={request.alignment}",
                    "num_experts" if request.num_experts > MAX_EXPERTS else "alignment",
                )
            if request.topk_idx is not None and request.topk_idx.size(1) > MAX_TOP_K:
                shape = list(request.topk_idx.shape)
                raise ArgumentError(f"the nvlink engine serves up to top-{MAX_TOP_K}, got topk_idx {shape}", "topk_idx")
            size, num_experts, is_expert = self.peers.size, request.num_experts, request.arrangement == "expert"
            layout = self._known(request.layout, request.topk_idx, num_experts)
            described = self._described(request)
            parts = [2 * (num_experts // size), size * size, size, 1, num_experts]  # as params.hpp's `results`
            results = self._ints(sum(parts))
            p = _C.CountParams()
            p.results, p.num_experts = results.data_ptr(), num_experts
            p.num_tokens_per_rank = layout.num_tokens_per_rank.data_ptr()
            p.num_tokens_per_expert = layout.num_tokens_per_expert.data_ptr()
            p.out_of_range = layout.checked.data_ptr()
            p.bound, p.alignment, p.expert_layout = request.num_worst_tokens, request.alignment, int(is_expert)
            p.signature = signature("dispatch", described)
            ticket = self._comm.count(p, stream)
        except Exception as error:
            prepared.request, prepared.error = None, error
            p = _C.CountParams()
            p.status = 1
            counts = self._wait_counts(self._comm.count(p, stream), 0, stream)
            if counts is None:  # some rank had a bound, so this is the end of the buffer: but first comes what is wrong here
                raise
            self._explain(prepared, None)
        # The GPU is at work: from here on there is time.
        self._owed = "dispatch"
        per_expert, table, send_base, received, expert_base = results.split_with_sizes(parts)
        return Counting(
            layout=layout,
            prefix_RR=table.view(size, size),
            send_base=send_base,
            received=received,
            expert_base=expert_base if is_expert else None,
            tokens_per_expert=per_expert.view(torch.int64),
            signature=p.signature,
            ticket=ticket,
        )

    def _wait_counts(self, ticket: int, num_local_experts: int, stream: int) -> Any:
        try:
            return self._comm.wait_counts(ticket, num_local_experts, stream)
        except RuntimeError as error:
            self._check_cuda(error)
            raise DeepEPError(f"dispatch on rank {self.rank}: {error}") from error

    def _dispatch(self, prepared: Prepared[DispatchRequest], stream: int) -> Received:
        counting = self._open_counts(prepared, stream)
        request, layout, ticket = prepared.require(), counting.layout, counting.ticket
        received, tokens_per_expert = counting.received, counting.tokens_per_expert
        num_experts, is_expert = request.num_experts, request.arrangement == "expert"
        num_local = num_experts // self.peers.size
        idx = None if request.topk_idx is None else request.topk_idx.contiguous()
        tables = self._place(request, layout, idx, counting.send_base, counting.expert_base, stream)

        # While the CPU would wait anyway: everything about the rows but where they go.
        d = _C.DispatchParams()
        data, scales, top_k = _aligned(request.payload.data), request.payload.scales, 0 if idx is None else idx.size(1)
        send_slot, expert_tables = tables["send_slot"], tables.get("experts", {})
        weights = None if request.topk_weights is None else request.topk_weights.contiguous()
        blocks = _blocks_of(request.payload, is_expert)
        is_in_place = blocks is None
        self._describe_rows(d, Payload(data, scales), send_slot, expert_tables.get("send_row", send_slot), request.num_sms)
        d.signature = hashed("rows", ticket, counting.signature)
        d.send_sources, d.num_local_experts, d.top_k = 1, num_local, top_k
        d.topk_idx, d.topk_weights = _address(idx), _address(weights)
        d.pick_row = _address(expert_tables.get("pick_row"))

        def parts_of(num_received: int, num_rows: int) -> Parts:
            return Parts(
                [
                    ((num_received, scales.size(1)), scales.dtype) if scales is not None and is_in_place else None,
                    None if idx is None else ((num_received, top_k), torch.int32 if is_expert else torch.int64),
                    None if weights is None else ((num_rows,) if is_expert else (num_rows, top_k), torch.float32),
                    ((num_received,), torch.int32),
                ]
            )

        counts, quickly = None, None
        num_received = num_rows = request.num_worst_tokens
        if not request.num_worst_tokens:
            with self._arena.ahead() as land:
                counts = self._wait_counts(ticket, num_local, stream)
                if counts is not None and not counts.bad:
                    num_received, num_rows = counts.num_received, counts.num_rows
                    parts = parts_of(num_received, num_rows)
                    quickly = land([((num_rows, data.size(1)), data.dtype), parts.whole])
            if counts is None or counts.bad:
                self._owed = ""  # nobody waits for them
                self.check()
                self._explain(prepared, layout.checked[0])
        else:
            parts = parts_of(num_received, num_rows)
        landings = quickly or self._arena.land([((num_rows, data.size(1)), data.dtype), parts.whole])
        rows, along = landings
        assert rows is not None and along is not None
        slot_scales = None
        if scales is not None and not is_in_place:
            slot_scales = self._arena.temporary((num_received, scales.size(1)), scales.dtype)
        offset = self._arena.offset
        offsets = [offset(rows.visible), *parts.offsets(offset(along.visible))]
        sizes = [rows.visible.nbytes, *parts.sizes]
        if slot_scales is not None:
            offsets[1], sizes[1] = offset(slot_scales), slot_scales.nbytes
        d.offsets, d.sizes = offsets, sizes
        self._comm.dispatch(d, stream)
        self._owed = ""
        self._arena.watch(landings)
        visible = [rows.visible, *parts.split(along.visible)]
        if slot_scales is not None:
            visible[1] = slot_scales
        experts: ExpertPlan | None = None
        if is_expert:
            assert visible[2] is not None
            experts = ExpertPlan(
                **expert_tables,
                rows_of=visible[2],
                row_slot=torch.full((num_rows,), -1, dtype=torch.int32, device=self.device),
                several=self._ints(num_received),
                num_several=torch.zeros(1, dtype=torch.int32, device=self.device),
                summed=self._ints(num_received),
                num_summed=torch.zeros(1, dtype=torch.int32, device=self.device),
                group_rows=tokens_per_expert,
            )
            self._arrange(experts, counting, top_k, request.num_sms, stream)
        self._expand(visible, experts, received, num_rows, top_k, request.num_sms, bool(request.num_worst_tokens), stream)
        if blocks is not None and scales is not None:
            splits = [num_rows] if counts is None or not is_expert else counts.per_expert
            assert visible[1] is not None
            scales = self._place_scales(visible[1], blocks, splits, experts, received, request.num_sms, stream)
        for landing in landings:
            if landing is not None and landing.tensor is not landing.visible:
                landing.tensor.copy_(landing.visible)
        got = [rows.tensor, *parts.split(along.tensor)] if along.tensor is not along.visible else [rows.tensor, *visible[1:]]
        if experts is not None and got[2] is not experts.rows_of:
            experts = ExpertPlan(**{**vars(experts), "rows_of": got[2]})
        if counts is not None:
            tokens_per_expert = torch.tensor(counts.per_expert, dtype=torch.int64)
        plan = NvlinkPlan(
            number=(self.peers.number << 40) + ticket,
            num_tokens=data.size(0),
            num_received=num_received,
            num_rows=num_rows,
            num_experts=num_experts,
            top_k=top_k,
            layout=request.arrangement,
            alignment=request.alignment,
            tokens_per_expert=tokens_per_expert,
            recv_topk_idx=None if is_expert else got[2],
            send_slot=send_slot,
            received=received,
            experts=experts,
            has_tail=bool(request.num_worst_tokens),
            stream=stream,
        )
        received_rows, source = got[0], got[4]
        assert received_rows is not None and source is not None
        tensors = self._handle_tensors(counting.prefix_RR, request.layout, source, send_slot)
        remember(tensors, plan, self._token)  # V1's callers may hand these back as a plain tuple
        return Received(
            payload=Payload(received_rows, got[1] if is_in_place else scales, request.payload.blocks),
            topk_idx=plan.recv_topk_idx,
            topk_weights=got[3],
            plan=plan,
            tensors=tensors,
        )

    def _described(self, request: DispatchRequest) -> dict[str, object]:
        return {"buffer": self.peers.number, "num_worst_tokens given": bool(request.num_worst_tokens)} | request.signature()

    def _place(
        self,
        request: DispatchRequest,
        layout: NvlinkLayout,
        idx: Tensor | None,
        send_base: Tensor,
        expert_base: Tensor | None,
        stream: int,
    ) -> dict[str, Any]:
        """The tables of every token's rows, made while the CPU waits for the counts."""
        num_tokens, size = request.payload.data.size(0), self.peers.size
        p = _C.PlaceParams()
        p.num_tokens, p.num_experts, p.num_ranks = num_tokens, request.num_experts, size
        send_slot = self._ints(num_tokens, size)
        p.send_base, p.send_slot = send_base.data_ptr(), send_slot.data_ptr()
        p.send_index = layout.checked.data_ptr() + layout.checked.element_size()
        tables: dict[str, Any] = {"send_slot": send_slot}
        if expert_base is not None:
            assert idx is not None
            names = ("send_row", "pull_row", "pick_row", "pick_rank")
            widths = (size, size, idx.size(1), idx.size(1))
            tables["experts"] = {n: self._ints(num_tokens, w) for n, w in zip(names, widths, strict=True)}
            for name, table in tables["experts"].items():
                setattr(p, name, table.data_ptr())
            chunk_counts = self._ints(_CHUNKS, request.num_experts)
            p.topk_idx, p.top_k = idx.data_ptr(), idx.size(1)
            p.expert_base, p.chunk_counts = expert_base.data_ptr(), chunk_counts.data_ptr()
        self._comm.place(p, stream)
        return tables

    def _describe_rows(self, d: _C.DispatchParams, payload: Payload, send_slot: Tensor, send_row: Tensor, num_sms: int) -> None:
        data, scales, _ = payload
        d.x, d.row_bytes, d.num_tokens = data.data_ptr(), data.size(1) * data.element_size(), data.size(0)
        d.send_slot, d.send_row = send_slot.data_ptr(), send_row.data_ptr()
        if scales is not None:
            d.scales, d.scale_words = scales.data_ptr(), scales.size(1)
            d.scale_row_stride, d.scale_word_stride = scales.stride(0), scales.stride(1)
        d.num_sms = self._sms(num_sms)

    def _point(self, d: _C.DispatchParams, visible: Sequence[Tensor | None]) -> None:
        """Where the peers' rows go here."""
        d.offsets = [self._arena.offset(t) for t in visible]
        d.sizes = [0 if t is None else t.nbytes for t in visible]

    def _arrange(self, experts: ExpertPlan, counting: Counting, top_k: int, num_sms: int, stream: int) -> None:
        p = _C.ArrangeParams()
        for table in ("rows_of", "row_slot", "several", "num_several", "summed", "num_summed"):
            setattr(p, table, getattr(experts, table).data_ptr())
        p.own_first = counting.send_base[self.rank :].data_ptr()
        p.num_own = counting.layout.num_tokens_per_rank[self.rank :].data_ptr()
        p.num_received, p.top_k, p.num_sms = counting.received.data_ptr(), top_k, self._sms(num_sms)
        self._comm.arrange(p, stream)

    def _expand(
        self,
        visible: Sequence[Tensor | None],
        experts: ExpertPlan | None,
        received: Tensor,
        num_rows: int,
        top_k: int,
        num_sms: int,
        has_tail: bool,
        stream: int,
    ) -> None:
        """The rows that are not sent."""
        if experts is None and not has_tail:
            return
        x, row_scales, indices, weights, _ = visible
        assert x is not None
        p = _C.ExpandParams()
        p.x, p.row_bytes, p.num_rows = x.data_ptr(), x.size(1) * x.element_size(), num_rows
        p.num_received, p.top_k, p.num_sms = received.data_ptr(), top_k, self._sms(num_sms)
        p.weights = _address(weights)
        if experts is None:
            p.indices = _address(indices)
            if row_scales is not None:
                p.scales, p.scale_words = row_scales.data_ptr(), row_scales.size(1)
        else:
            p.rows_of, p.row_slot = experts.rows_of.data_ptr(), experts.row_slot.data_ptr()
            p.several, p.num_several = experts.several.data_ptr(), experts.num_several.data_ptr()
        self._comm.expand(p, stream)

    def _place_scales(
        self,
        slot_scales: Tensor,
        blocks: ScaleBlocks,
        splits: list[int],
        experts: ExpertPlan | None,
        received: Tensor,
        num_sms: int,
        stream: int,
    ) -> Tensor:
        """The received tokens' scales [N, n] at their rows: flat blocks; or, with `_COLUMNS`, [M, n], column by column in
        memory."""
        num_rows, num_words = sum(splits), slot_scales.size(1)
        if blocks is _COLUMNS:
            splits = [num_rows]
        flat = torch.empty(blocks.size(splits, num_words), dtype=slot_scales.dtype, device=self.device)
        p = _C.ScalesParams()
        p.scales, p.num_words, p.num_rows = flat.data_ptr(), flat.numel(), num_rows
        p.slot_scales, p.scale_words, p.num_received = slot_scales.data_ptr(), num_words, received.data_ptr()
        p.multiple, p.tokens_innermost, p.padding_word = blocks.multiple, int(blocks.tokens_innermost), blocks.padding_word
        if experts is not None:
            p.row_slot = experts.row_slot.data_ptr()
            if blocks is not _COLUMNS:
                p.group_rows, p.num_groups = experts.group_rows.data_ptr(), len(splits)
        p.num_sms = self._sms(num_sms)
        self._comm.scales(p, stream)
        return flat.view(blocks.shape(num_rows, num_words)).t()[:num_rows] if blocks is _COLUMNS else flat

    def redispatch(self, prepared: Prepared[RedispatchRequest]) -> Payload:
        self.check()
        with self._operation() as stream:
            self._owed = "dispatch"
            request = prepared.require()
            plan = self._plan_for(request.plan, stream)
            data, scales = _aligned(request.payload.data), request.payload.scales
            wanted: list[Any] = [((plan.num_rows, data.size(1)), data.dtype), None, None, None, None]
            blocks = _blocks_of(request.payload, plan.experts is not None)
            if scales is not None and blocks is None:
                wanted[1] = ((plan.num_rows, scales.size(1)), scales.dtype)
            landings = self._arena.land(wanted)
            visible = [None if one is None else one.visible for one in landings]
            if scales is not None and blocks is not None:
                visible[1] = self._arena.temporary((plan.num_received, scales.size(1)), scales.dtype)
            d = _C.DispatchParams()
            send_row = plan.send_slot if plan.experts is None else plan.experts.send_row
            self._describe_rows(d, Payload(data, scales), plan.send_slot, send_row, request.num_sms)
            self._point(d, visible)
            d.signature = signature("cached rows", {"number": plan.number} | request.signature())
            self._comm.dispatch(d, stream)
            self._owed = ""
            self._arena.watch(landings)
            self._expand(
                visible, plan.experts, plan.received, plan.num_rows, plan.top_k, request.num_sms, plan.has_tail, stream
            )
            if visible[1] is not None and blocks is not None:
                is_grouped = plan.experts is not None and blocks is not _COLUMNS
                splits = plan.tokens_per_expert.tolist() if is_grouped else [plan.num_rows]
                scales = self._place_scales(visible[1], blocks, splits, plan.experts, plan.received, request.num_sms, stream)
            for landing in landings:
                if landing is not None and landing.tensor is not landing.visible:
                    landing.tensor.copy_(landing.visible)
            got = [None if one is None else one.tensor for one in landings]
            assert got[0] is not None
            return Payload(got[0], got[1] if blocks is None else scales, request.payload.blocks)

    # Combine -----------------------------------------------------------------------------------------------------------

    def combine(self, prepared: Prepared[CombineRequest]) -> tuple[Tensor, Tensor | None]:
        self.check()
        with self._operation() as stream:
            self._owed = "combine"
            request = prepared.require()
            plan = self._plan_for(request.plan, stream)
            rows, weights = _aligned(request.rows), request.weights
            experts = plan.experts
            row_bytes = rows.size(1) * rows.element_size()
            is_visible = self._arena.holds(rows) or not rows.numel()
            partials = None
            if experts is not None:
                partials = self._arena.temporary((plan.num_received, rows.size(1)), rows.dtype)
                r = _C.ReduceParams()
                r.y, r.partials, r.rows_of = rows.data_ptr(), partials.data_ptr(), experts.rows_of.data_ptr()
                if is_visible:  # single rows are pulled from where they are
                    r.tokens, r.num_tokens = experts.several.data_ptr(), experts.num_several.data_ptr()
                else:  # this rank's own alone are
                    r.tokens, r.num_tokens = experts.summed.data_ptr(), experts.num_summed.data_ptr()
                r.row_bytes, r.top_k, r.dtype = row_bytes, plan.top_k, _DTYPES[rows.dtype]
                r.num_sms = self._sms(request.num_sms, "combine")
                self._comm.reduce(r, stream)
            source = rows
            if not is_visible:
                source = self._arena.temporary(rows.shape, rows.dtype).copy_(rows) if partials is None else partials
            if weights is not None:
                weights = weights.contiguous()
                if not self._arena.holds(weights) and weights.numel():
                    weights = self._arena.temporary(weights.shape, weights.dtype).copy_(weights)
            bias = [_aligned(b) for b in request.bias]
            out = torch.empty(plan.num_tokens, rows.size(1), dtype=rows.dtype, device=self.device)
            out_weights = None
            p = _C.CombineParams()
            if weights is not None:
                width = plan.top_k if experts is not None else weights.size(1)
                out_weights = torch.empty(plan.num_tokens, width, dtype=torch.float32, device=self.device)
                p.out_weights, p.top_k = out_weights.data_ptr(), width
                if experts is not None:
                    p.pick_row, p.pick_rank = experts.pick_row.data_ptr(), experts.pick_rank.data_ptr()
            p.y, p.out, p.row_bytes, p.num_tokens = rows.data_ptr(), out.data_ptr(), row_bytes, plan.num_tokens
            p.bias_0 = bias[0].data_ptr() if bias else 0
            p.bias_1 = bias[1].data_ptr() if len(bias) > 1 else 0
            p.send_slot = plan.send_slot.data_ptr()
            p.pull_row = (plan.send_slot if experts is None else experts.pull_row).data_ptr()
            offset = self._arena.offset
            all_summed = int(partials is not None and not is_visible)
            p.offsets = [offset(source), offset(partials), all_summed, offset(weights), 0]
            p.signature = signature("combine", {"number": plan.number} | request.signature())
            p.dtype, p.num_sms = _DTYPES[rows.dtype], self._sms(request.num_sms, "combine")
            self._comm.combine(p, stream)
            self._owed = ""
            return out, out_weights

    # Handles and life --------------------------------------------------------------------------------------------------

    def _handle_tensors(self, prefix_RR: Tensor, layout: RankLayout, source: Tensor, send_slot: Tensor) -> tuple[Tensor, ...]:
        """DeepEP V1's six tensors; V1's channels are one here."""
        sent_R1 = layout.num_tokens_per_rank.unsqueeze(1)
        return prefix_RR, sent_R1, self._no_offset_R1, source, layout.is_token_in_rank, send_slot

    def plan_of(self, tensors: tuple[Tensor, ...]) -> Plan:
        if (plan := remembered(tensors, self._token)) is not None:
            return plan
        # Copies, or written to: no kernel may run on what they say before somebody has looked.
        prefix_RR, _, _, source, _, send_slot = tensors
        if send_slot.device != self.device:
            raise ArgumentError(f"handle must lie on {self.device}, this engine's device, got {send_slot.device}", "handle")
        if torch.cuda.is_current_stream_capturing():
            raise ArgumentError(
                "handle: tensors that are not those that dispatch returned are checked by the CPU, which cannot be done in a "
                "CUDA graph's capture",
                "handle",
            )
        prefix = checked_prefix(tensors, self.rank, is_slot=True)
        return NvlinkPlan(
            number=hashed("copied handle", *prefix.flatten().tolist()),
            num_tokens=send_slot.size(0),
            num_received=source.size(0),
            num_rows=source.size(0),
            num_experts=0,
            top_k=0,
            layout="rank",
            alignment=1,
            tokens_per_expert=torch.empty(0, dtype=torch.int64),
            recv_topk_idx=None,
            send_slot=send_slot.contiguous(),
            received=prefix_RR[-1, self.rank].reshape(1),
            experts=None,
            has_tail=True,  # it may: nobody knows any more
            stream=None,
        )

    def _explain(self, prepared: Prepared[DispatchRequest], out_of_range: Tensor | None) -> NoReturn:
        """Some rank's arguments are wrong or differ: exchange texts, raise the same everywhere."""
        if prepared.error is None and out_of_range is not None and out_of_range.item():
            request = prepared.request
            assert request is not None
            prepared.error = layout_error(request)
        fields = {} if prepared.request is None else self._described(prepared.request)
        self.peers.raise_disagreement("dispatch", {"operation": "dispatch"} | fields, prepared.error)
        raise DeepEPError("dispatch: the ranks disagree, but not on anything that can be told")

    def check(self) -> None:
        self.peers.check()
        if not self._comm.is_well():
            raise device_error(self._comm.failure(), self.rank, self.peers.timeout, self._processes)
        self._check_cuda()
        self.low_latency.check()

    def _check_cuda(self, error: BaseException | None = None) -> None:
        """Raise if CUDA has failed for good."""
        if text := self._comm.cuda_error(self._stream()):
            raise cuda_failed(text, self.rank, self._processes) from error

    def destroy(self) -> None:
        with self._lock:
            try:
                self.low_latency.close()
                self._comm.close(self._arena.was_captured)
            except RuntimeError as error:
                self._check_cuda(error)
                raise
            finally:
                del self._arena, self.low_latency


def _blocks_of(payload: Payload, is_expert: bool) -> ScaleBlocks | None:
    """How scales are put in place after they came; None: they come by rows and stay so, or there are none."""
    if payload.scales is None:
        return None
    return payload.blocks or (_COLUMNS if is_expert else None)


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _aligned(t: Tensor) -> Tensor:
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()
