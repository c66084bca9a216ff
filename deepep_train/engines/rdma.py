"""The engine of several nodes whose GPUs reach each other through NVSHMEM: the collective engine's dispatch and combine with
its counts, agreement and handles, and rows that travel through kernels (rails.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from deepep_train.engines.base import CombineRequest, DispatchRequest, Payload, Prepared, Received, RedispatchRequest
from deepep_train.engines.collective import CollectiveEngine, CollectivePlan
from deepep_train.engines.hops import Route
from deepep_train.engines.rails import DTYPES, RailRoute, Rails
from deepep_train.engines.two_level import Forwarding, two_level
from deepep_train.errors import ArgumentError


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

    def check_payload(self, payload: Payload, argument: str = "x") -> None:
        data = payload.data
        if data.device != self.device:
            raise ArgumentError(
                f"{argument} must lie on {self.device}, this engine's device, got {data.device}; Buffer(engine='collective') "
                "serves any device",
                argument,
            )
        if data.dtype.itemsize != 1 and data.dtype not in DTYPES:
            raise ArgumentError(
                f"{argument} in {data.dtype} needs engine='collective'; rdma moves bf16, fp16, fp32 and FP8", argument
            )

    def dispatch(self, prepared: Prepared[DispatchRequest]) -> Received:
        self.check()
        return super().dispatch(prepared)

    def redispatch(self, prepared: Prepared[RedispatchRequest]) -> Payload:
        self.check()
        return super().redispatch(prepared)

    def combine(self, prepared: Prepared[CombineRequest]) -> tuple[Tensor, Tensor | None]:
        self.check()
        return super().combine(prepared)

    def _route(self, is_token_in_rank: Tensor, forwarding: Forwarding | None, recv_counts: list[int]) -> Route:
        assert forwarding is not None
        hops = two_level(self.peers, is_token_in_rank, forwarding, recv_counts, self.num_local_ranks).hops
        return RailRoute(
            hops, rails=self.rails, forwarding=forwarding, is_token_in_rank=is_token_in_rank, recv_counts=recv_counts
        )

    def _begin(self, route: Route, operation: str) -> None:
        assert isinstance(route, RailRoute)
        route.learn(operation)

    def _agree_on_rows(self, operation: str, prepared: Prepared) -> None:
        super()._agree_on_rows(operation, prepared)
        plan = prepared.require().plan
        assert isinstance(plan, CollectivePlan)
        self._begin(plan.route, operation)

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.rails.empty(shape, dtype)

    def memory_stats(self) -> dict[str, int]:
        return self.rails.stats()

    def check(self) -> None:
        super().check()
        self.rails.check()

    def destroy(self) -> None:
        self.rails.close()
        super().destroy()
