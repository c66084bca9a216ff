"""A fresh dispatch over `Rails` until its rows are passed on: counts, the rows' crossing, tables, and the words beside the
rows, all made on the GPU. csrc/rdma/fresh.hpp says what the kernels are given; the names here are its.

With `num_worst_tokens` the CPU waits for none of it: tensors have room for the most there may be, and how much there is stays
on the GPU. Without, it waits once, for what the counts come to, while the rows cross already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepep_train import _C  # type: ignore[attr-defined]
from deepep_train.engines.base import DispatchRequest, address_of
from deepep_train.engines.rail_domain import DISPATCH, RAIL
from deepep_train.engines.rail_rows import counts_bytes, words_bytes
from deepep_train.engines.rail_tables import ExpertTables, Tables
from deepep_train.engines.rails import Crossed, Rails


class Told(NamedTuple):
    """What this rank tells all others: its row of counts, int32, and, which it keeps, [T, nodes] its tokens' places."""

    row: Tensor
    place: Tensor
    in_rank: Tensor


class Found(NamedTuple):
    """What all ranks' counts come to, on the GPU: parts of `block`, int32 but for the first, int64."""

    block: Tensor
    tokens_per_expert: Tensor
    found: Tensor
    send_at: Tensor
    recv_at: Tensor
    received_upto: Tensor
    theirs: Tensor
    begin: Tensor
    expert_base: Tensor

    @property
    def received(self) -> Tensor:
        """int32 [1]: N."""
        return self.found[2:3]

    @property
    def goes(self) -> Tensor:
        """int32 [1]: whether rows may cross."""
        return self.found[5:6]


class Sizes(NamedTuple):
    """What the CPU knows of them, or the most there may be: rows that this rank receives, rows of its tensor, rows of one
    stream of any rank, rows that leave this rank, rows that it forwards; and int64 [experts here], on the CPU where it knows
    them."""

    num_received: int
    num_rows: int
    most: int
    num_leaving: int
    num_forwarded: int
    tokens_per_expert: Tensor


class Seen(NamedTuple):
    """What the CPU has waited for of it; all but the sizes as in `Found.found`."""

    verdict: int
    is_bounded: int
    goes: int
    sizes: Sizes


class Leaving(NamedTuple):
    """A dispatch's rows before anybody knows how many there are, with room for the most there may be.

    Attributes:
        crossed: the rows, and room for where those that come will lie.
        token: int32 [T * nodes], room for `Tables.token`.
    """

    crossed: Crossed
    token: Tensor


class Words(NamedTuple):
    """What came beside the N rows: int32 [N, 2] their ranks and tokens, int64 [N, K] local experts, float32 [N, K] weights; and
    [F, local ranks], of the rows that this rank forwards, their numbers among those for each rank of its node.

    In expert layout also room for what `arrange` makes of them, and for the weights of all rows, float32 [M] of zeros. It is
    taken before the words cross, as the rest is: this rank can still refuse then, in its node and to its rail.
    """

    source: Tensor
    topk_idx: Tensor | None
    topk_weights: Tensor | None
    number: Tensor
    experts: ExpertTables | None = None
    chunks: Tensor | None = None
    row_weights: Tensor | None = None


class _ToCpu:
    """int32 [n] on its way from the GPU, for whose arrival the CPU waits, and for nothing that is launched behind it."""

    def __init__(self, n: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._block = torch.empty(n, dtype=torch.int32, device="cpu", pin_memory=on_gpu)
        self._came = torch.cuda.Event() if on_gpu else None

    def leave(self, block: Tensor) -> None:
        self._block.copy_(block, non_blocking=True)
        if self._came is not None:
            self._came.record()

    def wait(self) -> Tensor:
        if self._came is not None:
            self._came.synchronize()
        return self._block


class Fresh:
    """The steps, in their order, of one rank's fresh dispatches."""

    def __init__(self, rails: Rails) -> None:
        self._rails = rails
        self._found_words = rails.kernels.found_words
        self.num_ranks = rails.peers.size
        self._row_words = counts_bytes(self.num_ranks, rails.nodes) // 4

    def tell(self, request: DispatchRequest | None, wrong: Tensor | None, signature: int) -> Told:
        """This rank's row, `wrong` int32 [1]; without a request word that there is none."""
        rails, p = self._rails, self._rails.kernels.TellParams()
        row = self._ints(self._row_words)
        p.row, p.row_words, p.num_ranks, p.num_nodes, p.status = row.data_ptr(), row.numel(), self.num_ranks, rails.nodes, 1
        place, in_rank = self._ints(0, rails.nodes), torch.empty(0, self.num_ranks, dtype=torch.bool, device=rails.device)
        if request is not None:
            assert wrong is not None
            layout = request.counted
            per_rank, per_expert = layout.num_tokens_per_rank.contiguous(), layout.num_tokens_per_expert.contiguous()
            in_rank = layout.is_token_in_rank.contiguous()
            place = self._ints(in_rank.size(0), rails.nodes)
            p.is_token_in_rank, p.wrong, p.place = in_rank.data_ptr(), wrong.data_ptr(), place.data_ptr()
            p.num_tokens_per_rank, p.num_tokens_per_expert = per_rank.data_ptr(), per_expert.data_ptr()
            p.signature, p.bound, p.status = signature, min(request.num_worst_tokens, (1 << 31) - 1), 0
            p.num_tokens, p.num_experts = in_rank.size(0), request.num_experts
        rails.end.tell(p, rails.stream())
        return Told(row, place, in_rank)

    def make_ready(self, told: Told, parts: Sequence[Tensor], widest: int) -> Leaving | None:
        """What a dispatch's rows need to cross. None: in stages they cross while others are passed on, none before."""
        if not self._rails.crosses_ahead:
            return None
        num_tokens, nodes = told.place.shape
        capacity = self._most_forwarded(num_tokens, widest)
        return Leaving(self._rails.to_cross(parts, capacity), self._ints(num_tokens * nodes))

    def _most_forwarded(self, num_tokens: int, widest: int) -> int:
        rails, most = self._rails, self._rails.room(widest)
        return min(num_tokens, most) + (rails.nodes - 1) * most

    def count(
        self, told: Told, leaving: Leaving | None, request: DispatchRequest | None, widest: int, signature: int, of_rows: int
    ) -> tuple[Found, Seen | None]:
        """Exchange the rows of counts, and let the dispatch's rows cross right behind if they may, which is found on the GPU.
        Without num_worst_tokens the CPU waits for the counts. Between these two nothing but launches can fail: a rank that did
        would refuse an exchange that others may not enter, and wait for them until the deadline.

        Args:
            leaving: of `request`; both None: this rank has but word that its arguments are wrong, and nobody's rows will cross.
            widest: bytes that each row will need in a segment.
            signature, of_rows: of the counts and of the rows, as for `Rails.dispatch`.
        """
        rails, num_experts = self._rails, 0 if request is None else request.num_experts
        waits = request is None or not request.num_worst_tokens
        steps = (*DISPATCH, RAIL) if rails.crosses_ahead else DISPATCH  # whatever this rank's own arguments are
        with rails.operation(rails.everyone, *steps) as stream:
            found, rows = self._room_for_found(num_experts // self.num_ranks), self._ints(self.num_ranks)
            to_cpu = _ToCpu(found.block.numel(), rails.device) if waits else None
            data = told.row.unsqueeze(0).view(torch.uint8)
            p = rails.kernels.DigestParams()
            p.rows, p.result_words, p.report = rows.data_ptr(), found.block.numel(), rails.report.data_ptr()
            for name, part in zip(found._fields[1:], found[1:], strict=True):
                setattr(p, name, part.data_ptr())
            p.tokens_per_expert = found.block.data_ptr()  # where all begin; torch gives no address for none
            p.rank, p.num_ranks, p.num_local_ranks, p.row_words = rails.peers.rank, self.num_ranks, rails.local, self._row_words
            p.room, p.widest, p.num_experts = rails.room(widest), widest, num_experts
            if request is not None:
                p.alignment, p.expert_layout = request.alignment, int(request.arrangement == "expert")
            num_sms = 0 if request is None else request.num_sms
            table = rails.arena.temporary((self.num_ranks, data.size(1)), torch.uint8)
            addresses = rails.exchange(rails.everyone, [data], data.size(1), signature, num_sms, stream)
            rails.forward(rails.everyone, [data], addresses, [table], signature, num_sms, stream)
            p.table = table.data_ptr()
            rails.end.digest(p, stream)
            if to_cpu is not None:
                to_cpu.leave(found.block)
            if leaving is not None:
                assert request is not None
                p = self._to_pack(told, found, leaving.token)
                rails.end.pack_words(p, stream)
                self._cross(told, found, leaving, request, of_rows, stream, found.goes)
            rails.owe_no_more()
            return found, None if to_cpu is None else self._seen(found, to_cpu.wait())

    def cross(
        self, told: Told, found: Found, leaving: Leaving, request: DispatchRequest, widest: int, signature: int
    ) -> Leaving:
        """The rows, for which there was no room when `count` would have let them cross, and is now; gives what it was given
        with room for where they will lie."""
        rails, data = self._rails, leaving.crossed.data
        with rails.operation(None, *DISPATCH) as stream:
            addresses = rails.addresses(len(data), self._most_forwarded(told.place.size(0), widest))
            leaving = leaving._replace(crossed=Crossed(data, addresses))
            self._cross(told, found, leaving, request, signature, stream, None)
            rails.owe_no_more()
            return leaving

    def _cross(
        self,
        told: Told,
        found: Found,
        leaving: Leaving,
        request: DispatchRequest,
        signature: int,
        stream: int,
        goes: Tensor | None,
    ) -> None:
        crossed, token = leaving
        tables = Tables(token, found.send_at, found.recv_at, self._ints(0, self._rails.local), told.place, 0, stream)
        self._rails.cross(tables, crossed, signature, request.num_sms, stream, goes)

    def _to_pack(self, told: Told, found: Found, token: Tensor) -> Any:
        """`PackParams` that ask for tokens, and for no words."""
        p = self._rails.kernels.PackParams()
        p.is_token_in_rank, p.place, p.send_at = told.in_rank.data_ptr(), told.place.data_ptr(), found.send_at.data_ptr()
        p.token, p.num_ranks = token.data_ptr(), self.num_ranks
        p.num_tokens, p.num_nodes = told.place.shape
        return p

    def _seen(self, found: Found, block: Tensor) -> Seen:
        numbers, at, nodes = block.tolist(), 2 * found.expert_base.numel(), self._rails.nodes  # all at once: it is waited for
        sent_at = at + self._found_words
        recv_at = sent_at + nodes + 1
        verdict, is_bounded, num_received, num_rows, most, goes = numbers[at : at + 6]
        leaving, forwarded = numbers[sent_at + nodes], numbers[recv_at + nodes]
        per_expert = block[:at].clone().view(torch.int64)
        return Seen(verdict, is_bounded, goes, Sizes(num_received, num_rows, most, leaving, forwarded, per_expert))

    def sizes(self, found: Found, seen: Seen | None, request: DispatchRequest, widest: int) -> Sizes:
        """Without `seen` the tensors have room for the most there may be."""
        rails, bound = self._rails, request.num_worst_tokens
        if seen is None:
            num_tokens, most = request.payload.data.size(0), rails.room(widest)
            forwarded = self._most_forwarded(num_tokens, widest)
            return Sizes(bound, bound, most, num_tokens * rails.nodes, forwarded, found.tokens_per_expert)
        return seen.sizes

    def open(
        self, told: Told, found: Found, sizes: Sizes, request: DispatchRequest, behind: int, signature: int
    ) -> tuple[Tables, Words]:
        """The dispatch's tables, and what comes beside its rows, which lie in their segments, `behind` bytes each, until they
        are passed on. Which ranks of the node a row is for goes with it, so that its forwarder knows."""
        rails, idx, weights = self._rails, request.topk_idx, request.topk_weights
        top_k, local = 0 if idx is None else idx.size(1), rails.local
        row_bytes = words_bytes(top_k, weights is not None, local)
        with rails.operation(None, *DISPATCH) as stream:
            rails.need_room(sizes.most, behind + row_bytes)
            idx, weights = (None if t is None else t.detach().contiguous() for t in (idx, weights))
            came = rails.arena.temporary((sizes.num_received, row_bytes), torch.uint8)
            slot, number = self._ints(sizes.num_forwarded, local), self._ints(sizes.num_forwarded, local)
            got = self._room_for_words(found, sizes, request, number)
            token, words = self._ints(sizes.num_leaving), self._ints(sizes.num_leaving, row_bytes // 4)
            tables = Tables(token, found.send_at, found.recv_at, slot, told.place, sizes.most, stream)
            each = torch.arange(sizes.num_leaving, dtype=torch.int32, device=rails.device)
            by_row = replace(tables, token=each)  # a row that leaves has words of its own
            p = self._to_pack(told, found, token)
            p.topk_idx, p.topk_weights, p.words = address_of(idx), address_of(weights), words.data_ptr()
            p.top_k, p.row_words = top_k, words.size(1)
            rails.end.pack_words(p, stream)
            data = words.view(torch.uint8)
            addresses = rails.exchange(by_row, [data], row_bytes, signature, request.num_sms, stream, behind)
            s = rails.kernels.SlotParams()
            s.addresses, s.recv_at = addresses.data_ptr(), found.recv_at.data_ptr()
            s.theirs, s.begin = found.theirs.data_ptr(), found.begin.data_ptr()
            s.slot, s.number, s.capacity = slot.data_ptr(), number.data_ptr(), sizes.num_forwarded
            s.mask_at = 1 + top_k * (1 if weights is None else 2)
            s.num_nodes, s.num_local_ranks = rails.nodes, local
            rails.end.find_slots(s, stream)
            rails.forward(tables, [data], addresses, [came], signature, request.num_sms, stream)
            self._unpack(came, found, request, got, stream)
            return tables, got

    def _room_for_words(self, found: Found, sizes: Sizes, request: DispatchRequest, number: Tensor) -> Words:
        device, n = self._rails.device, sizes.num_received
        source, idx, weights = self._ints(n, 2), None, None
        if request.topk_idx is not None:
            idx = torch.empty(n, request.topk_idx.size(1), dtype=torch.int64, device=device)
            if request.topk_weights is not None:
                weights = torch.empty(idx.shape, dtype=torch.float32, device=device)
        got = Words(source, idx, weights, number)
        if request.arrangement != "expert":
            return got
        assert idx is not None
        rows_of, row_slot, pick_row = self._ints(*idx.shape), self._ints(sizes.num_rows), self._ints(*idx.shape)
        experts = ExpertTables(rows_of, row_slot, pick_row, found.received)
        by_row = None if weights is None else torch.zeros(sizes.num_rows, dtype=torch.float32, device=device)
        chunks = self._ints(_C.place_chunks, found.expert_base.numel())
        return got._replace(experts=experts, chunks=chunks, row_weights=by_row)

    def _unpack(self, came: Tensor, found: Found, request: DispatchRequest, got: Words, stream: int) -> None:
        rails, num_local = self._rails, request.num_experts // self.num_ranks
        p = rails.kernels.UnpackParams()
        p.words, p.received_upto, p.num_received = came.data_ptr(), found.received_upto.data_ptr(), found.received.data_ptr()
        p.source, p.topk_idx, p.topk_weights = got.source.data_ptr(), address_of(got.topk_idx), address_of(got.topk_weights)
        p.capacity, p.row_words, p.num_ranks = came.size(0), came.size(1) // 4, self.num_ranks
        p.top_k = 0 if got.topk_idx is None else got.topk_idx.size(1)
        p.first_expert, p.num_local_experts = rails.peers.rank * num_local, num_local
        rails.end.unpack_words(p, stream)

    def arrange(self, got: Words, found: Found, num_sms: int) -> None:
        """The rows of received tokens by expert: what `got.experts` is to hold."""
        rails, idx, experts, chunks = self._rails, got.topk_idx, got.experts, got.chunks
        assert idx is not None and experts is not None and chunks is not None
        p = _C.PlaceParams()
        p.topk_idx, p.expert_base = idx.data_ptr(), found.expert_base.data_ptr()
        p.pick_row, p.chunk_counts = experts.pick_row.data_ptr(), chunks.data_ptr()
        p.num_tokens, p.top_k, p.num_experts, p.num_ranks = *idx.shape, found.expert_base.numel(), 1
        with rails.operation(None) as stream:
            rails.comm.place_picks(p, stream)
            experts.rows_of.copy_(experts.pick_row)
            a = _C.ArrangeParams()
            a.rows_of, a.row_slot = experts.rows_of.data_ptr(), experts.row_slot.data_ptr()
            a.num_received, a.num_rows, a.top_k = experts.received.data_ptr(), experts.row_slot.numel(), idx.size(1)
            a.num_sms = rails.sms(num_sms, "dispatch")
            rails.comm.arrange_rows(a, stream)

    def _ints(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=self._rails.device)

    def _widths(self, num_local_experts: int) -> list[int]:
        nodes, local = self._rails.nodes, self._rails.local
        streams = nodes * local
        return [
            2 * num_local_experts,
            self._found_words,
            nodes + 1,
            nodes + 1,
            self.num_ranks,
            streams,
            streams,
            num_local_experts,
        ]

    def _room_for_found(self, num_local_experts: int) -> Found:
        return self._parts(self._ints(sum(self._widths(num_local_experts))), num_local_experts)

    def _parts(self, block: Tensor, num_local_experts: int) -> Found:
        per_expert, *others = block.split_with_sizes(self._widths(num_local_experts))
        return Found(block, per_expert.view(torch.int64), *others)


def move_weights(rails: Rails, weights: Tensor, experts: ExpertTables, by_row: Tensor | None = None) -> Tensor:
    """float32 [N, K] -> [M] to `by_row`, which is 0.0, and stays so on padding. Without it back: [M] -> [N, K], 0.0 where the
    expert lives elsewhere."""
    num_rows, weights, back = experts.row_slot.numel(), weights.detach().contiguous(), by_row is None
    out = torch.empty(experts.pick_row.shape, dtype=torch.float32, device=rails.device) if by_row is None else by_row
    p = rails.kernels.WeightParams()
    by_pick, by_row = (out, weights) if back else (weights, out)
    p.by_pick, p.by_row = by_pick.data_ptr(), by_row.data_ptr()
    p.pick_row, p.num_picks, p.num_rows, p.back = experts.pick_row.data_ptr(), experts.pick_row.numel(), num_rows, int(back)
    with rails.operation(None) as stream:
        rails.end.move_weights(p, stream)
    return out
