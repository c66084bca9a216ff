"""FP8 pairs with DeepEP's numerics, in torch, for engines without kernels and for tests.

A row is cut into blocks of 128 values; each block is scaled so that its largest magnitude becomes e4m3's largest, 448.
The magnitude is clamped from below at 1e-4, and a scale may be rounded up to a power of two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepep_train.errors import ArgumentError
from deepep_train.fp8 import kernels

BLOCK = 128
E4M3_MAX = 448.0
MIN_AMAX = 1e-4


def quantize_blocks(x: Tensor, *, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Quantize rows in blocks of 128.

    Args:
        x: [rows, hidden] floating, hidden a multiple of 128.
        power_of_two: round scales up to powers of two.

    Returns:
        data float8_e4m3fn [rows, hidden] and scales float32 [rows, hidden / 128], such that data * scale is about x.
    """
    if x.dim() != 2 or x.size(1) % BLOCK:
        raise ArgumentError(f"x must be [rows, hidden] with hidden a multiple of {BLOCK}, got shape {list(x.shape)}", "x")
    blocks = x.to(torch.float32).view(x.size(0), x.size(1) // BLOCK, BLOCK)
    amax = blocks.abs().amax(2).clamp(min=MIN_AMAX)
    scale = amax / amax.new_full((), E4M3_MAX)  # by a number, torch multiplies with the reciprocal on GPUs
    if power_of_two:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    data = (blocks / scale.unsqueeze(2)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return data.view(x.shape), scale


def dequantize_blocks(data: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """data [rows, hidden] times its blocks' scales: float32 [rows, hidden / 128], or int32 [rows, hidden / 512] packed."""
    if scales.dtype == torch.int32:
        scales = unpack_ue8m0(scales)
    return scaled(data, scales, dtype)


def scaled(data: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """FP8 [rows, hidden] times float32 [rows, n], one for each hidden / n values: in float32, rounded once to `dtype`.

    On GPUs by a kernel of one pass, else in torch. Every FP8 value is one of `dtype`'s, so the product is rounded in place and
    no float32 copy of the rows is written.
    """
    done = kernels.dequantize(data, scales, dtype)
    return scaled_in_torch(data, scales, dtype) if done is None else done


def scaled_in_torch(data: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """`scaled`, of any tensors on any device."""
    values = data.to(dtype)
    num_rows, n = scales.shape
    blocks = values.view(num_rows, n, data.size(1) // n)
    torch.mul(blocks, scales.unsqueeze(2), out=blocks)
    return values


def pack_ue8m0(scales: Tensor) -> Tensor:
    """Powers of two, float32 [rows, n] -> their biased exponents, four to an int32 [rows, n / 4], the first lowest."""
    if scales.size(1) % 4:
        raise ArgumentError(f"scales must have a multiple of 4 columns to be packed, got {list(scales.shape)}", "scales")
    exponent = (scales.contiguous().view(torch.int32) >> 23).to(torch.uint8)
    return exponent.contiguous().view(torch.int32)


def unpack_ue8m0(packed: Tensor) -> Tensor:
    """The reverse of `pack_ue8m0`."""
    # Cloned, because a single column counts as contiguous whatever its stride, and then has no bytes to view.
    flat = packed.clone(memory_format=torch.contiguous_format).view(-1)
    exponent = flat.view(torch.uint8).view(packed.size(0), 4 * packed.size(1)).to(torch.int32)
    return (exponent << 23).view(torch.float32)
