"""`dispatch` and `combine` on 2, 3 and 4 ranks, bit for bit against the picture of all ranks at once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from comparing import Got, check, check_arrived, check_worst, exchange, same_rows
from draws import FLOATS, FP8, SCALES, STYLES, Exchange, exchanges, row_values, values
from harness import assert_same_bits, run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Given, Picture
from torch import Tensor

import deepep_train as dt

SIZES = (2, 3, 4)


@pytest.mark.parametrize("size", SIZES)
@given(data=st.data(), num_biases=st.integers(0, 2))
def test_random_routings(size: int, data: st.DataObject, num_biases: int) -> None:
    check(data.draw(exchanges(size)), num_biases)


@given(case=exchanges(3, FP8), dtype=st.sampled_from(FLOATS))
def test_fp8_pairs_arrive_to_the_bit(case: Exchange, dtype: torch.dtype) -> None:
    check(case, dtype=dtype)


@pytest.mark.parametrize("layout", ["rank", "expert"])
@pytest.mark.parametrize("style", STYLES)
def test_routing_styles_with_uneven_tokens(style: str, layout: str) -> None:
    check(Exchange((9, 0, 4), 16, 4, 2, style, torch.bfloat16, layout, 4))


@pytest.mark.parametrize("layout", ["rank", "expert"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_floating_dtype(dtype: torch.dtype, layout: str) -> None:
    check(Exchange((40, 33), 24, 6, 3, "uniform", dtype, layout), num_biases=2)


@pytest.mark.parametrize("scales", SCALES, ids=str)
@pytest.mark.parametrize("data", FP8, ids=str)
def test_every_kind_of_fp8_pair(data: torch.dtype, scales: torch.dtype) -> None:
    for layout in ("rank", "expert"):
        case = Exchange((6, 3), 384, 3, 2, "uniform", data, layout, 8, scales, strided=True)
        check(case, dtype=torch.float32)


@pytest.mark.parametrize("top_k", [1, 8, 11, 20])
def test_any_top_k(top_k: int) -> None:
    check(Exchange((5, 6), 4, top_k, 12, "distinct", torch.float32, "expert", 2))


@pytest.mark.parametrize("hidden", [1, 7, 5120])
def test_any_hidden_size(hidden: int) -> None:
    check(Exchange((3, 4), hidden, 2, 2, "uniform", torch.bfloat16))


@pytest.mark.parametrize("layout", ["rank", "expert"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_single_number_with_a_stride(dtype: torch.dtype, layout: str) -> None:
    """torch calls it contiguous whatever its stride."""
    check(Exchange((1, 0), 1, 1, 1, "one rank", dtype, layout, strided=True), num_biases=2)


def test_no_tokens_anywhere() -> None:
    for layout in ("rank", "expert"):
        check(Exchange((0, 0, 0), 8, 2, 2, "uniform", torch.bfloat16, layout, 4), num_biases=1)


def test_the_same_expert_twice_is_two_rows_in_order_of_k() -> None:
    x = torch.arange(4.0).view(2, 2)
    given = [Given(x, torch.tensor([[3, 0, 3], [3, 3, -1]]), torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])) for _ in "ab"]
    arrived = Picture(given, 4).arrive(1, "expert")
    assert [tuple(row) for row in arrived.rows[:4]] == [(0, 0, 0), (0, 0, 2), (0, 1, 0), (0, 1, 1)]
    case = Exchange((2, 2), 2, 3, 2, "twins", torch.float32, "expert")
    ys = [torch.randn(len(Picture(given, 4).arrive(r, "expert").rows), 2) for r in range(2)]
    for rank, got in enumerate(run_ranks(2, exchange, case, given, ys, [None, None])):
        check_arrived(got, Picture(given, 4).arrive(rank, "expert"), rank)


# Rounding ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_order_of_the_sum_shows_in_the_cases(dtype: torch.dtype) -> None:
    """Guards the tests above: summed in another order, or rounded elsewhere, their numbers would give other bits."""
    case = Exchange((40, 33, 20), 24, 6, 3, "uniform", dtype, "expert")
    picture = Picture(case.given(), case.num_experts)
    origins = [picture.arrive(r, "expert").rows for r in range(3)]
    ys = row_values(case.generator(), origins, case.hidden, dtype)
    biases = [values(case.generator(), 40, case.hidden, dtype)]
    right = picture.combine(0, ys, origins, biases)
    other_experts = picture.combine(0, [y.flip(0) for y in ys], [o[::-1] for o in origins], biases)
    other_ranks = picture.combine(0, ys[::-1], origins[::-1], biases)
    unbiased = picture.combine(0, ys, origins)
    bias_last = (unbiased.double() + biases[0].double()).to(dtype)
    for wrong in (other_experts, other_ranks, bias_last):
        assert not torch.equal(right, wrong)


def test_zeros_are_positive_where_nothing_is_added() -> None:
    """A token routed nowhere gives +0.0, and sums start from +0.0, so a lone -0.0 comes back as +0.0."""
    idx = torch.tensor([[0], [-1]])
    given = [Given(torch.ones(2, 2), idx, torch.ones(2, 1)) for _ in range(2)]
    ys = [torch.full((2, 2), -0.0), torch.zeros(0, 2)]
    case = Exchange((2, 2), 2, 1, 1, "uniform", torch.float32)
    for got in run_ranks(2, exchange, case, given, ys, [None, None]):
        assert_same_bits(got.z, torch.zeros(2, 2))


# num_worst_tokens -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spare", [0, 1, 9])
@settings(max_examples=15)
@given(case=exchanges(3, (*FLOATS, torch.float8_e4m3fn)))
def test_num_worst_tokens_pads_to_exactly_so_many_rows(spare: int, case: Exchange) -> None:
    check_worst(case, spare)


# Handles ----------------------------------------------------------------------------------------------------------------


def use_handles_in_any_order(
    rank: int, size: int, group: dist.ProcessGroup, cases: list[Exchange], given: list[list[Given]], ys: list[list[Tensor]]
) -> list[Tensor]:
    """Dispatches all cases first, then combines them in reverse, each twice and in two hidden sizes."""
    buffer = dt.Buffer(group, timeout=20)
    outs = []
    for case, g in zip(cases, given, strict=True):
        how = {"num_experts": case.num_experts, "layout": case.layout, "alignment": case.alignment}
        outs.append(dt.dispatch(g[rank].x, g[rank].topk_idx, None, buffer=buffer, **how))
        assert outs[-1].topk_weights is None
    results = []
    for out, y in reversed(list(zip(outs, ys, strict=True))):
        z = dt.combine(y[rank], out.handle)
        wide = dt.combine(torch.cat([y[rank], y[rank]], 1), out.handle)
        assert_same_bits(wide, torch.cat([z, z], 1))
        assert_same_bits(dt.combine(y[rank], out.handle), z)
        results.append(z)
    return results[::-1]


@pytest.mark.parametrize("size", SIZES)
def test_handles_are_independent_and_reusable(size: int) -> None:
    base = Exchange((5, 0, 7, 2)[:size], 6, 3, 2, "mixed", torch.bfloat16)
    cases = [replace(base, seed=s, layout=("rank", "expert")[s % 2], top_k=s + 1, alignment=s + 1) for s in range(4)]
    given = [[Given(g.x, g.topk_idx) for g in case.given()] for case in cases]
    pictures = [Picture(g, base.num_experts) for g in given]
    origins = [[p.arrive(r, c.layout, c.alignment).rows for r in range(size)] for p, c in zip(pictures, cases, strict=True)]
    ys = [row_values(base.generator(), o, 4, torch.float16) for o in origins]
    for rank, results in enumerate(run_ranks(size, use_handles_in_any_order, cases, given, ys)):
        for picture, y, o, z in zip(pictures, ys, origins, results, strict=True):
            assert_same_bits(z, picture.combine(rank, y, o))


def alone(rank: int, size: int, group: dist.ProcessGroup, case: Exchange, given: list[Given], ys: list[Tensor]) -> Got:
    """Every rank makes a group of its own; nothing travels."""
    own = [dist.new_group([r]) for r in range(size)][rank]
    buffer = dt.Buffer(own, timeout=20)
    mine = given[0]
    how = {"num_experts": case.num_experts, "layout": case.layout, "alignment": case.alignment}
    out = dt.dispatch(mine.x, mine.topk_idx, mine.topk_weights, buffer=buffer, **how)
    again = dt.dispatch(mine.x, buffer=buffer, handle=out.handle)
    return Got(out.x, out.topk_idx, out.topk_weights, out.tokens_per_expert, dt.combine(ys[0], out.handle), again.x)


@settings(max_examples=15)
@given(case=exchanges(1))
def test_a_group_of_one(case: Exchange) -> None:
    given = case.given()
    picture = Picture(given, case.num_experts)
    arrived = picture.arrive(0, case.layout, case.alignment)
    ys = row_values(case.generator(), [arrived.rows], 3, torch.bfloat16)
    for got in run_ranks(2, alone, case, given, ys):
        check_arrived(got, arrived, 0)
        same_rows(got.again, arrived.x)
        assert_same_bits(got.z, picture.combine(0, ys, [arrived.rows]))
