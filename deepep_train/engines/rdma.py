"""The engine of several nodes whose GPUs reach each other through NVSHMEM: the collective engine's dispatch and combine with
its counts, agreement and handles, and rows that travel through kernels (rails.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from deepep_train.engines.base import (
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
from deepep_train.engines.hops import Hop, Route
from deepep_train.engines.rail_tables import Tables, counts_of
from deepep_train.engines.rails import DTYPES, RailRoute, Rails
from deepep_train.engines.two_level import Forwarding, two_level


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
        self.device, self.low_latency = self.rails.device, self.rails.low_latency

    def check_payload(self, payload: Payload, argument: str = "x") -> None:
        need_rows_of(payload, argument, self.device, DTYPES, "rdma")

    def dispatch(self, prepared: Prepared[DispatchRequest]) -> Received:
        self.check()
        return super().dispatch(prepared)

    def redispatch(self, prepared: Prepared[RedispatchRequest]) -> Payload:
        self.check()
        return super().redispatch(prepared)

    def combine(self, prepared: Prepared[CombineRequest]) -> tuple[Tensor, Tensor | None]:
        self.check()
        return super().combine(prepared)

    def _open(
        self, request: DispatchRequest, counts_RR: list[list[int]], per_node_RN: Tensor, recv_counts: list[int]
    ) -> Opened:
        in_rank = request.counted.is_token_in_rank
        counts = counts_of(self.rank, self.num_local_ranks, torch.tensor(counts_RR), per_node_RN)
        tables, words = self.rails.open(counts, in_rank, words_along(request), sum(recv_counts))
        forwarding = Forwarding(counts.recv, tables.slot >= 0)
        return Opened(self._way((), in_rank, forwarding, recv_counts, [tables]), forwarding, words)

    def _route(self, is_token_in_rank: Tensor, forwarding: Forwarding | None, recv_counts: list[int]) -> Route:
        """Of a handle that was rebuilt from its tensors: its tables are learned when it is used."""
        assert forwarding is not None
        hops = two_level(self.peers, is_token_in_rank, forwarding, recv_counts, self.num_local_ranks).hops
        return self._way(hops, is_token_in_rank, forwarding, recv_counts, [])

    def _deliver(self, parts: Sequence[Tensor], plan: CollectivePlan) -> list[Tensor]:
        assert isinstance(plan.route, RailRoute)
        if plan.row_from is None:
            return plan.route.send_together(parts, plan.num_rows - plan.num_received)
        return [rows.index_select(0, plan.row_from) for rows in plan.route.send_together(parts, 1)]

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
        self.rails.check()
        if self.low_latency is not None:
            self.low_latency.check()

    def destroy(self) -> None:
        self.rails.close()
        super().destroy()
