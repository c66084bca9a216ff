"""When the nvlink engine may trust what a layout remembers of itself. Runs its Python on CPU tensors, no kernel."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from deepep_train.engines.nvlink_tables import (
    Known,
    checked_of,
    parts_of,
    remember,
    remembered,
    seen,
    words_at,
    words_of,
)
from deepep_train.errors import ArgumentError
from deepep_train.routing import RankLayout, rank_layout

nvlink = pytest.importorskip("deepep_train.engines.nvlink", reason="built without nvcc", exc_type=ImportError)


def marks(layout: RankLayout, topk_idx: torch.Tensor | None = None) -> tuple[tuple[int, int] | None, ...] | None:
    return seen(layout.num_tokens_per_rank, layout.num_tokens_per_expert, layout.is_token_in_rank, topk_idx)


def given() -> RankLayout:
    """As V1's callers hand it back, with what `is_token_in_rank` remembers: numbers that no recount would give."""
    layout = rank_layout(torch.tensor([[0], [1], [-1]]), 2, 2)
    mark = torch.tensor([0, 77], dtype=torch.int32)
    layout.is_token_in_rank.deepep_train_layout = Known(
        mark, marks(layout), (layout.num_tokens_per_rank, layout.num_tokens_per_expert, None)
    )
    return layout


def checked(layout: RankLayout, topk_idx: torch.Tensor | None = None) -> torch.Tensor:
    return checked_of(layout, topk_idx, 2)


def test_a_plain_tuple_knows_its_buffer() -> None:
    handle, plan = tuple(torch.zeros(2, 2, dtype=torch.int32) for _ in range(6)), object()
    here, elsewhere = object(), object()
    remember(handle, plan, here)  # type: ignore[arg-type]
    assert remembered(handle, here) is plan
    with pytest.raises(ArgumentError, match="another buffer") as caught:
        remembered(handle, elsewhere)
    assert caught.value.argument == "handle"
    handle[5][0, 0] = 1
    assert remembered(handle, here) is None


def test_copies_carry_no_plan() -> None:
    """Nor do they fail: a plan may hold process groups, which cannot be pickled."""
    handle, here = tuple(torch.zeros(2, 2, dtype=torch.int32) for _ in range(6)), object()
    remember(handle, threading.Lock(), here)  # type: ignore[arg-type]
    assert remembered(handle, here) is not None
    file = io.BytesIO()
    torch.save(handle, file)
    file.seek(0)
    for copies in (torch.load(file, weights_only=True), copy.deepcopy(handle), pickle.loads(pickle.dumps(handle))):
        assert remembered(copies, here) is None
        assert all(torch.equal(a, b) for a, b in zip(copies, handle, strict=True))


def test_an_untouched_layout_is_trusted() -> None:
    assert checked(given()).tolist() == [0, 77]


def test_another_view_of_the_counts_is_counted_again() -> None:
    layout = given()
    other = layout._replace(num_tokens_per_rank=layout.num_tokens_per_rank[:1].expand(2))
    assert other.num_tokens_per_rank.data_ptr() == layout.num_tokens_per_rank.data_ptr()
    assert checked(other)[1:].tolist() == [0, -1, -1, 0, -1, -1]
    halves = rank_layout(torch.tensor([[0], [0], [-1]]), 2, 2)
    halves.is_token_in_rank.deepep_train_layout = Known(
        torch.tensor([0, 77]), marks(halves), (halves.num_tokens_per_rank, halves.num_tokens_per_expert, None)
    )
    assert checked(halves._replace(num_tokens_per_rank=halves.num_tokens_per_rank[:1].expand(2)))[0].item() == 1


def test_a_changed_layout_is_counted_again() -> None:
    layout = given()
    layout.is_token_in_rank[2, 1] = True
    found = checked(layout)
    assert found[1:].tolist() == [0, -1, -1, 0, -1, 1]
    assert found[0].item() == 1  # its counts are no longer those of num_tokens_per_rank


def test_writes_in_inference_mode_cannot_be_seen_so_it_is_counted_again() -> None:
    with torch.inference_mode():
        layout = given()
        assert marks(layout) is None
        assert checked(layout)[1:].tolist() == [0, -1, -1, 0, -1, -1]
        layout.is_token_in_rank[2, 1] = True
        assert checked(layout)[0].item() == 1


@pytest.mark.parametrize("wrong", [-2, 2])
def test_a_recount_looks_at_the_indices_too(wrong: int) -> None:
    with torch.inference_mode():
        layout = given()
        assert checked(layout, torch.tensor([[0], [1], [-1]]))[0].item() == 0
        assert checked(layout, torch.tensor([[0], [1], [wrong]]))[0].item() == 1


@pytest.mark.parametrize("counts_tokens", [False, True])
@pytest.mark.parametrize("expert_layout", [False, True])
def test_a_dispatchs_tables_lie_side_by_side(expert_layout: bool, counts_tokens: bool) -> None:
    """Every table has its own words of the block, in which nothing is left over but what makes their number even."""
    tokens, top_k, experts, ranks, chunks = 5, 3, 6, 2, 128
    tables = nvlink._C.Tables(tokens, top_k, experts, ranks, expert_layout, counts_tokens)
    block = torch.zeros(tables.words, dtype=torch.int32)
    assert tables.lay_out(block.data_ptr()) == tables.words
    words = {"tokens_per_expert": 2 * experts // ranks, "rank_prefix_matrix": ranks * ranks, "num_received": 1}
    words |= {"num_several": 1, "num_summed": 1, "send_slot": tokens * ranks}
    unseen = ranks + experts  # send_base and expert_base, which only kernels read
    if counts_tokens:
        words |= {"num_tokens_per_rank": ranks, "num_tokens_per_expert": experts, "checked": 1 + tokens * ranks}
        words |= {"is_token_in_rank": -(-tokens * ranks // 4)}
    if expert_layout:
        words |= {
            "send_row": tokens * ranks,
            "pull_row": tokens * ranks,
            "pick_row": tokens * top_k,
            "pick_rank": tokens * top_k,
        }
        unseen += chunks * experts
    for name, count in words.items():
        words_at(block, getattr(tables, name), 1, count).add_(1)
    assert block.max() == 1
    assert block.sum() == sum(words.values())
    assert tables.words == (sum(words.values()) + unseen + 1) // 2 * 2
    if not expert_layout:
        assert tables.send_slot == tables.send_row == tables.pull_row


@pytest.mark.parametrize("by_row", [False, True])
def test_what_comes_beside_the_rows_shares_an_allocation(by_row: bool) -> None:
    kinds = [(torch.float32, 3), None, (torch.float32, 0), (torch.int64, 2)]
    beside, dispatch = nvlink._C.Beside(words_of(kinds), by_row), nvlink._C.DispatchParams()
    whole = torch.zeros(beside.measure(5, 7), dtype=torch.int32)
    beside.place(dispatch, 64, 700, whole.data_ptr())
    made = parts_of(whole, beside, kinds)
    assert [None if t is None else tuple(t.shape) for t in made] == [(5, 3), None, (7 if by_row else 5,), (5, 2)]
    assert [None if t is None else t.dtype for t in made] == [None if kind is None else kind[0] for kind in kinds]
    assert dispatch.offsets == [64, *(0 if t is None else t.data_ptr() for t in made)]
    assert dispatch.sizes == [700, *(0 if t is None else t.nbytes for t in made)]
    assert all(t is None or (t.data_ptr() - whole.data_ptr()) % 16 == 0 for t in made)


def test_what_comes_beside_the_rows_may_be_written_to() -> None:
    """As `_Dispatch` returns weights and saves indices, which lie in one allocation."""
    kinds: Any = [None, (torch.int64, 2), (torch.float32, 2), (torch.int32, 0)]
    beside = nvlink._C.Beside(words_of(kinds), False)

    class Dispatch(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, weights: Tensor) -> Tensor:
            _, idx, here, source = parts_of(torch.zeros(beside.measure(5, 5), dtype=torch.int32), beside, kinds)
            assert idx is not None and here is not None and source is not None
            ctx.save_for_backward(idx)
            source.add_(1)
            return here.copy_(weights)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad + ctx.saved_tensors[0]

    weights = torch.rand(5, 2, requires_grad=True)
    here = Dispatch.apply(weights)
    here.mul_(3)
    here.sum().backward()
    assert torch.equal(weights.grad, torch.full((5, 2), 3.0))


def test_scales_that_go_on_from_where_they_come() -> None:
    beside, dispatch = nvlink._C.Beside([0, 2, 0, 1], False), nvlink._C.DispatchParams()
    assert beside.measure(3, 3) == 12
    beside.place(dispatch, 64, 700, 1024, 4096, 24)
    assert dispatch.offsets == [64, 4096, 1024, 0, 1056]
    assert dispatch.sizes == [700, 24, 24, 0, 12]
