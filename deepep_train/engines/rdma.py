"""The engine of several nodes whose GPUs reach each other through NVSHMEM: the collective engine's dispatch and combine with
its counts, agreement and handles, and rows that travel through kernels (rails.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from deepep_train.engines.base import (
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
from deepep_train.engines.collective import CollectiveEngine, CollectivePlan, CountsOfAll, Opened, words_along
from deepep_train.engines.expert_layout import weights_by_pick
from deepep_train.engines.hops import Hop, Route, to_device
from deepep_train.engines.nvlink_failures import layout_error
from deepep_train.engines.nvlink_tables import remember, remembered
from deepep_train.engines.rail_route import RailRoute
from deepep_train.engines.rail_rows import padded
from deepep_train.engines.rail_tables import ExpertTables, Tables, counts_of, expert_tables, num_words
from deepep_train.engines.rails import COMBINE, DISPATCH, DTYPES, Rails
from deepep_train.engines.signature import hashed, numbered
from deepep_train.engines.two_level import Forwarding, two_level
from deepep_train.errors import ArgumentError, DeepEPError
from deepep_train.routing import RankLayout, count_picks, tokens_per_node

_HEAD, _HALF = 5, (1 << 31) - 1
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
        self._row_words = _HEAD + self.peers.size + self.num_nodes + MAX_EXPERTS  # of an exchange of counts
        rail_bytes = max(rail_bytes, 2 * self.num_nodes * 8 * self._row_words)
        self.rails = Rails(self.peers, num_local_ranks, arena_bytes, rail_bytes, num_qps, num_sms)
        self.device, self.low_latency = self.rails.device, self.rails.low_latency
        self._token = object()  # of this engine, for what travels with tensors
        self._zeros = torch.zeros(MAX_EXPERTS, dtype=torch.int32, device=self.device)

    def check_payload(self, payload: Payload, argument: str = "x") -> None:
        need_rows_of(payload, argument, self.device, DTYPES, "rdma")
        scales = payload.scales
        if scales is not None and scales.size(1) * scales.element_size() > _MOST_SCALES:
            text = (
                f"{argument}[1] must have rows of at most {_MOST_SCALES} bytes on the rdma engine, got {list(scales.shape)} of"
            )
            raise ArgumentError(f"{text} {scales.dtype}", f"{argument}[1]")

    def dispatch(self, prepared: Prepared[DispatchRequest]) -> Received:
        self.check()
        if torch.cuda.is_current_stream_capturing():
            raise ArgumentError("a dispatch in a CUDA graph's capture needs a handle on the rdma engine", "handle")
        received = super().dispatch(prepared)
        remember(received.tensors, received.plan, self._token)  # V1's callers may hand these back as a plain tuple
        return received

    def redispatch(self, prepared: Prepared[RedispatchRequest]) -> Payload:
        self.check()
        request, plan, _ = self._take("dispatch with a handle", DISPATCH, prepared)
        return self._move(request, plan)

    def combine(self, prepared: Prepared[CombineRequest]) -> tuple[Tensor, Tensor | None]:
        self.check()
        request, plan, route = self._take("combine", COMBINE, prepared)
        call = self._signature("combine", request, plan.number)
        weights, experts = request.weights, _experts_of(plan, route)
        rows = request.rows[: plan.num_received] if experts is None else request.rows
        z = route.add_back(rows, experts, request.bias, call, request.num_sms)
        if weights is None:
            return z, None
        if plan.experts is not None:
            weights = weights_by_pick(weights, plan.experts, plan.num_received, plan.top_k)
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
                self.rails.keep((plan.route.tables, plan.route.experts, plan.experts))
        except Exception as error:  # noqa: BLE001 - whatever it is, the peers must hear of it
            self.rails.refuse(steps, error)
        if not plan.route.tables:
            self._agree_on_rows(operation, prepared)
        return request, plan, plan.route

    def _signature(self, operation: str, request: Request | None, number: int) -> int:
        agreed = () if request is None else request.agreement()
        return numbered(hashed(operation, self.peers.number, agreed), number)

    def layout(self, topk_idx: Tensor, num_experts: int) -> RankLayout:
        if topk_idx.device != self.device:
            raise ArgumentError(f"topk_idx must lie on {self.device}, this engine's device, got {topk_idx.device}", "topk_idx")
        in_range = (topk_idx >= -1) & (topk_idx < num_experts)
        layout = RailLayout(*super().layout(torch.where(in_range, topk_idx, -1), num_experts))
        layout.of, layout.wrong = topk_idx, ~in_range.all()
        return layout

    def _exchange_counts(self, prepared: Prepared[DispatchRequest]) -> CountsOfAll:
        """By the kernels that move rows, a row of counts from each rank to all. One width serves all calls, so that they meet
        even where the ranks' arguments differ."""
        peers, nodes = self.peers, self.num_nodes
        described = peers.describe("dispatch", prepared)
        try:
            request = prepared.require()
            if request.layout is None:
                assert request.topk_idx is not None
                request.layout = self.layout(request.topk_idx, request.num_experts)
            words = self._words(request, nodes, self._signature("dispatch", request, peers.calls))
        except Exception as error:  # noqa: BLE001 - whatever it is, the peers must hear of it
            prepared.request, prepared.error = None, error
            words = torch.zeros(self._row_words, dtype=torch.int32)
            words[0] = 1
            words = words.to(self.device)
        table = self.rails.gather(words, self._signature("counts", None, peers.calls))
        self.check()
        broken, low, high, bounds, wrong = table[:, :_HEAD].t()
        if broken.any() or wrong.any() or (low != low[0]).any() or (high != high[0]).any():
            if prepared.request is not None and wrong[peers.rank]:
                prepared.error = _layout_error(prepared.request, nodes)
            peers.raise_disagreement("dispatch", described, prepared.error)
            raise DeepEPError("dispatch: the ranks disagree, but not on anything that can be told")
        counts = table[:, _HEAD : _HEAD + peers.size + nodes + request.num_experts].to(torch.int64)
        counts_RR, per_node_RN, counts_RE = counts.split_with_sizes([peers.size, nodes, request.num_experts], 1)
        return CountsOfAll(bounds.tolist(), counts_RR.tolist(), counts_RE, per_node_RN)

    def _words(self, request: DispatchRequest, nodes: int, agreed: int) -> Tensor:
        """This rank's row of the exchange: `_HEAD` words (is it broken; a signature, in halves; num_worst_tokens; whether the
        layout is wrong), then its counts by rank, node and expert."""
        layout, num_experts = request.counted, request.num_experts
        if num_experts > MAX_EXPERTS:
            raise ArgumentError(
                f"the rdma engine serves up to {MAX_EXPERTS} experts, got num_experts={num_experts}", "num_experts"
            )
        head = [0, agreed & _HALF, agreed >> 31 & _HALF, min(request.num_worst_tokens, _HALF)]
        per_node = layout.num_tokens_per_rdma_rank
        assert per_node is not None
        return torch.cat(
            [
                to_device(torch.tensor(head, dtype=torch.int32), self.rails.device),
                _is_wrong(request, nodes).to(torch.int32).view(1),
                layout.num_tokens_per_rank,
                per_node,
                layout.num_tokens_per_expert,
                self._zeros[: MAX_EXPERTS - num_experts],
            ]
        )

    def _open(
        self, request: DispatchRequest, counts_RR: list[list[int]], per_node_RN: Tensor, recv_counts: list[int]
    ) -> Opened:
        if request.topk_idx is not None and request.topk_idx.size(1) > MAX_TOP_K and request.arrangement == "expert":
            text = f"the rdma engine serves up to top-{MAX_TOP_K} in expert layout, got topk_idx {list(request.topk_idx.shape)}"
            raise ArgumentError(text, "topk_idx")  # on every rank: they agree on it
        in_rank = request.counted.is_token_in_rank
        counts = counts_of(self.rank, self.num_local_ranks, torch.tensor(counts_RR), per_node_RN)
        along = words_along(request)
        self.rails.make_room(counts, _widest(request, along.size(1)))
        call = self._signature("words", None, self.peers.calls)
        tables, words = self.rails.open(counts, in_rank, along, sum(recv_counts), call)
        forwarding = Forwarding(counts.recv, tables.slot >= 0)
        return Opened(self._way((), in_rank, forwarding, recv_counts, [tables]), forwarding, words)

    def _route(self, is_token_in_rank: Tensor, forwarding: Forwarding | None, recv_counts: list[int]) -> Route:
        """Of a handle that was rebuilt from its tensors: its tables are learned when it is used."""
        assert forwarding is not None
        hops = two_level(self.peers, is_token_in_rank, forwarding, recv_counts, self.num_local_ranks).hops
        return self._way(hops, is_token_in_rank, forwarding, recv_counts, [])

    def _deliver(
        self, parts: Sequence[Tensor], plan: CollectivePlan, request: DispatchRequest | RedispatchRequest
    ) -> list[Tensor]:
        assert isinstance(plan.route, RailRoute)
        call = self._signature("rows", request, plan.number)
        return plan.route.send_together(parts, plan.num_rows, _experts_of(plan, plan.route), call, request.num_sms)

    def plan_of(self, tensors: tuple[Tensor, ...]) -> CollectivePlan:
        plan = remembered(tensors, self._token)
        if plan is None and torch.cuda.is_current_stream_capturing():
            raise _copied_in_a_capture()
        if plan is None:
            return super().plan_of(tensors)
        assert isinstance(plan, CollectivePlan)
        return plan

    def _way(
        self,
        hops: tuple[Hop, ...],
        is_token_in_rank: Tensor,
        forwarding: Forwarding,
        recv_counts: list[int],
        tables: list[Tables],
    ) -> RailRoute:
        return RailRoute(
            hops,
            rails=self.rails,
            forwarding=forwarding,
            is_token_in_rank=is_token_in_rank,
            recv_counts=recv_counts,
            tables=tables,
        )

    def _hops(self, route: Route) -> tuple[Hop, ...]:
        assert isinstance(route, RailRoute)
        if route.hops:
            return route.hops
        how = (route.is_token_in_rank, route.forwarding, route.recv_counts, self.num_local_ranks)
        return two_level(self.peers, *how).hops

    def _agree_on_rows(self, operation: str, prepared: Prepared) -> None:
        super()._agree_on_rows(operation, prepared)
        plan = prepared.require().plan
        assert isinstance(plan, CollectivePlan) and isinstance(plan.route, RailRoute)
        plan.route.learn(operation)

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
        if self.low_latency is not None:
            self.low_latency.check()

    def destroy(self) -> None:
        self.low_latency = None
        self.rails.close()
        super().destroy()


def _widest(request: DispatchRequest, along: int) -> int:
    """Bytes of the widest rows that this dispatch, its cached repetitions and its combines will send: of the payload with its
    scales, and of sums in its dtype, or in one of 16 bits if it has 8; or of what travels beside."""
    data, scales, _ = request.payload
    row = padded(data.size(1) * data.element_size())
    if scales is not None:
        row += padded(scales.size(1) * scales.element_size())
    sums = padded(data.size(1) * max(2, data.element_size()))
    return max(row, sums, padded(4 * (along + num_words(request.counted.is_token_in_rank.size(1)))))


class RailLayout(RankLayout):
    """What `RdmaEngine.layout` made of `of`; `wrong`: bool [], whether that is out of range, which nobody has looked at yet."""

    of: Tensor
    wrong: Tensor


def _is_wrong(request: DispatchRequest, nodes: int) -> Tensor:
    """bool []: whether the layout does not count what it should."""
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
    return wrong


def _layout_error(request: DispatchRequest, nodes: int) -> ArgumentError:
    """What `_is_wrong` stands for."""
    per_node, counted = request.counted.num_tokens_per_rdma_rank, tokens_per_node(request.counted.is_token_in_rank, nodes)
    assert per_node is not None
    if not torch.equal(per_node, counted):
        return wrong_counts(per_node, counted, "num_tokens_per_rdma_rank")
    return layout_error(request)


def _experts_of(plan: CollectivePlan, route: RailRoute) -> ExpertTables | None:
    """Made when they are first wanted, by the dispatch itself."""
    if plan.experts is not None and not route.experts:
        route.experts.append(expert_tables(plan.experts, plan.num_received, plan.top_k, plan.num_rows))
    return route.experts[0] if route.experts else None


def _copied_in_a_capture() -> ArgumentError:
    return ArgumentError(
        "handle: tensors that are not those that dispatch returned are looked at by the CPU, which cannot be done in a CUDA "
        "graph's capture",
        "handle",
    )
