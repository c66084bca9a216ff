"""The engine of one NVLink domain: kernels that store every row once, straight into its final place in a peer's memory.

docs/kernels.md explains the protocol; csrc/nvlink holds the kernels, csrc/nvlink/params.hpp the names used here. A call's time
is the CPU's as often as the GPU's: what peers wait for is launched first, and tensors that only the caller needs are made last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from deepep_train import _C  # type: ignore[attr-defined]
from deepep_train.engines.arena import Landing
from deepep_train.engines.base import (
    MAX_ALIGNMENT,
    MAX_EXPERTS,
    MAX_TOP_K,
    CombineRequest,
    DispatchRequest,
    Payload,
    Prepared,
    Received,
    RedispatchRequest,
    address_of,
    aligned,
    need_rows_of,
)
from deepep_train.engines.nvlink_copies import plan_of_copies
from deepep_train.engines.nvlink_domain import NvlinkDomain
from deepep_train.engines.nvlink_failures import layout_error
from deepep_train.engines.nvlink_tables import (
    Kinds,
    Known,
    NvlinkPlan,
    checked_of,
    parts_of,
    remember,
    remembered,
    seen,
    words_at,
    words_of,
)
from deepep_train.engines.peers import Peers
from deepep_train.engines.signature import hashed, numbered
from deepep_train.engines.v1_handle import channels
from deepep_train.errors import ArgumentError, DeepEPError
from deepep_train.handle import LAYOUTS, Plan
from deepep_train.routing import RankLayout
from deepep_train.scale_blocks import ScaleBlocks

_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
# How long counts are waited for within the arena's pool: while one is in use, torch frees nothing of what it caches, for no
# thread. So it is short, and no other thread of Python's runs in it.
_AHEAD_US = 50.0
# What scales get that asked for no blocks, in expert layout: one group, column by column, given as [M, n].
_COLUMNS = ScaleBlocks(True, 4, 0)


class _Fresh(NamedTuple):
    """A dispatch with fresh routing, once its exchange of counts is under way.

    Attributes:
        block: int32, where `tables` lie.
        layout, checked: the request's, see `Known`; None if the tables hold them.
        topk_idx: the request's, contiguous.
    """

    request: DispatchRequest
    block: Tensor
    tables: Any
    layout: RankLayout | None
    checked: Tensor | None
    topk_idx: Tensor | None
    signature: int
    ticket: int


class NvlinkEngine(NvlinkDomain):
    """See the module; the arguments are `NvlinkDomain`'s."""

    def __init__(self, peers: Peers, arena_bytes: int, num_sms: Callable[[], int], name: str = "nvlink") -> None:
        super().__init__(peers, arena_bytes, num_sms, name)
        self._token = object()  # of this engine, for what travels with tensors
        self._no_offset = {layout: channels(self.peers.size, layout, self.device) for layout in LAYOUTS}

    # Checks ------------------------------------------------------------------------------------------------------------

    def check_payload(self, payload: Payload, argument: str = "x") -> None:
        need_rows_of(payload, argument, self.device, _DTYPES, "nvlink")
        data = payload.data
        if data.shape[1] * data.element_size() % 16:
            raise ArgumentError(
                f"{argument} must have rows of a multiple of 16 bytes on the nvlink engine, got {data.size(1)} elements of "
                f"{data.element_size()}; engine='collective' serves any",
                argument,
            )
        if payload.scales is not None and payload.scales.element_size() != 4:
            raise ArgumentError(
                f"{argument}[1] must be float32 or int32 on the nvlink engine, got {payload.scales.dtype}", f"{argument}[1]"
            )

    def layout(self, topk_idx: Tensor, num_experts: int) -> RankLayout:
        num_tokens, top_k = topk_idx.shape
        _need_routing(num_experts, topk_idx)
        if topk_idx.device != self.device:
            raise ArgumentError(f"topk_idx must lie on {self.device}, this engine's device, got {topk_idx.device}", "topk_idx")
        idx, size = topk_idx.contiguous(), self.peers.size
        places = num_tokens * size
        parts = [size, num_experts, 1 + places, -(-places // 4)]  # the last: bools
        # One allocation and one call: at 40 us for everything, a second tensor or setting ten attributes would show.
        block = self._ints(sum(parts))
        self._comm.layout(idx.data_ptr(), num_tokens, top_k, num_experts, size, block.data_ptr(), self._stream())
        per_rank, per_expert, checked, bools = block.unsafe_split_with_sizes(parts)  # writes to each are counted on their own
        in_rank = bools.view(torch.bool)
        if places % 4:
            in_rank = in_rank[:places]
        in_rank = in_rank.view(num_tokens, size)
        marks = seen(per_rank, per_expert, in_rank, topk_idx)
        in_rank.deepep_train_layout = Known(checked, marks, (per_rank, per_expert, topk_idx))  # type: ignore[attr-defined]
        return RankLayout(per_rank, None, per_expert, in_rank)

    def _ints(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.int32, device=self.device)

    # Dispatch ----------------------------------------------------------------------------------------------------------

    def dispatch(self, prepared: Prepared[DispatchRequest]) -> Received:
        with self._here():
            if torch.cuda.is_current_stream_capturing() and not prepared.require().num_worst_tokens:
                # No peer waits yet, and nothing of a capture that is given up will ever run.
                raise ArgumentError(
                    "a dispatch in a CUDA graph's capture needs num_worst_tokens or a handle: without them its tensors' sizes "
                    "are counts, which the CPU waits for",
                    "num_worst_tokens",
                )
        with self._operation() as stream:
            return self._dispatch(prepared, stream)

    def _open_counts(self, prepared: Prepared[DispatchRequest], stream: int) -> _Fresh:
        """Give this rank's counts to the peers, or, whatever goes wrong before, word that it has none."""
        try:
            request = prepared.require()
            idx, num_experts = request.topk_idx, request.num_experts
            _need_routing(num_experts, idx, request.alignment)
            layout, checked = request.layout, None
            if layout is not None:
                checked = checked_of(layout, idx, num_experts)
                layout = layout._replace(
                    num_tokens_per_rank=layout.num_tokens_per_rank.contiguous(),
                    num_tokens_per_expert=layout.num_tokens_per_expert.contiguous(),
                )
            idx = None if idx is None else idx.contiguous()
            top_k, is_expert = 0 if idx is None else idx.shape[1], request.arrangement == "expert"
            num_tokens = request.payload.data.shape[0]
            tables = _C.Tables(num_tokens, top_k, num_experts, self.peers.size, is_expert, layout is None)
            block = self._ints(tables.words)
            tables.lay_out(block.data_ptr())
            if layout is not None and checked is not None:
                tables.num_tokens_per_rank = layout.num_tokens_per_rank.data_ptr()
                tables.num_tokens_per_expert = layout.num_tokens_per_expert.data_ptr()
                tables.checked = checked.data_ptr()
            bound = request.num_worst_tokens
            signature = hashed("dispatch", self.peers.number, bound > 0, request.agreement())
            ticket = self._comm.route(tables, address_of(idx), request.alignment, bound, signature, stream)
        except Exception as error:
            if self._is_capturing:  # as `dispatch` does before: no peer waits yet, and no CPU may
                raise
            prepared.request, prepared.error = None, error
            counts = self._wait_counts(self._comm.route_nothing(stream), 0, stream)
            if counts is None:  # some rank had a bound, so this is the end of the buffer: but first comes what is wrong here
                raise
            self._explain(prepared, None)
        self._owed = "dispatch"
        return _Fresh(request, block, tables, layout, checked, idx, signature, ticket)

    def _wait_counts(self, ticket: int, num_local_experts: int, stream: int) -> Any:
        try:
            self._comm.wait_counts(ticket, stream)
        except RuntimeError as error:
            self._check_cuda(error)
            raise DeepEPError(f"dispatch on rank {self.rank}: {error}") from error
        return self._comm.counts(num_local_experts)

    def _dispatch(self, prepared: Prepared[DispatchRequest], stream: int) -> Received:
        fresh = self._open_counts(prepared, stream)
        # The GPU is at work. While the CPU would wait anyway: everything about the rows but where they go.
        request, _, tables, _, _, idx, signature, ticket = fresh
        is_expert, num_local = request.arrangement == "expert", request.num_experts // self.peers.size
        data, scales, blocks = aligned(request.payload.data), request.payload.scales, _blocks_of(request.payload, is_expert)
        weights = None if request.topk_weights is None else request.topk_weights.contiguous()
        hidden, top_k = data.shape[1], 0 if idx is None else idx.shape[1]
        num_sms = self._sms(request.num_sms)
        d = self._rows(data, scales, tables, num_sms)
        d.signature = numbered(signature, ticket)
        d.send_sources, d.num_local_experts, d.top_k = 1, num_local, top_k
        d.topk_idx, d.topk_weights, d.pick_row = address_of(idx), address_of(weights), tables.pick_row
        kinds: Kinds = [
            None if scales is None or blocks is not None else (scales.dtype, scales.shape[1]),
            None if idx is None else (torch.int32 if is_expert else torch.int64, top_k),
            None if weights is None else (torch.float32, 0 if is_expert else top_k),
            (torch.int32, 0),
        ]
        beside = _C.Beside(words_of(kinds), is_expert)

        def wanted(num_received: int, num_rows: int) -> list[Any]:
            return [((num_rows, hidden), data.dtype), ((beside.measure(num_received, num_rows),), torch.int32)]

        def launch(landings: list[Landing | None], *slot_scales: int) -> None:
            rows, along = landings
            assert rows is not None and along is not None
            offset = self._arena.offset
            beside.place(d, offset(rows.visible), rows.visible.nbytes, offset(along.visible), *slot_scales)
            self._comm.dispatch(d, stream)
            self._owed = ""

        counts, landings, slot_scales = None, None, None
        num_received = num_rows = request.num_worst_tokens
        if not request.num_worst_tokens:
            with self._arena.ahead():
                came = self._comm.counts_come(ticket, _AHEAD_US)
                if came:
                    counts = self._comm.counts(num_local)
                if counts is not None and not counts.bad:
                    num_received, num_rows = counts.num_received, counts.num_rows
                    landings = self._arena.land_quickly(wanted(num_received, num_rows))
                    if landings is not None and blocks is None:
                        launch(landings)
            if not came:
                counts = self._wait_counts(ticket, num_local, stream)
            if counts is None or counts.bad:
                self._owed = ""  # nobody waits for them
                self.check()
                self._explain(prepared, fresh)
            num_received, num_rows = counts.num_received, counts.num_rows
        if landings is None or blocks is not None:
            landings = landings or self._arena.land(wanted(num_received, num_rows))
            if scales is not None and blocks is not None:
                slot_scales = self._arena.temporary((num_received, scales.shape[1]), scales.dtype)
                launch(landings, self._arena.offset(slot_scales), slot_scales.nbytes)
            else:
                launch(landings)
        # The rows are on their way; the rest is this rank's own business.
        return self._receive(fresh, counts, num_received, landings, beside, kinds, slot_scales, num_sms, stream)

    def _receive(
        self,
        fresh: _Fresh,
        counts: Any,
        num_received: int,
        landings: list[Landing | None],
        beside: _C.Beside,
        kinds: Kinds,
        slot_scales: Tensor | None,
        num_sms: int,
        stream: int,
    ) -> Received:
        """What a dispatch gives whose rows are coming. `counts`: None with `num_worst_tokens`; `slot_scales`: where scales come
        that are then put into blocks, or columns."""
        request, block, tables, _, _, idx, _, ticket = fresh
        is_expert, num_experts = request.arrangement == "expert", request.num_experts
        (rows, along), top_k, has_tail = landings, 0 if idx is None else idx.shape[1], counts is None
        assert rows is not None and along is not None
        num_rows = rows.visible.shape[0]
        visible = [rows.visible, *parts_of(along.visible, beside, kinds)]
        if slot_scales is not None:
            visible[1] = slot_scales
        kept: tuple[Tensor, ...] = (block,)
        if is_expert:
            lists = self._ints(num_rows + 2 * num_received)
            tables.rows_of, tables.row_slot = address_of(visible[2]), lists.data_ptr()
            tables.several = tables.row_slot + 4 * num_rows
            tables.summed = tables.several + 4 * num_received
            kept = block, lists, along.tensor
            self._comm.arrange(tables, num_rows, num_sms, stream)
        if is_expert or has_tail:
            self._expand(visible, tables, is_expert, top_k, num_sms, stream)
        if counts is None:
            num_local = num_experts // self.peers.size
            tokens_per_expert = words_at(block.view(torch.int64), tables.tokens_per_expert, 1, num_local)[0]
        else:
            tokens_per_expert = torch.frombuffer(counts.per_expert, dtype=torch.int64)
        scales = None
        if slot_scales is not None:
            blocks = _blocks_of(request.payload, is_expert)
            assert blocks is not None
            splits = tokens_per_expert.tolist() if is_expert and counts is not None else [num_rows]
            scales = self._place_scales(slot_scales, blocks, splits, tables, is_expert, num_sms, stream)
        self._arrive(landings)
        if along.tensor is not along.visible:
            visible[1:] = parts_of(along.tensor, beside, kinds)
            tables.rows_of = address_of(visible[2])
        _, row_scales, picks, row_weights, source = visible
        assert source is not None
        plan = NvlinkPlan(
            number=(self.peers.number << 40) + ticket,
            num_tokens=request.payload.data.shape[0],
            num_received=num_received,
            num_rows=num_rows,
            num_experts=num_experts,
            top_k=top_k,
            layout=request.arrangement,
            alignment=request.alignment,
            tokens_per_expert=tokens_per_expert,
            recv_topk_idx=None if is_expert else picks,
            tables=tables,
            kept=kept,
            has_tail=has_tail,
            stream=stream,
            as_made=seen(block),
        )
        tensors = self._handle_tensors(fresh, source)
        remember(tensors, plan, self._token)  # V1's callers may hand these back as a plain tuple
        payload = Payload(rows.tensor, row_scales if scales is None else scales, request.payload.blocks)
        return Received(payload, plan.recv_topk_idx, row_weights, plan, tensors)

    def _rows(self, data: Tensor, scales: Tensor | None, tables: Any, num_sms: int) -> _C.DispatchParams:
        """What a dispatch of these rows is, but where they go."""
        d = _C.DispatchParams()
        num_tokens, hidden = data.shape
        d.x, d.row_bytes, d.num_tokens = data.data_ptr(), hidden * data.element_size(), num_tokens
        d.send_slot, d.send_row = tables.send_slot, tables.send_row
        if scales is not None:
            d.scales, d.scale_words = scales.data_ptr(), scales.shape[1]
            d.scale_row_stride, d.scale_word_stride = scales.stride()
        d.num_sms = num_sms
        return d

    def _arrive(self, landings: Sequence[Landing | None]) -> None:
        """What could only land in staging goes on from there."""
        self._arena.watch(landings)
        for landing in landings:
            if landing is not None and landing.tensor is not landing.visible:
                landing.tensor.copy_(landing.visible)

    def _expand(
        self, visible: Sequence[Tensor | None], tables: Any, is_expert: bool, top_k: int, num_sms: int, stream: int
    ) -> None:
        """The rows that are not sent."""
        x, row_scales, indices, weights, _ = visible
        assert x is not None
        p = _C.ExpandParams()
        p.num_rows, hidden = x.shape
        p.x, p.row_bytes = x.data_ptr(), hidden * x.element_size()
        p.num_received, p.top_k, p.num_sms = tables.num_received, top_k, num_sms
        p.weights = address_of(weights)
        if is_expert:
            p.rows_of, p.row_slot = tables.rows_of, tables.row_slot
            p.several, p.num_several = tables.several, tables.num_several
        else:
            p.indices = address_of(indices)
            if row_scales is not None:
                p.scales, p.scale_words = row_scales.data_ptr(), row_scales.shape[1]
        self._comm.expand(p, stream)

    def _place_scales(
        self,
        slot_scales: Tensor,
        blocks: ScaleBlocks,
        splits: list[int],
        tables: Any,
        is_expert: bool,
        num_sms: int,
        stream: int,
    ) -> Tensor:
        """The received tokens' scales [N, n] at their rows: flat blocks; or, with `_COLUMNS`, [M, n], column by column in
        memory."""
        num_rows, num_words = sum(splits), slot_scales.shape[1]
        if blocks is _COLUMNS:
            splits = [num_rows]
        flat = torch.empty(blocks.size(splits, num_words), dtype=slot_scales.dtype, device=self.device)
        p = _C.ScalesParams()
        p.scales, p.num_words, p.num_rows = flat.data_ptr(), flat.numel(), num_rows
        p.slot_scales, p.scale_words, p.num_received = slot_scales.data_ptr(), num_words, tables.num_received
        p.multiple, p.tokens_innermost, p.padding_word = blocks.multiple, int(blocks.tokens_innermost), blocks.padding_word
        if is_expert:
            p.row_slot = tables.row_slot
            if blocks is not _COLUMNS:
                p.group_rows, p.num_groups = tables.tokens_per_expert, len(splits)
        p.num_sms = num_sms
        self._comm.scales(p, stream)
        return flat.view(blocks.shape(num_rows, num_words)).t()[:num_rows] if blocks is _COLUMNS else flat

    def redispatch(self, prepared: Prepared[RedispatchRequest]) -> Payload:
        with self._operation() as stream:
            self._owed = "dispatch"
            request = prepared.require()
            plan = self._plan_for(request.plan, stream)
            tables, is_expert, num_sms = plan.tables, plan.layout == "expert", self._sms(request.num_sms)
            data, scales, blocks = (
                aligned(request.payload.data),
                request.payload.scales,
                _blocks_of(request.payload, is_expert),
            )
            wanted: list[Any] = [((plan.num_rows, data.shape[1]), data.dtype), None]
            if scales is not None and blocks is None:
                wanted[1] = ((plan.num_rows, scales.shape[1]), scales.dtype)
            landings = self._arena.land(wanted)
            rows, row_scales = (None if one is None else one.visible for one in landings)
            if scales is not None and blocks is not None:
                row_scales = self._arena.temporary((plan.num_received, scales.shape[1]), scales.dtype)
            assert rows is not None
            d = self._rows(data, scales, tables, num_sms)
            offset = self._arena.offset
            d.offsets = [offset(rows), offset(row_scales), 0, 0, 0]
            d.sizes = [rows.nbytes, 0 if row_scales is None else row_scales.nbytes, 0, 0, 0]
            d.signature = numbered(hashed("cached rows", request.agreement()), plan.number)
            self._comm.dispatch(d, stream)
            self._owed = ""
            if is_expert or plan.has_tail:
                self._expand([rows, row_scales, None, None, None], tables, is_expert, plan.top_k, num_sms, stream)
            if row_scales is not None and blocks is not None:
                is_grouped = is_expert and blocks is not _COLUMNS
                splits = plan.tokens_per_expert.tolist() if is_grouped else [plan.num_rows]
                scales = self._place_scales(row_scales, blocks, splits, tables, is_expert, num_sms, stream)
            self._arrive(landings)
            got, got_scales = (None if one is None else one.tensor for one in landings)
            assert got is not None
            return Payload(got, got_scales if blocks is None else scales, request.payload.blocks)

    # Combine -----------------------------------------------------------------------------------------------------------

    def combine(self, prepared: Prepared[CombineRequest]) -> tuple[Tensor, Tensor | None]:
        with self._operation() as stream:
            self._owed = "combine"
            request = prepared.require()
            plan = self._plan_for(request.plan, stream)
            tables, is_expert = plan.tables, plan.layout == "expert"
            rows, weights = aligned(request.rows), request.weights
            hidden, num_sms = rows.shape[1], self._sms(request.num_sms, "combine")
            row_bytes, dtype = hidden * rows.element_size(), _DTYPES[rows.dtype]
            is_visible = self._arena.holds(rows) or not rows.numel()
            partials = None
            if is_expert:
                partials = self._arena.temporary((plan.num_received, hidden), rows.dtype)
                r = _C.ReduceParams()
                r.y, r.partials, r.rows_of = rows.data_ptr(), partials.data_ptr(), tables.rows_of
                if is_visible:  # single rows are pulled from where they are
                    r.tokens, r.num_tokens = tables.several, tables.num_several
                else:  # this rank's own alone are
                    r.tokens, r.num_tokens = tables.summed, tables.num_summed
                r.row_bytes, r.top_k, r.dtype, r.num_sms = row_bytes, plan.top_k, dtype, num_sms
                self._comm.reduce(r, stream)
            source = rows
            if not is_visible:
                source = self._arena.temporary(rows.shape, rows.dtype).copy_(rows) if partials is None else partials
            p = _C.CombineParams()
            out_weights = None
            if weights is not None:
                weights = weights.contiguous()
                if not self._arena.holds(weights) and weights.numel():
                    weights = self._arena.temporary(weights.shape, weights.dtype).copy_(weights)
                width = plan.top_k if is_expert else weights.shape[1]
                out_weights = torch.empty((plan.num_tokens, width), dtype=torch.float32, device=self.device)
                p.out_weights, p.top_k = out_weights.data_ptr(), width
                p.pick_row, p.pick_rank = tables.pick_row, tables.pick_rank
            if request.bias:
                bias = [aligned(b) for b in request.bias]
                p.bias_0, p.bias_1 = bias[0].data_ptr(), bias[1].data_ptr() if len(bias) > 1 else 0
            out = torch.empty((plan.num_tokens, hidden), dtype=rows.dtype, device=self.device)
            p.y, p.out, p.row_bytes, p.num_tokens = rows.data_ptr(), out.data_ptr(), row_bytes, plan.num_tokens
            p.send_slot, p.pull_row = tables.send_slot, tables.pull_row
            offset = self._arena.offset
            all_summed = int(partials is not None and not is_visible)
            p.offsets = [offset(source), offset(partials), all_summed, offset(weights), 0]
            p.signature = numbered(hashed("combine", request.agreement()), plan.number)
            p.dtype, p.num_sms = dtype, num_sms
            self._comm.combine(p, stream)
            self._owed = ""
            return out, out_weights

    # Handles -----------------------------------------------------------------------------------------------------------

    def _plan_for(self, plan: Plan, stream: int) -> NvlinkPlan:
        """A handle may die as soon as a call that uses it returns, on whatever stream: its tables must not."""
        assert isinstance(plan, NvlinkPlan)
        if plan.as_made is not None and plan.as_made != seen(plan.kept[0]):
            raise ArgumentError("handle: its tensors have been written to since dispatch returned them", "handle")
        # In expert layout the weights, which are the caller's, share their memory with a table.
        if plan.addresses() != plan.kept_at:
            raise ArgumentError("handle: the memory of what dispatch returned has been freed (resize_)", "handle")
        if self._is_capturing:
            self._arena.keep(plan)
        elif plan.stream != stream:  # None, of a handle rebuilt from copies: nobody knows
            current = torch.cuda.current_stream(self.device)
            for memory in plan.kept:
                memory.record_stream(current)
        return plan

    def _handle_tensors(self, fresh: _Fresh, source: Tensor) -> tuple[Tensor, ...]:
        """DeepEP V1's six tensors."""
        request, block, tables, layout, *_ = fresh
        size, num_tokens = self.peers.size, request.payload.data.shape[0]
        prefix_RR = words_at(block, tables.rank_prefix_matrix, size, size)
        send_slot = words_at(block, tables.send_slot, num_tokens, size)
        if layout is not None:
            sent_R1, in_rank = layout.num_tokens_per_rank.unsqueeze(1), layout.is_token_in_rank
        else:
            sent_R1 = words_at(block, tables.num_tokens_per_rank, size, 1)
            in_rank = words_at(block.view(torch.bool), tables.is_token_in_rank, num_tokens, size)
        return prefix_RR, sent_R1, self._no_offset[request.arrangement], source, in_rank, send_slot

    def plan_of(self, tensors: tuple[Tensor, ...]) -> Plan:
        if (plan := remembered(tensors, self._token)) is not None:
            return plan
        if torch.cuda.is_current_stream_capturing():
            raise ArgumentError(
                "handle: tensors that are not those that dispatch returned are checked by the CPU, which cannot be done in a "
                "CUDA graph's capture",
                "handle",
            )
        return plan_of_copies(tensors, self.rank, self.peers.size, self.device)

    def _explain(self, prepared: Prepared[DispatchRequest], fresh: _Fresh | None) -> NoReturn:
        """Some rank's arguments are wrong or differ: exchange texts, raise the same everywhere."""
        request = prepared.request
        fields: dict[str, object] = {}
        if request is not None and fresh is not None:
            checked = words_at(fresh.block, fresh.tables.checked, 1, 1) if fresh.checked is None else fresh.checked
            if checked.flatten()[0].item():
                prepared.error = layout_error(request)
            fields = {"buffer": self.peers.number, "num_worst_tokens given": bool(request.num_worst_tokens)}
            fields |= request.signature()
        self.peers.raise_disagreement("dispatch", {"operation": "dispatch"} | fields, prepared.error)
        raise DeepEPError("dispatch: the ranks disagree, but not on anything that can be told")


def _need_routing(num_experts: int, topk_idx: Tensor | None, alignment: int = 1) -> None:
    if num_experts > MAX_EXPERTS or alignment > MAX_ALIGNMENT:
        raise ArgumentError(
            f"the nvlink engine serves up to {MAX_EXPERTS} experts and alignments up to {MAX_ALIGNMENT}, got "
            f"num_experts={num_experts} and alignment={alignment}; engine='collective' serves more",
            "num_experts" if num_experts > MAX_EXPERTS else "alignment",
        )
    if topk_idx is not None and topk_idx.shape[1] > MAX_TOP_K:
        shape = list(topk_idx.shape)
        text = f"the nvlink engine serves up to top-{MAX_TOP_K}, got topk_idx {shape}; engine='collective' serves more"
        raise ArgumentError(text, "topk_idx")


def _blocks_of(payload: Payload, is_expert: bool) -> ScaleBlocks | None:
    """How scales are put in place after they came; None: they come by rows and stay so, or there are none."""
    if payload.scales is None:
        return None
    return payload.blocks or (_COLUMNS if is_expert else None)
