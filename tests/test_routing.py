"""The pure functions that decide who gets which token, against plain loops."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import Given, Picture

from deepep_train import routing


@st.composite
def routings(draw: st.DrawFn) -> tuple[torch.Tensor, int, int]:
    """(topk_idx, number of experts, number of ranks)."""
    num_ranks = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    num_experts = num_ranks * draw(st.integers(1, 4))
    top_k = draw(st.integers(1, 5))
    picks = st.lists(st.integers(-1, num_experts - 1), min_size=top_k, max_size=top_k)
    rows = draw(st.lists(picks, max_size=8))
    return torch.tensor(rows, dtype=torch.int64).view(len(rows), top_k), num_experts, num_ranks


def _picture(idx: torch.Tensor, num_experts: int, num_ranks: int) -> Picture:
    """This rank's tokens among others that have none."""
    nothing = Given(torch.empty(0, 1), idx[:0])
    return Picture([Given(torch.empty(idx.size(0), 1), idx)] + [nothing] * (num_ranks - 1), num_experts)


@given(routings())
def test_rank_layout_counts_tokens(drawn: tuple[torch.Tensor, int, int]) -> None:
    idx, num_experts, num_ranks = drawn
    picture = _picture(*drawn)
    layout = routing.rank_layout(idx, num_experts, num_ranks)
    assert layout.num_tokens_per_rank.tolist() == picture.num_tokens_per_rank(0)
    assert layout.num_tokens_per_expert.tolist() == picture.num_tokens_per_expert(0)
    assert torch.equal(layout.is_token_in_rank, picture.is_token_in_rank(0))
    assert layout.num_tokens_per_rdma_rank is None
    assert layout.num_tokens_per_rank.dtype == layout.num_tokens_per_expert.dtype == torch.int32


@given(routings(), st.data())
def test_rank_layout_counts_a_token_once_per_node(drawn: tuple[torch.Tensor, int, int], data: st.DataObject) -> None:
    idx, num_experts, num_ranks = drawn
    num_nodes = data.draw(st.sampled_from([n for n in range(2, num_ranks + 1) if num_ranks % n == 0] or [1]))
    layout = routing.rank_layout(idx, num_experts, num_ranks, num_nodes)
    expected = _picture(*drawn).num_tokens_per_node(0, num_ranks // num_nodes) if num_nodes > 1 else None
    got = layout.num_tokens_per_rdma_rank
    assert (got if got is None else got.tolist()) == expected


@given(routings())
def test_rank_layout_leaves_its_input_alone_and_takes_any_strides(drawn: tuple[torch.Tensor, int, int]) -> None:
    idx, num_experts, num_ranks = drawn
    before = idx.clone()
    column_major = idx.t().contiguous().t()
    for a, b in zip(
        routing.rank_layout(idx, num_experts, num_ranks, num_ranks),
        routing.rank_layout(column_major, num_experts, num_ranks, num_ranks),
        strict=True,
    ):
        assert (a is None and b is None) or torch.equal(a, b)
    assert torch.equal(idx, before)


@given(routings())
def test_send_order_goes_by_destination_then_token(drawn: tuple[torch.Tensor, int, int]) -> None:
    picture = _picture(*drawn)
    destination, token = routing.send_order(picture.is_token_in_rank(0))
    pairs = [(r, t) for r in range(picture.size) for t in range(drawn[0].size(0)) if picture.goes_to(0, t, r)]
    assert list(zip(destination.tolist(), token.tolist(), strict=True)) == pairs


@given(routings())
def test_local_topk_idx_keeps_only_the_ranks_own(drawn: tuple[torch.Tensor, int, int]) -> None:
    idx, num_experts, num_ranks = drawn
    share = num_experts // num_ranks
    for rank in range(num_ranks):
        expected = [[e % share if e >= 0 and e // share == rank else -1 for e in row] for row in idx.tolist()]
        assert routing.local_topk_idx(idx, rank, share).tolist() == expected
    per_row = torch.arange(idx.size(0)).unsqueeze(1) % num_ranks
    rows = zip(idx.tolist(), per_row.flatten().tolist(), strict=True)
    expected = [[e % share if e >= 0 and e // share == r else -1 for e in row] for row, r in rows]
    assert routing.local_topk_idx(idx, per_row, share).tolist() == expected


@given(st.integers(0, 1000), st.integers(1, 64))
def test_round_up(value: int, multiple: int) -> None:
    assert routing.round_up(value, multiple) == min(n for n in range(value, value + multiple) if n % multiple == 0)


@given(routings(), st.sampled_from([1, 2, 3, 8]))
def test_expert_rows_group_pad_and_sum_in_order(drawn: tuple[torch.Tensor, int, int], alignment: int) -> None:
    local_idx, num_experts, _ = drawn
    received, top_k = local_idx.shape
    arrangement = routing.expert_rows(local_idx, num_experts, alignment)

    rows, picks, counts = [], [], []
    by_token: dict[int, list[int]] = {}
    for expert in range(num_experts):
        first = len(rows)
        for n, row in enumerate(local_idx.tolist()):
            for k, picked in enumerate(row):
                if picked == expert:
                    by_token.setdefault(n, []).append(len(rows))
                    rows.append(n)
                    picks.append(n * top_k + k)
        while (len(rows) - first) % alignment:
            rows.append(received)
            picks.append(received * top_k)
        counts.append(len(rows) - first)

    known = torch.bincount(local_idx[local_idx >= 0], minlength=num_experts).tolist()
    told = routing.expert_rows(local_idx, num_experts, alignment, known)
    for one, other in zip(arrangement, told, strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))
    assert list(arrangement.tokens_per_expert) == counts
    assert arrangement.num_rows == len(rows)
    assert arrangement.source_row.tolist() == rows
    assert arrangement.source_pick.tolist() == picks
    offsets = arrangement.offsets.tolist()
    parts = [arrangement.by_token[a:b].tolist() for a, b in itertools.pairwise(offsets)]
    assert parts == [by_token.get(n, []) for n in range(received)]


@pytest.mark.parametrize("num_ranks", [1, 5, 64])
def test_no_tokens(num_ranks: int) -> None:
    layout = routing.rank_layout(torch.empty(0, 3, dtype=torch.int64), num_ranks * 2, num_ranks)
    assert layout.num_tokens_per_rank.tolist() == [0] * num_ranks
    assert layout.is_token_in_rank.shape == (0, num_ranks)
    assert routing.expert_rows(torch.empty(0, 3, dtype=torch.int64), 2, 16).num_rows == 0


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (9, 4)], ids=str)
def test_counted_down_counts_columns(shape: tuple[int, int]) -> None:
    chosen = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    counted = routing.counted_down(chosen)
    assert counted.is_contiguous() and counted.dtype == torch.int32
    assert counted.tolist() == [chosen[: t + 1].sum(0).tolist() for t in range(shape[0])]
