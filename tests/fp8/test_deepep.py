"""The reference quantizer, value by value."""

from __future__ import annotations

import math

import pytest
import torch
from harness import assert_same_bits

from deepep_train import ArgumentError, fp8


@pytest.mark.parametrize("power_of_two", [False, True])
def test_against_a_loop(power_of_two: bool) -> None:
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-6, 1.0, 30.0, 1e4, 0.0]).unsqueeze(1)
    data, scales = fp8.quantize_blocks(x, power_of_two=power_of_two)
    assert data.dtype == torch.float8_e4m3fn and scales.shape == (5, 2)
    for r in range(5):
        for b in range(2):
            block = x[r, b * 128 : (b + 1) * 128]
            scale = max(float(block.abs().max()), 1e-4) / 448
            if power_of_two:
                scale = 2.0 ** math.ceil(math.log2(scale))
            assert float(scales[r, b]) == pytest.approx(scale, rel=1e-6)
            exact = (block / scales[r, b]).to(torch.float8_e4m3fn)
            assert torch.equal(data[r, b * 128 : (b + 1) * 128].view(torch.uint8), exact.view(torch.uint8))
    back = fp8.dequantize_blocks(data, scales, torch.float32)
    assert float((back - x).norm() / x.norm()) < 0.04


def test_packed_scales_round_trip() -> None:
    x = torch.randn(7, 1024)
    data, scales = fp8.quantize_blocks(x, power_of_two=True)
    packed = fp8.pack_ue8m0(scales)
    assert packed.dtype == torch.int32 and packed.shape == (7, 2)
    assert torch.equal(fp8.unpack_ue8m0(packed), scales)
    assert torch.equal(fp8.dequantize_blocks(data, packed), fp8.dequantize_blocks(data, scales))
    first = int(scales[0, 0].log2()) + 127
    assert int(packed[0, 0]) & 0xFF == first  # the first block's exponent lies lowest


def test_wrong_width_is_named() -> None:
    with pytest.raises(ArgumentError, match="128"):
        fp8.quantize_blocks(torch.zeros(2, 100))
    with pytest.raises(ArgumentError, match="multiple of 4"):
        fp8.pack_ue8m0(torch.ones(2, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("fp8_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_products_are_rounded_once(fp8_dtype: torch.dtype, dtype: torch.dtype) -> None:
    data = torch.arange(256, dtype=torch.uint8).view(fp8_dtype).repeat(3, 2)
    scales = torch.tensor([[1.0, 1.0000001], [3.3e-4, 1e-37], [2.0**-9, 0.7]])
    want = (data.float().view(3, 2, 256) * scales.unsqueeze(2)).view(3, 512).to(dtype)
    got = fp8.deepep.scaled(data, scales, dtype)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(), want.nan_to_num())


def test_packed_scales_in_a_single_column_with_any_stride() -> None:
    packed = torch.tensor([[0x7F7F7F7F, 1], [0x01020304, 2]], dtype=torch.int32)
    assert_same_bits(fp8.unpack_ue8m0(packed.t().contiguous().t()[:, :1]), fp8.unpack_ue8m0(packed)[:, :4].contiguous())
    assert_same_bits(fp8.unpack_ue8m0(packed.t().contiguous().t()[:1, :1]), fp8.unpack_ue8m0(packed)[:1, :4].contiguous())
