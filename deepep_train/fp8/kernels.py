"""Quantizing and dequantizing in one pass on a GPU, with the bits of the torch code beside which they stand (csrc/fp8).

Functions return None where no kernel serves the tensors: the caller then goes on in torch.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

_FLOATS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_FP8 = {torch.float8_e4m3fn: 0, torch.float8_e5m2: 1}
_PIECE = 8  # values that a thread takes
_MOST = 1 << 35  # pieces have 32-bit numbers


@functools.cache
def _module() -> Any:
    """None: the package was built without kernels."""
    try:
        return importlib.import_module("deepep_train._C").fp8
    except ImportError:
        return None


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _aligned(x: Tensor) -> Tensor:
    """Contiguous, at an address that 16-byte accesses can use."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


@torch._disable_dynamo
def quantize(x: Tensor, fp8_dtype: torch.dtype, power_of_two: bool, min_amax: float) -> tuple[Tensor, Tensor] | None:
    """x [M, K], K a multiple of 128 -> FP8 data [M, K], and float32 scales flat, [K / 128, roundup(M, 4)], 0 behind the last
    row: as `quantize_in_torch` under `Recipe.BLOCK`."""
    if not x.is_cuda or x.numel() >= _MOST or _module() is None:
        return None
    x = _aligned(x.detach())
    num_rows, hidden = x.shape
    width = -(-num_rows // 4) * 4
    data = torch.empty(x.shape, dtype=fp8_dtype, device=x.device)
    make = torch.empty if width == num_rows else torch.zeros
    scales = make(hidden // 128 * width, dtype=torch.float32, device=x.device)
    p = _module().QuantizeParams()
    p.x, p.data, p.scales, p.num_rows, p.hidden = x.data_ptr(), data.data_ptr(), scales.data_ptr(), num_rows, hidden
    p.scale_row_stride, p.scale_step = 1, width
    p.min_amax, p.power_of_two, p.dtype, p.e5m2 = min_amax, int(power_of_two), _FLOATS[x.dtype], _FP8[fp8_dtype]
    with torch.cuda.device(x.device):
        _module().quantize(p, _stream(x.device))
    return data, scales


@torch._disable_dynamo
def dequantize(data: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor | None:
    """FP8 [M, K] times float32 [M, n], of any strides, one for each K / n values: as `scaled`."""
    num_rows, hidden = data.shape
    per_scale = hidden // max(scales.size(1), 1)
    served = data.is_cuda and scales.is_cuda and data.dtype in _FP8 and scales.dtype == torch.float32 and dtype in _FLOATS
    if not served or not per_scale or per_scale % _PIECE or data.numel() >= _MOST or _module() is None:
        return None
    data = _aligned(data.detach())
    out = torch.empty(data.shape, dtype=dtype, device=data.device)
    p = _module().DequantizeParams()
    p.data, p.scales, p.out, p.num_rows, p.hidden = data.data_ptr(), scales.data_ptr(), out.data_ptr(), num_rows, hidden
    p.scale_row_stride, p.scale_step, p.values_per_scale = *scales.stride(), per_scale
    p.dtype, p.e5m2 = _FLOATS[dtype], _FP8[data.dtype]
    with torch.cuda.device(data.device):
        _module().dequantize(p, _stream(data.device))
    return out
