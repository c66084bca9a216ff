"""The engine of several nodes whose GPUs reach each other through NVSHMEM: the collective engine's dispatch and combine with
its counts, agreement and handles, and rows that travel through kernels (rails.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from deepep_train.engines.base import (
    MAX_TOP_K,
    CombineRequest,
    DispatchRequest,
    Payload,
    Prepared,
    Received,
    RedispatchRequest,
    need_own_device,
    need_rows_of,
)
from deepep_train.engines.collective import CollectiveEngine, CollectivePlan, Opened, words_along
from deepep_train.engines.expert_layout import weights_by_pick
from deepep_train.engines.hops import Hop, Route
from deepep_train.engines.nvlink_tables import remember, remembered
from deepep_train.engines.rail_tables import ExpertTables, Tables, counts_of, expert_tables
from deepep_train.engines.rails import COMBINE, DISPATCH, DTYPES, RailRoute, Rails
from deepep_train.engines.signature import signature
from deepep_train.engines.two_level import Forwarding, two_level
from deepep_train.errors import ArgumentError

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
        self.rails = Rails(self.peers, num_local_ranks, arena_bytes, rail_bytes, num_qps, num_sms)
        self.device = self.rails.device
        self._token = object()  # of this engine, for what travels with tensors

    def check_payload(self, payload: Payload, argument: str = "x") -> None:
        need_rows_of(payload, argument, self.device, DTYPES, "rdma")

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
        return self._move(request.payload, plan, request.signature())

    def combine(self, prepared: Prepared[CombineRequest]) -> tuple[Tensor, Tensor | None]:
        self.check()
        request, plan, route = self._take("combine", COMBINE, prepared)
        call = self._signature("combine", plan, request.signature())
        weights, experts = request.weights, _experts_of(plan, route)
        rows = request.rows[: plan.num_received] if experts is None else request.rows
        z = route.add_back(rows, experts, request.bias, call)
        if weights is None:
            return z, None
        if plan.experts is not None:
            weights = weights_by_pick(weights, plan.experts, plan.num_received, plan.top_k)
        return z, route.add_back(weights[: plan.num_received], None, (), call)

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
                self.rails.keep(plan)
        except Exception as error:  # noqa: BLE001 - whatever it is, the peers must hear of it
            self.rails.refuse(steps, error)
        if not plan.route.tables:
            self._agree_on_rows(operation, prepared)
        return request, plan, plan.route

    def _signature(self, operation: str, plan: CollectivePlan, call: dict[str, object]) -> int:
        return signature(operation, {"buffer": self.peers.number, "number": plan.number} | call)

    def _open(
        self, request: DispatchRequest, counts_RR: list[list[int]], per_node_RN: Tensor, recv_counts: list[int]
    ) -> Opened:
        if request.topk_idx is not None and request.topk_idx.size(1) > MAX_TOP_K and request.arrangement == "expert":
            text = f"the rdma engine serves up to top-{MAX_TOP_K} in expert layout, got topk_idx {list(request.topk_idx.shape)}"
            raise ArgumentError(text, "topk_idx")  # on every rank: they agree on it
        in_rank = request.layout.is_token_in_rank
        counts = counts_of(self.rank, self.num_local_ranks, torch.tensor(counts_RR), per_node_RN)
        call = signature("words", {"buffer": self.peers.number, "number": self.peers.calls})
        tables, words = self.rails.open(counts, in_rank, words_along(request), sum(recv_counts), call)
        forwarding = Forwarding(counts.recv, tables.slot >= 0)
        return Opened(self._way((), in_rank, forwarding, recv_counts, [tables]), forwarding, words)

    def _route(self, is_token_in_rank: Tensor, forwarding: Forwarding | None, recv_counts: list[int]) -> Route:
        """Of a handle that was rebuilt from its tensors: its tables are learned when it is used."""
        assert forwarding is not None
        hops = two_level(self.peers, is_token_in_rank, forwarding, recv_counts, self.num_local_ranks).hops
        return self._way(hops, is_token_in_rank, forwarding, recv_counts, [])

    def _deliver(self, parts: Sequence[Tensor], plan: CollectivePlan, call: dict[str, object]) -> list[Tensor]:
        assert isinstance(plan.route, RailRoute)
        agreed = self._signature("rows", plan, call)
        return plan.route.send_together(parts, plan.num_rows, _experts_of(plan, plan.route), agreed)

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

    def destroy(self) -> None:
        self.rails.close()
        super().destroy()


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
