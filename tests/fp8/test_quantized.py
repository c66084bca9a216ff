"""Transformer Engine's numerics and layouts, value by value against float64 arithmetic on the table of FP8 numbers."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from harness import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

from deepep_train import ArgumentError, fp8
from deepep_train.fp8 import Quantized, Recipe

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def f32(value: float) -> float:
    """The nearest float32."""
    return float(torch.tensor(value, dtype=torch.float64).to(torch.float32))


@functools.cache
def table(dtype: torch.dtype) -> list[tuple[float, int]]:
    """Every finite number that is not negative, with its code, in order."""
    values = torch.arange(128, dtype=torch.uint8).view(dtype).to(torch.float64).tolist()
    return [(v, code) for code, v in enumerate(values) if math.isfinite(v)]


def nearest(value: float, dtype: torch.dtype) -> int:
    """The code of the nearest number, ties to the even code, everything beyond the ends to the ends."""
    _, code = min(table(dtype), key=lambda entry: (abs(entry[0] - abs(value)), entry[1] & 1))
    return code + 128 if math.copysign(1, value) < 0 else code


def block_factor(amax: float, largest: float, power_of_two: bool, min_amax: float) -> float:
    amax = max(amax, min_amax)
    if amax == 0:
        return 1.0
    factor = f32(largest / amax)
    return 2.0 ** (math.frexp(factor)[1] - 1) if power_of_two else factor


def mx_exponent(amax: float, largest: float) -> int:
    scale = f32(amax * f32(1 / largest))
    if scale == 0:
        return 0
    mantissa, exponent = math.frexp(scale)
    return max(exponent - (mantissa == 0.5) + 127, 0)


def check(x: Tensor, q: Quantized, size: int, power_of_two: bool, min_amax: float) -> None:
    largest, codes, scales = torch.finfo(q.data.dtype).max, q.data.view(torch.uint8), q.row_scales()
    for r, row in enumerate(x.to(torch.float64).tolist()):
        for b in range(x.size(1) // size):
            block = row[b * size : (b + 1) * size]
            amax = max(map(abs, block))
            if q.recipe is Recipe.MXFP8:
                exponent = mx_exponent(amax, largest)
                assert int(scales[r, b]) == exponent
                factor = 2.0 ** (127 - exponent) if exponent else 1.0
            else:
                factor = block_factor(amax, largest, power_of_two, min_amax)
                assert float(scales[r, b]) == f32(1 / factor)
            assert codes[r, b * size : (b + 1) * size].tolist() == [nearest(f32(v * factor), q.data.dtype) for v in block]


@settings(max_examples=25)
@given(
    recipe=st.sampled_from([Recipe.BLOCK, Recipe.MXFP8]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    fp8_dtype=st.sampled_from(FP8),
    power_of_two=st.booleans(),
    min_amax=st.sampled_from([0.0, 0.25]),
    seed=st.integers(0, 1000),
    exponents=st.lists(st.integers(-30, 30), min_size=1, max_size=3),
)
def test_against_the_table(
    recipe: Recipe,
    dtype: torch.dtype,
    fp8_dtype: torch.dtype,
    power_of_two: bool,
    min_amax: float,
    seed: int,
    exponents: list[int],
) -> None:
    x = torch.randn(len(exponents), 128, generator=torch.Generator().manual_seed(seed))
    x = (x * torch.exp2(torch.tensor(exponents, dtype=torch.float32)).unsqueeze(1)).clamp(-6e4, 6e4).to(dtype)
    x[0, :32] = 0.0
    q = fp8.quantize(x, recipe, fp8_dtype=fp8_dtype, power_of_two=power_of_two, min_amax=min_amax)
    assert q.data.dtype == fp8_dtype
    assert q.dtype == dtype
    check(x, q, 32 if recipe is Recipe.MXFP8 else 128, power_of_two, min_amax)


def test_ends_of_the_range() -> None:
    """Zeros, a magnitude whose scale float32 cannot hold, an infinity, and NaN, which harms only itself."""
    x = torch.zeros(4, 128)
    x[1, 0] = 1e-38
    x[2, :2] = torch.tensor([math.inf, 1.0])
    x[3, :2] = torch.tensor([math.nan, 448.0])
    q = fp8.quantize(x)
    big = 2.0**127  # float32's largest without its mantissa
    assert q.row_scales().squeeze(1).tolist() == [1.0, 1 / big, 1.0, 1.0]
    values = q.dequantize()
    assert values[2, :2].tolist() == [448.0, 1.0]
    assert values[3, 0].isnan()
    assert float(values[3, 1]) == 448.0
    assert not values[0].any()
    mx = fp8.quantize(x, Recipe.MXFP8).row_scales()[:, 0].tolist()
    assert mx[0] == 0
    assert mx[2:] == [0xFE, 127]


def test_one_scale_for_all() -> None:
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(1)) * 300
    scale = torch.tensor([0.37])
    q = fp8.quantize(x, Recipe.TENSOR, scale=scale)
    inverse = f32(1 / float(scale))
    expected = [[nearest(f32(v * inverse), torch.float8_e4m3fn) for v in row] for row in x.tolist()]
    assert q.data.view(torch.uint8).tolist() == expected
    assert_same_bits(q.scales, scale)
    assert_same_bits(q.dequantize(), q.data.float() * scale)


@settings(max_examples=25)
@given(splits=st.lists(st.integers(0, 9), min_size=1, max_size=5), blocks=st.integers(1, 3), data=st.data())
def test_scales_stand_where_grouped_gemm_reads_them(splits: list[int], blocks: int, data: st.DataObject) -> None:
    recipe = data.draw(st.sampled_from([Recipe.BLOCK, Recipe.MXFP8]))
    n, hidden = (blocks, 128 * blocks) if recipe is Recipe.BLOCK else (4 * blocks, 128 * blocks)
    dtype = torch.float32 if recipe is Recipe.BLOCK else torch.uint8
    row_scales = torch.arange(1, sum(splits) * n + 1).to(dtype).view(sum(splits), n)
    rows = torch.zeros(sum(splits), hidden)
    assert recipe.blocks is not None
    q = Quantized(recipe, rows.to(torch.float8_e4m3fn), recipe.blocks.put(row_scales, splits), tuple(splits), rows)
    assert q.row_scales().tolist() == row_scales.tolist()
    flat: list[float] = []
    first = 0
    for m in splits:
        mine = row_scales[first : first + m].tolist()
        if recipe is Recipe.BLOCK:  # [K / 128, roundup(M_e, 4)]
            flat += [mine[t][kb] if t < m else 0 for kb in range(n) for t in range(-(-m // 4) * 4)]
        else:  # [roundup(M_e, 128), K / 32]
            flat += [mine[t][kb] if t < m else 0 for t in range(-(-m // 128) * 128) for kb in range(n)]
        first += m
    assert q.scales.tolist() == flat
    assert [tuple(d.shape) for d, _ in q.groups()] == [(m, hidden) for m in splits]
    assert torch.equal(torch.cat([s.reshape(-1) for _, s in q.groups()]), q.scales)


@pytest.mark.parametrize("recipe", Recipe)
def test_the_error_of_a_round_trip_and_its_gradient(recipe: Recipe) -> None:
    x = torch.randn(20, 256, generator=torch.Generator().manual_seed(2), dtype=torch.float32, requires_grad=True)
    scale = torch.tensor([1 / 64]) if recipe is Recipe.TENSOR else None
    y = fp8.quantize(x, recipe, scale=scale).dequantize(torch.float64)
    assert float((y.detach() - x.detach()).norm() / x.detach().norm()) < 0.03
    c = torch.randn_like(y)
    y.backward(c)
    assert_same_bits(x.grad, c.float())


@pytest.mark.parametrize(
    ("argument", "value", "text"),
    [
        ("x", torch.zeros(2, 100), "100"),
        ("x", torch.zeros(2, 0), "0"),
        ("x", torch.zeros(256), "256"),
        ("x", torch.zeros(2, 128, dtype=torch.float64), "float64"),
        ("recipe", "block", "block"),
        ("fp8_dtype", torch.uint8, "uint8"),
        ("scale", torch.ones(1), "None otherwise"),
        ("min_amax", "a", "'a'"),
        ("min_amax", -1.0, "-1"),
        ("power_of_two", 1, "1"),
    ],
)
def test_wrong_arguments_are_named(argument: str, value: Any, text: str) -> None:
    arguments: dict[str, Any] = {"x": torch.zeros(2, 128)} | {argument: value}
    with pytest.raises(ArgumentError, match=text) as caught:
        fp8.quantize(**arguments)
    assert caught.value.argument == argument


@pytest.mark.parametrize("hidden", [2048, 7168])
@pytest.mark.parametrize("recipe", Recipe)
def test_bytes_on_the_wire(recipe: Recipe, hidden: int) -> None:
    x = torch.ones(3, hidden, dtype=torch.bfloat16)
    wire = fp8.quantize(x, recipe, scale=torch.ones(1) if recipe is Recipe.TENSOR else None).to_wire()
    assert wire.scales is not None
    crossing = wire.data.numel() * wire.data.element_size() + wire.scales.numel() * wire.scales.element_size()
    assert crossing <= 0.53 * x.nbytes


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_scale_must_be_positive(value: float) -> None:
    with pytest.raises(ArgumentError, match="positive and finite") as caught:
        fp8.quantize(torch.zeros(2, 128), Recipe.TENSOR, scale=torch.tensor([value]))
    assert caught.value.argument == "scale"


def test_what_stands_for_the_values_needs_no_memory() -> None:
    """Transformer Engine's tensors stand for their own."""
    x = torch.ones(2, 128)
    q = fp8.quantize(x)
    Quantized(q.recipe, q.data, q.scales, q.splits, TwoTensor(x, x)).check("x")
