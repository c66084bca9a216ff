"""The engine that runs anywhere: dispatch and combine over torch.distributed's collectives, gloo or NCCL.

Every row crosses to each destination rank once, or, two-level, to each destination node once (two_level.py); copies for
further experts are made there. Rows are gathered by destination, exchanged with an all-to-all for each hop, and end in the
order the contract wants: by source rank, then by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from deepep_train.engines.base import (
    CombineRequest,
    DispatchRequest,
    Engine,
    Payload,
    Prepared,
    Received,
    RedispatchRequest,
)
from deepep_train.engines.expert_layout import extend, ordered_sums, weights_by_pick, weights_by_row
from deepep_train.engines.hops import Hop, Route, direct, to_device
from deepep_train.engines.nvlink_tables import remember, remembered
from deepep_train.engines.peers import Peers
from deepep_train.engines.two_level import Forwarding, forwarding_of, learn_forwarding, two_level
from deepep_train.engines.v1_handle import channels, checked_prefix, need_rank_layout
from deepep_train.errors import ArgumentError
from deepep_train.handle import Plan
from deepep_train.routing import ExpertRows, RankLayout, counted_down, expert_rows, local_topk_idx, rank_layout, tokens_per_node
from deepep_train.streams import current_id, used_here


@dataclass(frozen=True)
class CollectivePlan(Plan):
    """Attributes:
    route: how rows travel.
    row_from: int64 [num_rows], which of the rows that the route gathers each row copies; None if rows stay as they come, with
        zeros behind them up to `num_rows`.
    experts: the expert-major arrangement, None in rank layout.
    stream: the id of the one that made it; the rdma engine's calls record their own tables.
    """

    route: Route
    row_from: Tensor | None
    experts: ExpertRows | None
    stream: int = 0

    def tables(self) -> list[Tensor | None]:
        """All that calls along it read."""
        arrangement = () if self.experts is None else self.experts
        tables = [self.route.order, self.row_from, *(t for t in arrangement if isinstance(t, Tensor))]
        return [*(hop.send_row for hop in self.route.hops), *tables]


class CountsOfAll(NamedTuple):
    """What every rank tells of a fresh dispatch: its `num_worst_tokens`; its rows for each rank, and for each expert, int64
    [R, E], and for each node, int64 [R, nodes] (no columns if nothing is forwarded)."""

    bounds: list[int]
    counts_RR: list[list[int]]
    counts_RE: Tensor
    per_node_RN: Tensor


class Opened(NamedTuple):
    """What a fresh dispatch has before its rows: their way, what this rank forwards if it does, and the words that came along
    for its N rows, int32 [N, words]."""

    route: Route
    forwarding: Forwarding | None
    words: Tensor


class CollectiveEngine(Engine):
    """See the module.

    Args:
        group: any process group, or None for this process alone.
        timeout: seconds before a missing rank is reported.
        num_local_ranks: ranks per node.
        forwards: whether rows take the two-level way between nodes.
        number: of the buffer, the same on all ranks.
    """

    name = "collective"

    def __init__(
        self, group: dist.ProcessGroup | None, timeout: float, num_local_ranks: int, forwards: bool, number: int
    ) -> None:
        self.peers = Peers(group, timeout, number)
        self.peers.connect()
        self.rank = self.peers.rank
        self.num_local_ranks = num_local_ranks
        self.num_nodes = self.peers.size // num_local_ranks
        self.forwards = forwards
        self._token = object()  # of this engine, for what travels with tensors

    def layout(self, topk_idx: Tensor, num_experts: int) -> RankLayout:
        return rank_layout(topk_idx, num_experts, self.peers.size, self.num_nodes)

    # Dispatch ----------------------------------------------------------------------------------------------------------

    def dispatch(self, prepared: Prepared[DispatchRequest]) -> Received:
        peers, rank = self.peers, self.peers.rank
        bounds, counts_RR, counts_RE, per_node_RN = self._exchange_counts(prepared)
        request = prepared.require()
        num_local_experts = request.num_experts // peers.size
        rows_per_expert = counts_RE.sum(0).view(peers.size, num_local_experts)
        aligned = (rows_per_expert + request.alignment - 1) // request.alignment * request.alignment
        self._check_bounds(request, bounds, counts_RR, aligned.sum(1).tolist())

        recv_counts = [row[rank] for row in counts_RR]
        opened = self._open(request, counts_RR, per_node_RN, recv_counts)
        route = opened.route
        num_received = sum(recv_counts)

        source, idx, weights = _apart(opened.words, request)
        if idx is not None:
            idx = local_topk_idx(idx, rank, num_local_experts)
            if weights is not None:
                weights = weights.masked_fill(idx < 0, 0.0)

        experts = None
        if request.arrangement == "expert":
            assert idx is not None
            # A CPU has nothing to wait for, and sorts slowly.
            known = None if idx.device.type == "cpu" else rows_per_expert[rank].tolist()
            experts = expert_rows(idx, num_local_experts, request.alignment, known)
        counts = aligned[rank].to(torch.int64)
        if request.num_worst_tokens:
            counts = counts.to(request.payload.data.device)
        num_rows = request.num_worst_tokens or (num_received if experts is None else experts.num_rows)
        plan = CollectivePlan(
            number=peers.calls,
            num_tokens=request.payload.data.size(0),
            num_received=num_received,
            num_rows=num_rows,
            num_experts=request.num_experts,
            top_k=0 if request.topk_idx is None else request.topk_idx.size(1),
            layout=request.arrangement,
            alignment=request.alignment,
            tokens_per_expert=counts,
            recv_topk_idx=idx if experts is not None or idx is None else extend(idx, num_rows, -1),
            route=route,
            row_from=_row_from(route, experts, num_received, num_rows),
            experts=experts,
            stream=current_id(request.payload.data.device),
        )
        if weights is not None:
            weights = extend(weights if experts is None else weights_by_row(weights, experts), num_rows, 0.0)
        tensors = self._handle_tensors(counts_RR, request, source, opened.forwarding)
        remember(tensors, plan, self._token)  # V1's callers may hand these back as a plain tuple
        return Received(
            payload=self._move(request, plan),
            topk_idx=None if experts is not None else plan.recv_topk_idx,
            topk_weights=weights,
            plan=plan,
            tensors=tensors,
        )

    def _exchange_counts(self, prepared: Prepared[DispatchRequest]) -> CountsOfAll:
        """Agree on a fresh dispatch; raises on every rank if there is anything wrong on any."""
        peers, request, counts, numbers = self.peers, prepared.request, None, [0] * (self.peers.size + 1)
        if request is not None:
            counts = self._counts(request.counted)
            numbers = [request.num_worst_tokens, *counts[: peers.size].tolist()]
        table = peers.agree("dispatch", prepared, numbers)
        assert request is not None and counts is not None  # else `agree` has raised
        further = peers.all_gather(counts[peers.size :], "dispatch").cpu()
        counts_RE, per_node_RN = further.tensor_split([request.num_experts], 1)
        return CountsOfAll([row[0] for row in table], [row[1:] for row in table], counts_RE, per_node_RN)

    def _counts(self, layout: RankLayout) -> Tensor:
        """int64 [R + E + nodes], where headers travel from: this rank's tokens by rank, expert and, if it forwards, node."""
        parts = [layout.num_tokens_per_rank, layout.num_tokens_per_expert]
        if self.forwards:
            parts.append(tokens_per_node(layout.is_token_in_rank, self.num_nodes))
        return torch.cat(parts).to(self.peers.header_device, torch.int64)

    def _open(
        self, request: DispatchRequest, counts_RR: list[list[int]], per_node_RN: Tensor, recv_counts: list[int]
    ) -> Opened:
        """The way of the rows, and what comes along it beside them; `per_node_RN` only if this engine forwards."""
        in_rank = request.counted.is_token_in_rank
        forwarding = None
        if self.forwards:
            forwarding = learn_forwarding(self.peers, in_rank, per_node_RN.tolist(), self.num_local_ranks)
        route = self._route(in_rank, forwarding, recv_counts)
        return Opened(route, forwarding, route.deliver(words_along(request)))

    def redispatch(self, prepared: Prepared[RedispatchRequest]) -> Payload:
        self._agree_if_cheap("dispatch with a handle", prepared)
        request = prepared.require()
        return self._move(request, _in_use(request.plan))

    def _move(self, request: DispatchRequest | RedispatchRequest, plan: CollectivePlan) -> Payload:
        payload = request.payload
        parts = payload.parts()
        got = self._deliver([plain(p) for p in parts], plan, request)
        data, *rest = [g.view(p.dtype) for g, p in zip(got, parts, strict=True)]
        scales = rest[0] if rest else None
        if scales is None or payload.blocks is None:
            return Payload(data, scales)
        splits = [plan.num_rows] if plan.layout == "rank" else plan.tokens_per_expert.tolist()
        return Payload(data, payload.blocks.put(scales, splits, self._padding(plan, data.device)), payload.blocks)

    def _padding(self, plan: CollectivePlan, device: torch.device) -> Tensor:
        """bool [num_rows]: the rows that stand for nothing."""
        if plan.experts is not None:
            return plan.experts.source_row == plan.num_received
        return torch.arange(plan.num_rows, device=device) >= plan.num_received

    def _deliver(
        self, parts: Sequence[Tensor], plan: CollectivePlan, request: DispatchRequest | RedispatchRequest
    ) -> list[Tensor]:
        """The request's [num_tokens, n] each -> [num_rows, n], bit for bit; rows that stand for nothing are zero."""
        if plan.row_from is None:
            return [plan.route.send(rows, plan.num_rows - plan.num_received) for rows in parts]
        return [plan.route.gather(rows).index_select(0, plan.row_from) for rows in parts]

    def _route(self, is_token_in_rank: Tensor, forwarding: Forwarding | None, recv_counts: list[int]) -> Route:
        if forwarding is None:
            return direct(self.peers, is_token_in_rank, recv_counts)
        return two_level(self.peers, is_token_in_rank, forwarding, recv_counts, self.num_local_ranks)

    def _hops(self, route: Route) -> tuple[Hop, ...]:
        return route.hops

    def _check_bounds(self, request: DispatchRequest, bounds: list[int], counts_RR: list[list[int]], rows: list[int]) -> None:
        """Every rank sees every rank's bound and need, so all of them raise."""
        if request.arrangement == "rank":
            rows = [sum(column) for column in zip(*counts_RR, strict=True)]
        short = [r for r, bound in enumerate(bounds) if bound and rows[r] > bound]
        if short:
            what = "; ".join(f"rank {r}: num_worst_tokens={bounds[r]} but {rows[r]} rows arrive" for r in short)
            raise ArgumentError(f"dispatch: {what}", "num_worst_tokens", short)

    def _agree_if_cheap(self, operation: str, prepared: Prepared) -> None:
        """Cached calls exchange no counts. Where a header costs no GPU synchronization, they still make sure that every
        rank is in the same call, with handles of one dispatch: an error on one rank is then an error on all, not a deadline
        missed."""
        if self.peers.header_device.type != "cpu":
            return
        number = 0 if prepared.request is None else prepared.request.plan.number
        numbers = [row[0] for row in self.peers.agree(operation, prepared, [number])]
        known = [n for n in numbers if n]  # a handle that was rebuilt from its tensors does not know
        majority = max(known, key=known.count, default=0)
        odd = [r for r, n in enumerate(numbers) if n not in (0, majority)]
        if odd:
            text = "; ".join(f"of call {n} on rank {r}" for r, n in enumerate(numbers))
            raise ArgumentError(f"{operation}: handle: the ranks use handles of different dispatches: {text}", "handle", odd)
        if 0 in numbers:
            self._agree_on_rows(operation, prepared)

    def _agree_on_rows(self, operation: str, prepared: Prepared) -> None:
        """Handles that were rebuilt from their tensors may not belong together; gloo would abort the process."""
        for hop in self._hops(_mine(prepared.require().plan).route):
            sent = [row[self.peers.rank] for row in self.peers.agree(operation, prepared, hop.send_counts)]
            if sent != hop.recv_counts:
                text = f"handle expects {hop.recv_counts} rows from the ranks, whose handles send {sent}"
                prepared.error = ArgumentError(text, "handle")
        self.peers.agree(operation, prepared, [])

    # Combine -----------------------------------------------------------------------------------------------------------

    def combine(self, prepared: Prepared[CombineRequest]) -> tuple[Tensor, Tensor | None]:
        self._agree_if_cheap("combine", prepared)
        request = prepared.require()
        plan = _in_use(request.plan)
        rows = request.rows[: plan.num_received]
        if plan.experts is not None:
            rows = ordered_sums(request.rows, plan.experts.by_token, plan.experts.offsets)
        z = plan.route.sum_back(rows, request.bias)
        weights = request.weights
        if weights is None:
            return z, None
        if plan.experts is not None:
            weights = weights_by_pick(weights, plan.experts, plan.num_received, plan.top_k)
        return z, plan.route.sum_back(weights[: plan.num_received])

    # Handles -----------------------------------------------------------------------------------------------------------

    def _handle_tensors(
        self, counts_RR: list[list[int]], request: DispatchRequest, source: Tensor, forwarding: Forwarding | None
    ) -> tuple[Tensor, ...]:
        """DeepEP V1's tensors: 6 with one node, 10 with several."""
        rank, num_ranks, device, layout = self.peers.rank, self.peers.size, source.device, request.counted
        in_rank = layout.is_token_in_rank
        on_cpu_RR = torch.tensor(counts_RR, dtype=torch.int32)
        prefix_RR = to_device(on_cpu_RR.cumsum(0, dtype=torch.int32), device)
        sent_R1 = to_device(on_cpu_RR[rank].unsqueeze(1), device)
        no_offset_RC = channels(num_ranks, request.arrangement, device)
        if self.num_nodes == 1:
            return prefix_RR, sent_R1, no_offset_RC, source, in_rank, _positions(in_rank)
        nodes, local = self.num_nodes, self.num_local_ranks
        per_node = layout.num_tokens_per_rdma_rank
        assert per_node is not None
        received_R = prefix_RR[:, rank].contiguous()
        origin = torch.repeat_interleave(
            torch.arange(num_ranks, dtype=torch.int32, device=device),
            to_device(torch.tensor([row[rank] for row in counts_RR]), device),
            output_size=source.numel(),
        )
        if forwarding is None:  # rows by source node, and none that is forwarded
            by_node = received_R.view(nodes, local)[:, -1].contiguous()
            forwarded = torch.empty(0, local, dtype=torch.int32, device=device)
        else:
            by_node = to_device(torch.tensor(forwarding.counts).cumsum(0, dtype=torch.int32), device)
            forwarded = _positions(forwarding.masks)
        return (
            in_rank,
            per_node.unsqueeze(1),
            sent_R1,
            no_offset_RC[:nodes],
            by_node,
            no_offset_RC,
            received_R,
            torch.stack([origin, source], 1),
            _positions(in_rank.view(-1, nodes, local).any(2)),
            forwarded,
        )

    def plan_of(self, tensors: tuple[Tensor, ...]) -> CollectivePlan:
        if (plan := remembered(tensors, self._token)) is not None:
            return _mine(plan)
        need_rank_layout(tensors)
        return self._rebuilt(tensors)

    def _rebuilt(self, tensors: tuple[Tensor, ...]) -> CollectivePlan:
        """What copies of a rank layout's tensors say."""
        if len(tensors) == 6:
            in_rank, prefix_R = tensors[4], checked_prefix(tensors, self.peers.rank, is_slot=False)[:, self.peers.rank]
        else:
            in_rank, prefix_R = tensors[0], tensors[6]
        recv_counts = prefix_R.diff(prepend=prefix_R.new_zeros(1)).tolist()
        num_received = sum(recv_counts)
        route = self._route(in_rank, forwarding_of(tensors) if self.forwards else None, recv_counts)
        return CollectivePlan(
            number=0,
            num_tokens=in_rank.size(0),
            num_received=num_received,
            num_rows=num_received,
            num_experts=0,
            top_k=0,
            layout="rank",
            alignment=1,
            tokens_per_expert=torch.empty(0, dtype=torch.int64),
            recv_topk_idx=None,
            route=route,
            row_from=_row_from(route, None, num_received, num_received),
            experts=None,
            stream=current_id(in_rank.device),
        )

    def check(self) -> None:
        self.peers.check()

    def memory_stats(self) -> dict[str, int]:
        shared = 0 if self.peers.outboxes is None else self.peers.outboxes.num_bytes()
        return {"bytes kept for exchanges": self.peers.scratch.num_bytes() + shared}

    def destroy(self) -> None:
        """The group is the caller's."""
        self.peers.scratch.clear()
        if self.peers.outboxes is not None:
            self.peers.outboxes.close()


def _mine(plan: Plan) -> CollectivePlan:
    assert isinstance(plan, CollectivePlan), "Buffer lets no other engine's handle through"
    return plan


def _in_use(plan: Plan) -> CollectivePlan:
    """A handle may be dropped as soon as a call that uses it returns, on whatever stream: its tables must not."""
    plan = _mine(plan)
    used_here(plan.tables(), plan.stream)
    return plan


def plain(part: Tensor) -> Tensor:
    """FP8 is copied as bytes, which every backend and every index kernel knows."""
    return part.detach().view(torch.uint8) if part.dtype.itemsize == 1 else part.detach()


def words_along(request: DispatchRequest) -> Tensor:
    """What travels beside the rows, int32 [T, words]: the token's number, then its experts and their weights, as given."""
    in_rank = request.counted.is_token_in_rank
    words = [torch.arange(in_rank.size(0), dtype=torch.int32, device=in_rank.device).unsqueeze(1)]
    if request.topk_idx is not None:
        words.append(request.topk_idx.to(torch.int32))
        if request.topk_weights is not None:
            words.append(request.topk_weights.detach().contiguous().view(torch.int32))
    return torch.cat(words, 1)


def _apart(words: Tensor, request: DispatchRequest) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The reverse for received ones: tokens int32 [N], indices int64 and weights float32 [N, K]."""
    source, idx, weights = words[:, 0].contiguous(), None, None
    if request.topk_idx is not None:
        top_k = request.topk_idx.size(1)
        idx = words[:, 1 : 1 + top_k].to(torch.int64)
        if request.topk_weights is not None:
            weights = words[:, 1 + top_k :].contiguous().view(torch.float32)
    return source, idx, weights


def _row_from(route: Route, experts: ExpertRows | None, num_received: int, num_rows: int) -> Tensor | None:
    """See `CollectivePlan`. Padding copies the row of zeros that follows the received ones."""
    if experts is None and route.order is None:
        return None
    if experts is not None:
        row = experts.source_row
    else:
        assert route.order is not None
        row = torch.arange(num_received, device=route.order.device)
    return route.place(extend(row, num_rows, num_received))


def _positions(chosen: Tensor) -> Tensor:
    """int32 of the same shape: how many of the column's entries above are chosen, -1 where it is not."""
    return (counted_down(chosen) - 1).masked_fill_(~chosen, -1)
