"""Quantized tensors through dispatch on 2 and 3 ranks: their bits, where the scales stand, gradients, errors."""

from __future__ import annotations

from typing import Any

import fp8_misuses
import pytest
import torch
import torch.distributed as dist
from draws import Exchange
from harness import assert_same_bits, run_ranks
from reference import Given, Picture
from torch import Tensor

import deepep_train as dt
from deepep_train import fp8
from deepep_train.fp8 import Recipe

HIDDEN = 256


def case(layout: str, size: int = 3, alignment: int = 8) -> tuple[Exchange, list[Given]]:
    exchange = Exchange((7, 0, 12)[-size:], HIDDEN, 3, 3, "mixed", torch.bfloat16, layout, alignment)
    g = exchange.generator()
    xs = [(torch.randn(n, HIDDEN, generator=g) * 3).bfloat16() for n in exchange.tokens]
    given = [Given(x, old.topk_idx, old.topk_weights) for x, old in zip(xs, exchange.given(), strict=True)]
    return exchange, given


def quantized(x: Tensor, recipe: Recipe) -> fp8.Quantized:
    return fp8.quantize(x, recipe, scale=torch.tensor([1 / 32]) if recipe is Recipe.TENSOR else None)


def fields(q: fp8.Quantized) -> dict[str, Any]:
    return {"recipe": q.recipe, "data": q.data, "scales": q.scales, "splits": q.splits, "values": q.dequantize().detach()}


def send(
    rank: int, size: int, group: dist.ProcessGroup, exchange: Exchange, given: list[Given], recipe: Recipe, c: list
) -> Any:
    """What arrived, what a second dispatch along the handle brings, and the gradients of Σ values · c and of Σ weights."""
    buffer, mine = dt.Buffer(group, timeout=20), given[rank]
    x, weights = mine.x.clone().requires_grad_(), mine.topk_weights.clone().requires_grad_()
    how = {"num_experts": exchange.num_experts, "layout": exchange.layout, "alignment": exchange.alignment}
    out = dt.dispatch(quantized(x, recipe), mine.topk_idx, weights, buffer=buffer, **how)
    again = dt.dispatch(quantized(x, recipe), buffer=buffer, handle=out.handle).x
    loss = (out.x.dequantize() * c[rank]).sum() + out.topk_weights.sum()
    loss.backward()
    z = dt.combine(c[rank], out.handle)
    return fields(out.x), fields(again), x.grad, weights.grad, z


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("layout", ["rank", "expert"])
@pytest.mark.parametrize("recipe", Recipe)
def test_what_arrives_is_what_the_quantizer_makes_of_the_same_rows(recipe: Recipe, layout: str, size: int) -> None:
    exchange, given = case(layout, size)
    picture = Picture(given, exchange.num_experts)
    arrived = [picture.arrive(r, layout, exchange.alignment) for r in range(size)]
    c = [torch.randn(len(a.rows), HIDDEN).bfloat16() for a in arrived]
    for rank, (got, again, grad_x, grad_w, z) in enumerate(run_ranks(size, send, exchange, given, recipe, c)):
        rows, x = arrived[rank].rows, arrived[rank].x
        splits = arrived[rank].tokens_per_expert if layout == "expert" else [len(rows)]
        assert list(got["splits"]) == splits
        expected = quantized(x, recipe)
        assert_same_bits(got["data"], expected.data, "data")
        assert_same_bits(got["values"], expected.dequantize(), "values")
        assert_same_bits(got["scales"], scales_in_place(expected, splits), "scales")
        for name in ("data", "scales", "values"):
            assert_same_bits(again[name], got[name], name)
        # The gradient is the combine of the values' gradients, in bfloat16; a pick that went nowhere has none.
        assert_same_bits(grad_x, z)
        assert_same_bits(grad_w, (given[rank].topk_idx >= 0).float())


def scales_in_place(q: fp8.Quantized, splits: list[int]) -> Tensor:
    """The scales of all rows, those of zeros included, one block for each group, zeros between: element by element."""
    if q.recipe is Recipe.TENSOR:
        return q.scales
    scales, n = q.row_scales(), q.row_scales().size(1)
    parts, first = [], 0
    for m in splits:
        part = scales.new_zeros((n, -(-m // 4) * 4) if q.recipe is Recipe.BLOCK else (-(-m // 128) * 128, n))
        for t in range(m):
            for kb in range(n):
                part[(kb, t) if q.recipe is Recipe.BLOCK else (t, kb)] = scales[first + t, kb]
        parts.append(part.reshape(-1))
        first += m
    return torch.cat(parts)


def worst(rank: int, size: int, group: dist.ProcessGroup, given: list[Given], num_experts: int) -> dict[str, Any]:
    mine = given[rank]
    out = dt.dispatch(
        quantized(mine.x, Recipe.BLOCK),
        mine.topk_idx,
        buffer=dt.Buffer(group, timeout=20),
        num_experts=num_experts,
        num_worst_tokens=50,
    )
    return fields(out.x)


def test_num_worst_tokens_in_rank_layout() -> None:
    exchange, given = case("rank")
    picture = Picture(given, exchange.num_experts)
    for rank, got in enumerate(run_ranks(3, worst, given, exchange.num_experts)):
        arrived = picture.arrive(rank, "rank", worst=50)
        assert got["splits"] == (50,)
        expected = quantized(arrived.x, Recipe.BLOCK)
        assert_same_bits(got["data"], expected.data)
        assert_same_bits(got["scales"], scales_in_place(expected, [50]))


# Combine's backward ------------------------------------------------------------------------------------------------------


def backward_in_fp8(
    rank: int, size: int, group: dist.ProcessGroup, exchange: Exchange, given: list[Given], grads: list, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """y's gradient by way of `dtype`, and as it is."""
    buffer, mine = dt.Buffer(group, timeout=20), given[rank]
    how = {"num_experts": exchange.num_experts, "layout": exchange.layout, "alignment": exchange.alignment}
    out = dt.dispatch(mine.x, mine.topk_idx, buffer=buffer, **how)
    result = []
    for grad_dtype in (dtype, None):
        y = torch.zeros_like(out.x).requires_grad_()
        dt.combine(y, out.handle, grad_dtype=grad_dtype).backward(grads[rank])
        result.append(y.grad)
    return result[0], result[1]


@pytest.mark.parametrize("layout", ["rank", "expert"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float8_e4m3fn, 0.03), (torch.float8_e5m2, 0.06)])
def test_combines_gradient_quantized_once(dtype: torch.dtype, bound: float, layout: str) -> None:
    exchange, given = case(layout)
    grads = [(torch.randn(n, HIDDEN) * 1e-5).bfloat16() for n in exchange.tokens]
    sent = [fp8.quantize(g.float(), fp8_dtype=dtype).dequantize(torch.bfloat16) for g in grads]
    picture = Picture(given, exchange.num_experts)
    for rank, (got, exact) in enumerate(run_ranks(3, backward_in_fp8, exchange, given, grads, dtype)):
        rows = picture.arrive(rank, layout, exchange.alignment).rows
        assert_same_bits(got, picture.gather(rows, sent))
        assert_same_bits(exact, picture.gather(rows, grads))
        error = float((got.double() - exact.double()).norm() / exact.double().norm())
        assert bound / 4 < error < bound


# Errors ------------------------------------------------------------------------------------------------------------------


def wrong(rank: int, size: int, group: dist.ProcessGroup, name: str) -> tuple[str, Any, Any]:
    return fp8_misuses.on_a_rank(rank, dt.Buffer(group, timeout=10), "cpu", name)


@pytest.mark.parametrize(("name", "argument", "texts"), fp8_misuses.EXPECTED)
def test_an_error_on_one_rank_is_an_error_on_all(name: str, argument: str, texts: list[str]) -> None:
    fp8_misuses.check(run_ranks(3, wrong, name), name, argument, texts)


# Plain pairs that ask for blocks ------------------------------------------------------------------------------------------


def pair_in_blocks(rank: int, size: int, group: dist.ProcessGroup, exchange: Exchange, given: list[Given]) -> list[Tensor]:
    """Packed UE8M0 words: in blocks, along the handle, by rows; and the counts."""
    buffer, mine = dt.Buffer(group, timeout=20), given[rank]
    how = {"num_experts": exchange.num_experts, "layout": exchange.layout, "alignment": exchange.alignment}
    data, scales = fp8.quantize_blocks(mine.x.repeat(1, 2), power_of_two=True)
    pair = fp8.Payload(data, fp8.pack_ue8m0(scales), fp8.ScaleBlocks(True, 4, 7))
    out = dt.dispatch(pair, mine.topk_idx, buffer=buffer, **how)
    again = dt.dispatch(pair, buffer=buffer, handle=out.handle)
    by_row = dt.dispatch(pair[:2], buffer=buffer, handle=out.handle)
    return [out.x[1], again.x[1], by_row.x[1], out.tokens_per_expert]


@pytest.mark.parametrize("layout", ["rank", "expert"])
def test_a_pair_may_ask_for_blocks(layout: str) -> None:
    exchange, given = case(layout, alignment=6)
    picture = Picture(given, exchange.num_experts)
    for rank, (got, again, by_row, counts) in enumerate(run_ranks(3, pair_in_blocks, exchange, given)):
        rows = picture.arrive(rank, layout, exchange.alignment).rows
        expected, first = [], 0
        for m in counts.tolist() if layout == "expert" else [len(rows)]:
            block = torch.zeros(1, -(-m // 4) * 4, dtype=torch.int32)
            for t in range(m):
                block[0, t] = 7 if rows[first + t] is None else by_row[first + t, 0]
            expected.append(block.view(-1))
            first += m
        assert_same_bits(got, torch.cat(expected))
        assert_same_bits(again, got)
