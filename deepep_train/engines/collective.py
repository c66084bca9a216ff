"""The engine that runs anywhere: dispatch and combine over torch.distributed's collectives, gloo or NCCL.

Every row crosses to each destination rank once; copies for further experts are made there. Rows are gathered by
destination, exchanged with one all-to-all, and arrive in the order the contract wants: by source rank, then by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

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
from deepep_train.engines.expert_layout import accumulator, extend, ordered_sums, weights_by_pick, weights_by_row
from deepep_train.engines.peers import Peers
from deepep_train.engines.scratch import Scratch
from deepep_train.errors import ArgumentError
from deepep_train.handle import Plan
from deepep_train.routing import ExpertRows, RankLayout, expert_rows, local_topk_idx, rank_layout, send_order


@dataclass(frozen=True)
class CollectivePlan(Plan):
    """Attributes:
    send_token: int64 [S], the token of every row sent, by destination and then by token.
    send_counts, recv_counts: rows sent to and received from each rank.
    experts: the expert-major arrangement, None in rank layout.
    source_row: int64 [M], the row that each of its rows copies, of: this rank's own, then what other ranks sent, then zeros.
    """

    send_token: Tensor
    send_counts: list[int]
    recv_counts: list[int]
    experts: ExpertRows | None
    source_row: Tensor | None = None


class CollectiveEngine(Engine):
    """See the module.

    Args:
        group: any process group, or None for this process alone.
        timeout: seconds before a missing rank is reported.
        num_local_ranks: ranks per node, for the per-node counts of DeepEP V1's multi-node calls.
        number: of the buffer, the same on all ranks.
    """

    name = "collective"

    def __init__(self, group: dist.ProcessGroup | None, timeout: float, num_local_ranks: int, number: int) -> None:
        self.peers = Peers(group, timeout, number)
        self.rank = self.peers.rank
        self.num_nodes = self.peers.size // num_local_ranks
        self._scratch = Scratch()

    def layout(self, topk_idx: Tensor, num_experts: int) -> RankLayout:
        return rank_layout(topk_idx, num_experts, self.peers.size, self.num_nodes)

    # Dispatch ----------------------------------------------------------------------------------------------------------

    def dispatch(self, prepared: Prepared[DispatchRequest]) -> Received:
        peers, rank = self.peers, self.peers.rank
        numbers = [0] * (peers.size + 1)
        if (request := prepared.request) is not None:
            numbers = [request.num_worst_tokens, *request.layout.num_tokens_per_rank.tolist()]
        table = peers.agree("dispatch", prepared, numbers)
        assert request is not None  # else `agree` has raised
        num_local_experts = request.num_experts // peers.size
        counts_RR = [row[1:] for row in table]  # rows from each source to each destination
        counts_RE = peers.all_gather(request.layout.num_tokens_per_expert, "dispatch")
        rows_per_expert = counts_RE.sum(0).view(peers.size, num_local_experts).cpu()
        aligned = (rows_per_expert + request.alignment - 1) // request.alignment * request.alignment
        self._check_bounds(request, [row[0] for row in table], counts_RR, aligned.sum(1).tolist())

        send_counts, recv_counts = counts_RR[rank], [row[rank] for row in counts_RR]
        destination, token = send_order(request.layout.is_token_in_rank)
        num_received = sum(recv_counts)

        idx = weights = None
        source = peers.all_to_all_rows(token.to(torch.int32), send_counts, recv_counts, "dispatch")
        if request.topk_idx is not None:
            mine = local_topk_idx(request.topk_idx[token], destination.unsqueeze(1), num_local_experts)
            idx = peers.all_to_all_rows(mine, send_counts, recv_counts, "dispatch")
            if request.topk_weights is not None:
                sent = request.topk_weights[token].masked_fill_(mine < 0, 0.0)
                weights = peers.all_to_all_rows(sent, send_counts, recv_counts, "dispatch")

        experts = None
        if request.arrangement == "expert":
            assert idx is not None
            experts = expert_rows(idx, num_local_experts, request.alignment)
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
            send_token=token,
            send_counts=send_counts,
            recv_counts=recv_counts,
            experts=experts,
            source_row=None if experts is None else _own_first(experts.source_row, recv_counts, rank),
        )
        if weights is not None:
            weights = extend(weights if experts is None else weights_by_row(weights, experts), num_rows, 0.0)
        return Received(
            payload=self._move(request.payload, plan),
            topk_idx=None if experts is not None else plan.recv_topk_idx,
            topk_weights=weights,
            plan=plan,
            tensors=self._handle_tensors(counts_RR, request.layout, source, destination, token),
        )

    def redispatch(self, prepared: Prepared[RedispatchRequest]) -> Payload:
        self._agree_if_cheap("dispatch with a handle", prepared)
        request = prepared.require()
        return self._move(request.payload, _mine(request.plan))

    def _move(self, payload: Payload, plan: CollectivePlan) -> Payload:
        return Payload(*(None if t is None else self._move_rows(t, plan) for t in payload))  # type: ignore[arg-type]

    def _move_rows(self, rows: Tensor, plan: CollectivePlan) -> Tensor:
        """[num_tokens, n] -> [num_rows, n], bit for bit; rows that stand for nothing are zero."""
        rows, dtype = rows.detach(), rows.dtype
        if dtype.itemsize == 1:
            rows = rows.view(torch.uint8)  # FP8: copied as bytes, which every backend and every index kernel knows
        if plan.source_row is not None:
            gathered = self._gather(rows, plan).index_select(0, plan.source_row)
            return extend(gathered, plan.num_rows, 0).view(dtype)
        is_alone = self.peers.size == 1  # then these very rows may be the result
        sent = None if is_alone else self._scratch.empty("sent", (plan.send_token.numel(), *rows.shape[1:]), rows)
        sent = torch.index_select(rows, 0, plan.send_token, out=sent)
        spare = plan.num_rows - plan.num_received
        return self.peers.all_to_all_rows(sent, plan.send_counts, plan.recv_counts, "dispatch", spare).view(dtype)

    def _gather(self, rows: Tensor, plan: CollectivePlan) -> Tensor:
        """What `plan.source_row` numbers; this rank's own rows go straight to their place."""
        give, take, own = list(plan.send_counts), list(plan.recv_counts), plan.recv_counts[self.rank]
        first = sum(give[: self.rank])
        before, mine, behind = plan.send_token.tensor_split([first, first + own])
        give[self.rank] = take[self.rank] = 0
        got = self._scratch.empty("received", (plan.num_received + 1, *rows.shape[1:]), rows)
        torch.index_select(rows, 0, mine, out=got[:own])
        sent = self._scratch.empty("sent", (sum(give), *rows.shape[1:]), rows)
        torch.index_select(rows, 0, before, out=sent[:first])
        torch.index_select(rows, 0, behind, out=sent[first:])
        self.peers.all_to_all_rows(sent, give, take, "dispatch", 1, got[own:])
        return got

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

    # Combine -----------------------------------------------------------------------------------------------------------

    def combine(self, prepared: Prepared[CombineRequest]) -> tuple[Tensor, Tensor | None]:
        self._agree_if_cheap("combine", prepared)
        request = prepared.require()
        plan = _mine(request.plan)
        rows = request.rows[: plan.num_received]
        if plan.experts is not None:
            rows = ordered_sums(request.rows, plan.experts.by_token, plan.experts.offsets)
        z = self._sum_over_ranks(rows, plan, request.bias)
        weights = request.weights
        if weights is None:
            return z, None
        if plan.experts is not None:
            weights = weights_by_pick(weights, plan.experts, plan.num_received, plan.top_k)
        return z, self._sum_over_ranks(weights[: plan.num_received], plan)

    def _sum_over_ranks(self, rows: Tensor, plan: CollectivePlan, bias: Sequence[Tensor] = ()) -> Tensor:
        """[num_received, n] -> [num_tokens, n]: from +0.0, the biases in order, then ascending ranks, rounded once."""
        back = self._scratch.empty("received", (plan.send_token.numel(), *rows.shape[1:]), rows)
        back = self.peers.all_to_all_rows(rows, plan.recv_counts, plan.send_counts, "combine", out=back)
        if not bias and rows.device.type == "cpu":
            # Sorted by token and stable, what was sent stays in order of ranks.
            token, index = plan.send_token.sort(stable=True)
            offsets = torch.searchsorted(token, torch.arange(plan.num_tokens + 1, device=token.device))
            return ordered_sums(back, index, offsets)
        total = torch.zeros(plan.num_tokens, rows.size(1), dtype=accumulator(rows.dtype), device=rows.device)
        for b in bias:
            total.add_(b)
        start = 0
        for count in plan.send_counts:
            here = slice(start, start + count)
            # A token occurs once per rank, so no two additions meet and the order is the loop's.
            total.index_add_(0, plan.send_token[here], back[here].to(total.dtype))
            start += count
        return total.to(rows.dtype)

    # Handles -----------------------------------------------------------------------------------------------------------

    def _handle_tensors(
        self, counts_RR: list[list[int]], layout: RankLayout, source: Tensor, destination: Tensor, token: Tensor
    ) -> tuple[Tensor, ...]:
        """DeepEP V1's tensors: 6 with one node, 10 with several. V1's channels are one here."""
        rank, num_ranks, device = self.peers.rank, self.peers.size, source.device
        in_rank = layout.is_token_in_rank
        prefix_RR = torch.tensor(counts_RR, dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
        sent_R1 = torch.tensor(counts_RR[rank], dtype=torch.int32, device=device).unsqueeze(1)
        starts = [0, *accumulate(counts_RR[rank])][:-1]
        position = torch.arange(token.numel(), device=device) - torch.tensor(starts, device=device)[destination]
        send_head_TR = torch.full(in_rank.shape, -1, dtype=torch.int32, device=device)
        send_head_TR[token, destination] = position.to(torch.int32)
        no_offset_R1 = torch.zeros(num_ranks, 1, dtype=torch.int32, device=device)
        if self.num_nodes == 1:
            return prefix_RR, sent_R1, no_offset_R1, source, in_rank, send_head_TR
        nodes = self.num_nodes
        per_node = layout.num_tokens_per_rdma_rank
        assert per_node is not None
        received_R = prefix_RR[:, rank].contiguous()
        origin = torch.repeat_interleave(
            torch.arange(num_ranks, dtype=torch.int32, device=device),
            torch.tensor([row[rank] for row in counts_RR], device=device),
        )
        return (
            in_rank,
            per_node.unsqueeze(1),
            sent_R1,
            no_offset_R1[:nodes],
            received_R.view(nodes, -1)[:, -1].contiguous(),  # nothing is forwarded: rows by source node
            no_offset_R1,
            received_R,
            torch.stack([origin, source], 1),
            send_head_TR.view(-1, nodes, num_ranks // nodes).amax(2),
            torch.empty(0, num_ranks // nodes, dtype=torch.int32, device=device),
        )

    def plan_of(self, tensors: tuple[Tensor, ...]) -> CollectivePlan:
        if len(tensors) == 6:
            in_rank, prefix_R = tensors[4], tensors[0][:, self.peers.rank]
        else:
            in_rank, prefix_R = tensors[0], tensors[6]
        recv_counts = prefix_R.diff(prepend=prefix_R.new_zeros(1)).tolist()
        return CollectivePlan(
            number=0,
            num_tokens=in_rank.size(0),
            num_received=sum(recv_counts),
            num_rows=sum(recv_counts),
            num_experts=0,
            top_k=0,
            layout="rank",
            alignment=1,
            tokens_per_expert=torch.empty(0, dtype=torch.int64),
            recv_topk_idx=None,
            send_token=send_order(in_rank)[1],
            send_counts=in_rank.sum(0).tolist(),
            recv_counts=recv_counts,
            experts=None,
        )

    def check(self) -> None:
        self.peers.check()

    def destroy(self) -> None:
        """The group is the caller's."""
        self._scratch.clear()


def _own_first(source_row: Tensor, recv_counts: list[int], rank: int) -> Tensor:
    """Numbers of received rows as numbers among: those from `rank`, then the others, then one behind them all."""
    first, own = sum(recv_counts[:rank]), recv_counts[rank]
    is_own = (source_row >= first) & (source_row < first + own)
    return torch.where(is_own, source_row - first, torch.where(source_row < first, source_row + own, source_row))


def _mine(plan: Plan) -> CollectivePlan:
    assert isinstance(plan, CollectivePlan), "Buffer lets no other engine's handle through"
    return plan
