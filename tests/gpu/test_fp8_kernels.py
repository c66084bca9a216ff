"""The kernels of csrc/fp8 against the torch code whose bits they promise."""

from __future__ import annotations

import pytest
import torch
from harness import assert_same_bits
from torch import Tensor

from deepep_train import fp8
from deepep_train.fp8 import Recipe, kernels
from deepep_train.fp8.deepep import scaled_in_torch
from deepep_train.fp8.quantized import quantize_in_torch


def draw(rows: int, hidden: int, dtype: torch.dtype) -> Tensor:
    """Magnitudes of many orders, with zeros, infinities and NaN among them."""
    g = torch.Generator("cuda").manual_seed(rows + hidden)
    magnitude = torch.logspace(-42, 38, max(rows, 1), device="cuda", dtype=torch.float64)[:rows].unsqueeze(1)
    x = torch.randn(rows, hidden, device="cuda", generator=g).double().mul(magnitude).to(dtype)
    if rows > 8:
        x[5] = 0
        x[6, :128] = 0
        x[7, 3], x[7, 4] = float("inf"), -float("inf")
        x[8, 5] = float("nan")
    return x


@pytest.mark.parametrize(("rows", "hidden"), [(0, 256), (1, 128), (77, 384), (1000, 7168)])
@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("fp8_dtype", fp8.DTYPES)
def test_quantize(fp8_dtype: torch.dtype, dtype: torch.dtype, power_of_two: bool, rows: int, hidden: int) -> None:
    x = draw(rows, hidden, dtype)
    for min_amax in (0.0, 1e-4):
        got = kernels.quantize(x, fp8_dtype, power_of_two, min_amax)
        assert got is not None
        data, scales = quantize_in_torch(x, Recipe.BLOCK, fp8_dtype, power_of_two, min_amax, None)
        assert_same_bits(got[1], scales, "scales")
        assert_same_bits(got[0].view(torch.uint8), data.view(torch.uint8), "data")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("fp8_dtype", fp8.DTYPES)
@pytest.mark.parametrize("columns", [1, 3, 12], ids=["one scale", "1x128", "1x32"])
def test_dequantize(columns: int, fp8_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """All codes, by rows and by columns."""
    g = torch.Generator("cuda").manual_seed(columns)
    for rows in (0, 1, 1001):
        data = torch.randint(0, 256, (rows, 384), device="cuda", generator=g, dtype=torch.uint8).view(fp8_dtype)
        exponent = torch.randint(-130, 120, (rows, columns), device="cuda", generator=g)
        by_row = torch.exp2(exponent.float()) * torch.rand(rows, columns, device="cuda", generator=g)
        by_column = by_row.t().contiguous().t()
        same = by_row[:1, :1].expand(rows, columns)
        for scales in (by_row, by_column, same):
            got = kernels.dequantize(data, scales, dtype)
            assert_same_bits(got, scaled_in_torch(data, scales, dtype))
    shifted = torch.zeros(128 * 5 + 1, dtype=torch.uint8, device="cuda")[1:].view(5, 128).view(fp8_dtype)
    assert kernels.dequantize(shifted, torch.ones(5, 1, device="cuda"), dtype) is not None


def test_packed_scales() -> None:
    g = torch.Generator("cuda").manual_seed(0)
    data, scales = fp8.quantize_blocks(torch.randn(33, 1024, device="cuda", generator=g), power_of_two=True)
    got = fp8.dequantize_blocks(data, fp8.pack_ue8m0(scales))
    assert_same_bits(got, scaled_in_torch(data, scales, torch.bfloat16))


def test_other_devices_and_dtypes_go_on_in_torch() -> None:
    data, scales = torch.zeros(4, 128, device="cuda").to(torch.float8_e4m3fn), torch.ones(4, 1, device="cuda")
    assert kernels.dequantize(data, scales, torch.float64) is None
    assert kernels.dequantize(data.cpu(), scales.cpu(), torch.float32) is None
    assert kernels.quantize(torch.zeros(4, 128), torch.float8_e4m3fn, True, 0.0) is None
