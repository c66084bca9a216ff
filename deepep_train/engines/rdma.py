"""The engine of several nodes whose GPUs reach each other through NVSHMEM: the collective engine's layouts and handles, and
counts, tables and rows that travel through kernels (rails.py, rail_fresh.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

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
    Request,
    need_own_device,
    need_rows_of,
    wrong_counts,
)
from deepep_train.engines.collective import CollectiveEngine, CollectivePlan, plain
from deepep_train.engines.hops import Hop, Route, to_device
from deepep_train.engines.nvlink_failures import layout_error
from deepep_train.engines.nvlink_tables import remember
from deepep_train.engines.rail_domain import BEHIND_WORDS
from deepep_train.engines.rail_fresh import Found, Fresh, Sizes, Told, Words, move_weights
from deepep_train.engines.rail_route import Known, RailRoute
from deepep_train.engines.rail_rows import counts_bytes, padded, words_bytes
from deepep_train.engines.rails import DTYPES, Crossed, Rails
from deepep_train.engines.signature import hashed, numbered
from deepep_train.engines.two_level import Forwarding, two_level
from deepep_train.engines.v1_handle import channels
from deepep_train.errors import ArgumentError, DeepEPError
from deepep_train.handle import LAYOUTS
from deepep_train.routing import RankLayout, count_picks, tokens_per_node

_MOST_SCALES = 8192  # bytes a row, which with a piece of the row must fit several times into a block's shared memory
CachedT = TypeVar("CachedT", RedispatchRequest, CombineRequest)


class RdmaEngine(CollectiveEngine):
    """See the module.

    Args:
        group, timeout, num_local_ranks, number: as for the collective engine, which always forwards here.
        arena_bytes: memory that the ranks of a node can reach; received tensors live in it.
        rail_bytes: memory that the rail can reach.
        num_qps: queue pairs.
        num_sms: gives the SMs that a call may occupy; 0: what the links need.
    """

    name = "rdma"
    checks_layout = True

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        timeout: float,
        num_local_ranks: int,
        number: int,
        arena_bytes: int,
        rail_bytes: int,
        num_qps: int,
        num_sms: Callable[[], int],
    ) -> None:
        super().__init__(group, timeout, num_local_ranks, True, number)
        rail_bytes = max(rail_bytes, 4 * self.num_nodes * counts_bytes(self.peers.size, self.num_nodes))
        self.rails = Rails(self.peers, num_local_ranks, arena_bytes, rail_bytes, num_qps, num_sms)
        self._fresh = Fresh(self.rails)
        self.device: torch.device = self.rails.device
        self.low_latency = self.rails.low_latency
        self._no_offset = {layout: channels(self.peers.size, layout, self.device) for layout in LAYOUTS}

    def check_payload(self, payload: Payload, argument: str = "x") -> None:
        need_rows_of(payload, argument, self.device, DTYPES, "rdma")
        scales = payload.scales
        if scales is not None and scales.size(1) * scales.element_size() > _MOST_SCALES:
            text = (
                f"{argument}[1] must have rows of at most {_MOST_SCALES} bytes on the rdma engine, got {list(scales.shape)} of"
            )
            raise ArgumentError(f"{text} {scales.dtype}", f"{argument}[1]")

    # A fresh dispatch ---------------------------------------------------------------------------------------------------

    def dispatch(self, prepared: Prepared[DispatchRequest]) -> Received:
        self.check()
        if torch.cuda.is_current_stream_capturing() and not prepared.require().num_worst_tokens:
            # No peer waits yet, and nothing of a capture that is given up will ever run.
            raise ArgumentError(
                "a dispatch in a CUDA graph's capture needs num_worst_tokens or a handle: without them its tensors' sizes are "
                "counts, which the CPU waits for",
                "num_worst_tokens",
            )
        with self.rails.uninterrupted():  # what has come along the rail lies there until it is passed on
            return self._dispatch(*self._count(prepared))

    def _dispatch(self, request: DispatchRequest, told: Told, found: Found, sizes: Sizes, crossed: Crossed | None) -> Received:
        """All but the counts and the rows' crossing, behind which all of it is made ready."""
        behind, call = 0 if crossed is None else crossed.row_bytes, self._signature("words", None, self.peers.calls)
        tables, words = self._fresh.open(told, found, sizes, request, behind, call)
        experts, idx, weights = words.experts, words.topk_idx, words.topk_weights
        if experts is not None:
            try:
                self._fresh.arrange(words, found, request.num_sms)
                if weights is not None:
                    weights = move_weights(self.rails, weights, experts, words.row_weights)
            except Exception as error:  # noqa: BLE001 - whatever it is, the peers wait for this rank's rows
                self.rails.refuse(self.rails.dispatch_steps if crossed is None else BEHIND_WORDS, error)
        received = found.received if request.num_worst_tokens else None
        route = RailRoute(
            (), rails=self.rails, num_tokens=told.in_rank.size(0), received=received, tables=[tables], experts=experts
        )
        if crossed is not None:
            route.ahead.append(crossed)
        if torch.cuda.is_current_stream_capturing():
            self.rails.keep([self.rails.everyone, *route.kept()])
        plan = CollectivePlan(
            number=self.peers.calls,
            num_tokens=told.in_rank.size(0),
            num_received=sizes.num_received,
            num_rows=sizes.num_rows,
            num_experts=request.num_experts,
            top_k=0 if idx is None else idx.size(1),
            layout=request.arrangement,
            alignment=request.alignment,
            tokens_per_expert=sizes.tokens_per_expert,
            recv_topk_idx=idx,
            route=route,
            row_from=None,
            experts=None,
        )
        payload = self._move(request, plan)  # which peers wait for; then what only the caller needs
        tensors = self._tensors_of(told, found, words, self._no_offset[request.arrangement])
        remember(tensors, plan, self._token)  # V1's callers may hand these back as a plain tuple
        return Received(payload, None if experts is not None else idx, weights, plan, tensors)

    def _count(self, prepared: Prepared[DispatchRequest]) -> tuple[DispatchRequest, Told, Found, Sizes, Crossed | None]:
        """Agree on a fresh dispatch, by the kernels that move rows: a row of counts from each rank to all. One width serves all
        calls, so that they meet even where the ranks' arguments differ. What is wrong on one rank raises on all; with
        num_worst_tokens on any of them the kernels fail all ranks' buffers, since no CPU waits. Rows cross behind, but in
        stages."""
        peers, nodes = self.peers, self.num_nodes
        described = peers.describe("dispatch", prepared)
        wrong, leaving, widest, of_rows = None, None, 1, 0
        try:
            request = prepared.require()
            if request.layout is None:
                assert request.topk_idx is not None
                request.layout = self._layout(request.topk_idx, request.num_experts)
            self._need_served(request)
            wrong, widest = _is_wrong(request, nodes), _widest(request, self.num_local_ranks)
            agreed = hashed("dispatch", peers.number, request.num_worst_tokens > 0, request.agreement())
            told = self._fresh.tell(request, wrong, numbered(agreed, peers.calls))
            parts, of_rows = [plain(p) for p in request.payload.parts()], self._signature("rows", request, peers.calls)
            leaving = self._fresh.make_ready(told, parts, widest)
        except Exception as error:
            if torch.cuda.is_current_stream_capturing():  # they raise, too, or run nothing of what they capture
                raise
            prepared.request, prepared.error = None, error
            told = self._fresh.tell(None, None, 0)
        of_counts = self._signature("counts", None, peers.calls)
        found, seen = self._fresh.count(told, leaving, prepared.request, widest, of_counts, of_rows)
        if seen is not None and seen.verdict:
            if prepared.error is not None and seen.is_bounded:
                raise prepared.error  # this is the end of the buffer: but first comes what is wrong here
            self.check()
            if prepared.request is not None and wrong is not None and wrong.item():
                prepared.error = _layout_error(prepared.request, nodes)
            peers.raise_disagreement("dispatch", described, prepared.error)
            raise DeepEPError("dispatch: the ranks disagree, but not on anything that can be told")
        sizes = self._fresh.sizes(found, seen, request, widest)
        if seen is not None and not seen.goes:
            self.rails.make_room(sizes.most, widest)
            if leaving is not None:
                leaving = self._fresh.cross(told, found, leaving, request, widest, of_rows)
        return request, told, found, sizes, None if leaving is None else leaving.crossed

    def _need_served(self, request: DispatchRequest) -> None:
        if request.num_experts > MAX_EXPERTS:
            text = f"the rdma engine serves up to {MAX_EXPERTS} experts, got num_experts={request.num_experts}"
            raise ArgumentError(text, "num_experts")
        if request.alignment > MAX_ALIGNMENT:
            text = f"the rdma engine serves alignments up to {MAX_ALIGNMENT}, got alignment={request.alignment}"
            raise ArgumentError(text, "alignment")
        if request.topk_idx is not None and request.topk_idx.size(1) > MAX_TOP_K and request.arrangement == "expert":
            text = f"the rdma engine serves up to top-{MAX_TOP_K} in expert layout, got topk_idx {list(request.topk_idx.shape)}"
            raise ArgumentError(text, "topk_idx")

    def _tensors_of(self, told: Told, found: Found, words: Words, no_offset: Tensor) -> tuple[Tensor, ...]:
        """DeepEP V1's tensors; copies of what the kernels will read again."""
        head, size, nodes = self.rails.kernels.head_words, self.peers.size, self.num_nodes
        per_rank, per_node = told.row[head : head + size + nodes].clone().split_with_sizes([size, nodes])
        return (
            told.in_rank,
            per_node.unsqueeze(1),
            per_rank.unsqueeze(1),
            no_offset[:nodes],
            found.recv_at[1:].clone(),
            no_offset,
            found.received_upto,
            words.source,
            told.place.clone(),
            words.number,
        )

    def layout(self, topk_idx: Tensor, num_experts: int) -> RankLayout:
        layout = self._layout(topk_idx, num_experts)
        counted = layout._replace(num_tokens_per_rdma_rank=tokens_per_node(layout.is_token_in_rank, self.num_nodes))
        return RailLayout.made(counted, topk_idx, layout.wrong)

    def _layout(self, topk_idx: Tensor, num_experts: int) -> RailLayout:
        """Without nodes, which a fresh dispatch counts for itself."""
        if topk_idx.device != self.device:
            raise ArgumentError(f"topk_idx must lie on {self.device}, this engine's device, got {topk_idx.device}", "topk_idx")
        (num_tokens, top_k), size = topk_idx.shape, self.peers.size
        if num_experts > MAX_EXPERTS or top_k > MAX_TOP_K:  # for the kernel
            in_range = (topk_idx >= -1) & (topk_idx < num_experts)
            counted = super().layout(torch.where(in_range, topk_idx, -1), num_experts)
            return RailLayout.made(counted, topk_idx, (~in_range.all()).to(torch.int32).view(1))
        idx, places = topk_idx.contiguous(), num_tokens * size
        sizes = [size, num_experts, 1, places, -(-places // 4)]  # the last: bools
        block = torch.empty(sum(sizes), dtype=torch.int32, device=self.device)
        self.rails.comm.layout(idx.data_ptr(), num_tokens, top_k, num_experts, size, block.data_ptr(), self.rails.stream())
        per_rank, per_expert, wrong, _, bools = block.unsafe_split_with_sizes(sizes)  # writes to each are counted on their own
        in_rank = bools.view(torch.bool)[:places].view(num_tokens, size)
        return RailLayout.made(RankLayout(per_rank, None, per_expert, in_rank), topk_idx, wrong)

    # Calls along a handle -----------------------------------------------------------------------------------------------

    def redispatch(self, prepared: Prepared[RedispatchRequest]) -> Payload:
        self.check()
        request, plan, _ = self._take("dispatch with a handle", self.rails.dispatch_steps, prepared)
        return self._move(request, plan)

    def combine(self, prepared: Prepared[CombineRequest]) -> tuple[Tensor, Tensor | None]:
        self.check()
        request, plan, route = self._take("combine", self.rails.combine_steps, prepared)
        call = self._signature("combine", request, plan.number)
        weights, experts = request.weights, route.experts
        rows = request.rows[: plan.num_received] if experts is None else request.rows
        z = route.add_back(rows, experts, request.bias, call, request.num_sms)
        if weights is None:
            return z, None
        if experts is not None:
            try:
                weights = move_weights(self.rails, weights, experts)
            except Exception as error:  # noqa: BLE001 - as in `dispatch`
                self.rails.refuse(self.rails.combine_steps, error)
        return z, route.add_back(weights[: plan.num_received], None, (), call, request.num_sms)

    def _take(
        self, operation: str, steps: Sequence[str], prepared: Prepared[CachedT]
    ) -> tuple[CachedT, CollectivePlan, RailRoute]:
        """The request of a call that exchanges no counts; the kernels compare what the ranks must agree on. If this rank has
        none, or cannot serve it, the others learn so."""
        try:
            request = prepared.require()
            plan = request.plan
            assert isinstance(plan, CollectivePlan) and isinstance(plan.route, RailRoute)
            if torch.cuda.is_current_stream_capturing():
                if not plan.route.tables:
                    raise _copied_in_a_capture()
                # Not the plan, which knows the rails, which would keep it and so themselves.
                self.rails.keep(plan.route.kept())
        except Exception as error:  # noqa: BLE001 - whatever it is, the peers must hear of it
            self.rails.refuse(steps, error)
        if not plan.route.tables:
            self._agree_on_rows(operation, prepared)
        return request, plan, plan.route

    def _signature(self, operation: str, request: Request | None, number: int) -> int:
        agreed = () if request is None else request.agreement()
        return numbered(hashed(operation, self.peers.number, agreed), number)

    def _deliver(
        self, parts: Sequence[Tensor], plan: CollectivePlan, request: DispatchRequest | RedispatchRequest
    ) -> list[Tensor]:
        assert isinstance(plan.route, RailRoute)
        call = self._signature("rows", request, plan.number)
        return plan.route.send_together(parts, plan.num_rows, call, request.num_sms)

    def _padding(self, plan: CollectivePlan, _: torch.device) -> Tensor:
        assert isinstance(plan.route, RailRoute)
        if plan.route.experts is not None:
            return plan.route.experts.row_slot < 0
        number = torch.arange(plan.num_rows, device=self.device)
        return number >= (plan.num_received if plan.route.received is None else plan.route.received)

    # Handles that were rebuilt from their tensors -----------------------------------------------------------------------

    def _rebuilt(self, tensors: tuple[Tensor, ...]) -> CollectivePlan:
        if torch.cuda.is_current_stream_capturing():
            raise _copied_in_a_capture()
        plan = super()._rebuilt(tensors)
        num_rows = tensors[7].size(0)
        if num_rows == plan.num_received:
            return plan
        # Of a dispatch with num_worst_tokens.
        assert isinstance(plan.route, RailRoute)
        received = to_device(torch.tensor([plan.num_received], dtype=torch.int32), self.device)
        return replace(plan, num_rows=num_rows, route=replace(plan.route, received=received))

    def _route(self, is_token_in_rank: Tensor, forwarding: Forwarding | None, recv_counts: list[int]) -> Route:
        """Its tables are learned when it is used."""
        assert forwarding is not None
        known = Known(is_token_in_rank, forwarding, recv_counts)
        return RailRoute((), rails=self.rails, num_tokens=is_token_in_rank.size(0), known=known)

    def _hops(self, route: Route) -> tuple[Hop, ...]:
        assert isinstance(route, RailRoute) and route.known is not None
        return two_level(self.peers, *route.known, self.num_local_ranks).hops

    def _agree_on_rows(self, operation: str, prepared: Prepared) -> None:
        super()._agree_on_rows(operation, prepared)
        plan = prepared.require().plan
        assert isinstance(plan, CollectivePlan) and isinstance(plan.route, RailRoute)
        plan.route.learn(operation)

    # Life --------------------------------------------------------------------------------------------------------------

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | None) -> Tensor:
        need_own_device(device, self.device)
        return self.rails.empty(shape, dtype)

    def memory_stats(self) -> dict[str, int]:
        return self.rails.stats()

    def check(self) -> None:
        super().check()
        if (failure := self.rails.failure()) is not None:
            self.peers.failure = failure
            raise failure
        low_latency = self.low_latency
        if low_latency is not None:
            low_latency.check()

    def destroy(self) -> None:
        self.low_latency = None
        try:
            self.rails.close()
        finally:
            super().destroy()


def _widest(request: DispatchRequest, num_local_ranks: int) -> int:
    """Bytes between two nodes for each row of this dispatch, its cached repetitions and its combines: of the payload with its
    scales and what travels beside, which lies behind it; or of sums in its dtype, or in one of 16 bits if it has 8."""
    data, scales, _ = request.payload
    row = padded(data.size(1) * data.element_size())
    if scales is not None:
        row += padded(scales.size(1) * scales.element_size())
    sums = padded(data.size(1) * max(2, data.element_size()))
    top_k = 0 if request.topk_idx is None else request.topk_idx.size(1)
    return max(row + words_bytes(top_k, request.topk_weights is not None, num_local_ranks), sums)


class RailLayout(RankLayout):
    """What `RdmaEngine.layout` made of `of`; `wrong`: int32 [1], whether that is out of range, which nobody has looked at."""

    of: Tensor
    wrong: Tensor

    @classmethod
    def made(cls, layout: RankLayout, of: Tensor, wrong: Tensor) -> RailLayout:
        self = cls(*layout)
        self.of, self.wrong = of, wrong
        return self


def _is_wrong(request: DispatchRequest, nodes: int) -> Tensor:
    """int32 [1]: whether the layout does not count what it should."""
    layout, idx = request.counted, request.topk_idx
    if isinstance(layout, RailLayout) and layout.of is idx:
        return layout.wrong
    in_rank = layout.is_token_in_rank
    wrong = (in_rank.sum(0, dtype=torch.int32) != layout.num_tokens_per_rank).any()
    assert layout.num_tokens_per_rdma_rank is not None
    wrong = wrong | (tokens_per_node(in_rank, nodes) != layout.num_tokens_per_rdma_rank).any()
    if idx is not None:
        wrong = wrong | ((idx < -1) | (idx >= request.num_experts)).any()
        wrong = wrong | (count_picks(idx, request.num_experts) != layout.num_tokens_per_expert).any()
    return wrong.to(torch.int32).view(1)


def _layout_error(request: DispatchRequest, nodes: int) -> ArgumentError:
    """What `_is_wrong` stands for."""
    per_node, counted = request.counted.num_tokens_per_rdma_rank, tokens_per_node(request.counted.is_token_in_rank, nodes)
    if per_node is not None and not torch.equal(per_node, counted):
        return wrong_counts(per_node, counted, "num_tokens_per_rdma_rank")
    return layout_error(request)


def _copied_in_a_capture() -> ArgumentError:
    return ArgumentError(
        "handle: tensors that are not those that dispatch returned are looked at by the CPU, which cannot be done in a CUDA "
        "graph's capture",
        "handle",
    )
