"""From arguments to an engine's requests: the calls that `deepep_train.ops` and V1's methods share, on the current stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from deepep_train import checks
from deepep_train.buffer_low_latency import PayloadArgument
from deepep_train.engines.base import (
    CombineRequest,
    DispatchRequest,
    Engine,
    Payload,
    Prepared,
    Received,
    RedispatchRequest,
    wrong_counts,
)
from deepep_train.errors import ArgumentError, DeepEPError
from deepep_train.handle import Handle, Plan
from deepep_train.routing import RankLayout, tokens_per_node


class CheckedCalls:
    """A part of `Buffer`. Arguments are checked within `Prepared`, so that the peers hear of what is wrong with them."""

    _engine: Engine
    _destroyed: bool
    group_size: int
    num_nodes: int

    def check(self) -> None:
        """Raise what has failed on this buffer so far. Failures are sticky: the buffer stays unusable."""
        if self._destroyed:
            raise DeepEPError("this Buffer has been destroyed")
        self._engine.check()

    def route_and_dispatch(
        self,
        x: PayloadArgument,
        topk_idx: Tensor | None,
        topk_weights: Tensor | None,
        num_experts: int | None,
        layout: str,
        alignment: int,
        num_worst_tokens: int,
        recipe: str = "",
        num_sms: int = 0,
    ) -> Received:
        """`get_dispatch_layout` and a dispatch into either layout, on the current stream; `recipe` must agree among ranks,
        `num_sms` as in `DispatchRequest`."""
        self.check()

        def make() -> DispatchRequest:
            payload = checks.payload(x)
            self._engine.check_payload(payload)
            total = checks.experts(num_experts, self.group_size)
            idx = self._check_topk_idx(topk_idx, payload.data.size(0), total, payload.data.device)
            self._check_topk_weights(idx, topk_weights)
            return DispatchRequest(
                payload,
                None if self._engine.checks_layout else self._engine.layout(idx, total),
                idx,
                topk_weights,
                total,
                checks.layout(layout),
                checks.integer(alignment, "alignment", 1),
                checks.integer(num_worst_tokens, "num_worst_tokens"),
                checks.integer(num_sms, "num_sms"),
                recipe,
            )

        return self._engine.dispatch(Prepared(make))

    def refuse_dispatch(self, error: Exception) -> NoReturn:
        """Take this rank's part in a dispatch whose arguments could not even be made: every rank raises, naming this one."""
        self.check()

        def make() -> DispatchRequest:
            raise error

        self._engine.dispatch(Prepared(make))
        raise error

    def redispatch(
        self,
        x: PayloadArgument,
        handle: tuple,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        num_experts: int | None = None,
        also: Callable[[], None] = lambda: None,
        num_sms: int = 0,
        recipe: str = "",
    ) -> Payload:
        """Send `x` the way the handle's dispatch went, into its layout, on the current stream; `also` checks what else the
        caller was given; `recipe` and `num_sms` as above."""
        self.check()

        def make() -> RedispatchRequest:
            plan = self._plan(handle)
            also()
            for name, given in (("topk_idx", topk_idx), ("topk_weights", topk_weights), ("num_experts", num_experts)):
                checks.need(given is None, name, "None with a handle", given)
            payload = checks.payload(x, num_tokens=plan.num_tokens)
            self._engine.check_payload(payload)
            return RedispatchRequest(payload, plan, checks.integer(num_sms, "num_sms"), recipe)

        return self._engine.redispatch(Prepared(make))

    def combine_rows(
        self,
        x: Tensor,
        handle: tuple,
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, Tensor] | None = None,
        argument: str = "x",
        also: Callable[[], None] = lambda: None,
        num_sms: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        """`combine` from either layout, on the current stream; `argument` is the caller's name for `x`, `also` as above."""
        self.check()

        def make() -> CombineRequest:
            also()
            plan = self._plan(handle)
            checks.tensor(x, argument, [plan.num_rows, None], checks.PAYLOAD_DTYPES, None)
            checks.need(x.size(1) >= 1, argument, "at least one element wide", x)
            self._engine.check_payload(Payload(x), argument)
            if topk_weights is not None:
                shape = [plan.num_rows] if plan.layout == "expert" else [plan.num_rows, plan.top_k or None]
                checks.tensor(topk_weights, "topk_weights", shape, (torch.float32,), x.device)
            sms = checks.integer(num_sms, "num_sms")
            return CombineRequest(x, plan, topk_weights, checks.bias(bias, plan.num_tokens, x), sms)

        return self._engine.combine(Prepared(make))

    # Checks ------------------------------------------------------------------------------------------------------------

    def _plan(self, handle: Any) -> Plan:
        if isinstance(handle, Handle):
            if handle.buffer is not self:
                raise ArgumentError(f"handle was made by {handle.buffer}, not by this {self}", "handle")
            return handle.plan
        size = 6 if self.num_nodes == 1 else 10
        fits = isinstance(handle, (tuple, list)) and len(handle) == size and all(isinstance(t, Tensor) for t in handle)
        checks.need(fits, "handle", f"what dispatch returned ({size} tensors)", handle)
        checks.v1_handle(handle, self.group_size, self.num_nodes)
        return self._engine.plan_of(tuple(handle))

    def _check_topk_idx(self, topk_idx: Any, num_tokens: int | None, num_experts: int, device: torch.device | None) -> Tensor:
        return checks.topk_idx(topk_idx, num_tokens, num_experts, device, check_range=not self._engine.checks_layout)

    @staticmethod
    def _check_topk_weights(topk_idx: Tensor | None, topk_weights: Any) -> None:
        if topk_weights is not None:
            if topk_idx is None:
                raise ArgumentError("topk_weights must be None without topk_idx", "topk_weights")
            checks.tensor(topk_weights, "topk_weights", topk_idx.shape, (torch.float32,), topk_idx.device)

    def _given_layout(self, payload: Payload, per_rank: Any, per_node: Any, per_expert: Any, in_rank: Any) -> RankLayout:
        device = payload.data.device
        checks.tensor(per_rank, "num_tokens_per_rank", [self.group_size], (torch.int32,), device)
        checks.tensor(per_expert, "num_tokens_per_expert", [None], (torch.int32,), device)
        checks.experts(per_expert.numel(), self.group_size)
        checks.tensor(in_rank, "is_token_in_rank", [payload.data.size(0), self.group_size], (torch.bool,), device)
        if self.num_nodes > 1:
            counted_nodes = tokens_per_node(in_rank, self.num_nodes)
            if per_node is None:
                per_node = counted_nodes
            checks.tensor(per_node, "num_tokens_per_rdma_rank", [self.num_nodes], (torch.int32,), device)
            if not self._engine.checks_layout and not torch.equal(counted_nodes, per_node):
                raise wrong_counts(per_node, counted_nodes, "num_tokens_per_rdma_rank")
        if not self._engine.checks_layout:
            counted = in_rank.sum(0, dtype=torch.int32)
            if not torch.equal(counted, per_rank):
                raise wrong_counts(per_rank, counted)
        return RankLayout(per_rank, per_node, per_expert, in_rank)
