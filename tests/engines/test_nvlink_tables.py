"""When the nvlink engine may trust what a layout remembers of itself. Runs its Python on CPU tensors, no kernel."""

from __future__ import annotations

import pytest
import torch

from deepep_train.engines.nvlink_tables import Known, NvlinkLayout, remember, remembered, seen
from deepep_train.errors import ArgumentError
from deepep_train.routing import RankLayout, rank_layout

nvlink = pytest.importorskip("deepep_train.engines.nvlink", reason="built without nvcc", exc_type=ImportError)


def marks(layout: RankLayout, topk_idx: torch.Tensor | None = None) -> tuple[tuple[int, int] | None, ...] | None:
    return seen(layout.num_tokens_per_rank, layout.num_tokens_per_expert, layout.is_token_in_rank, topk_idx)


def given() -> RankLayout:
    """As V1's callers hand it back, with what `is_token_in_rank` remembers: numbers that no recount would give."""
    layout = rank_layout(torch.tensor([[0], [1], [-1]]), 2, 2)
    mark = torch.tensor([0, 77], dtype=torch.int32)
    layout.is_token_in_rank.deepep_train_layout = Known(mark, marks(layout), ())
    return layout


def known(layout: RankLayout, topk_idx: torch.Tensor | None = None) -> NvlinkLayout:
    return nvlink.NvlinkEngine._known(None, layout, topk_idx, 2)


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


def test_an_untouched_layout_is_trusted() -> None:
    assert known(given()).checked.tolist() == [0, 77]


def test_a_changed_layout_is_counted_again() -> None:
    layout = given()
    layout.is_token_in_rank[2, 1] = True
    found = known(layout)
    assert found.checked[1:].tolist() == [0, -1, -1, 0, -1, 1]
    assert found.checked[0].item() == 1  # its counts are no longer those of num_tokens_per_rank


def test_writes_in_inference_mode_cannot_be_seen_so_it_is_counted_again() -> None:
    with torch.inference_mode():
        layout = given()
        assert marks(layout) is None
        assert known(layout).checked[1:].tolist() == [0, -1, -1, 0, -1, -1]
        layout.is_token_in_rank[2, 1] = True
        assert known(layout).checked[0].item() == 1


@pytest.mark.parametrize("wrong", [-2, 2])
def test_a_recount_looks_at_the_indices_too(wrong: int) -> None:
    with torch.inference_mode():
        layout = given()
        assert known(layout, torch.tensor([[0], [1], [-1]])).checked[0].item() == 0
        assert known(layout, torch.tensor([[0], [1], [wrong]])).checked[0].item() == 1
