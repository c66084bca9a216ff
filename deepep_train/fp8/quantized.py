"""Tensors quantized once, before the wire, with Transformer Engine's numerics and its layouts of scales, in plain torch.

The numerics follow Transformer Engine's kernels as public copies of its source show them: block scaling
common/recipe/recipe_common.cuh (`compute_scale_from_amax`), MXFP8 common/util/ptx.cuh (`float_to_e8m0`, `exp2f_rcp`).
tests/gpu/test_fp8.py compares bits with the kernels of release 2.20.

Shape letters: M rows, K hidden, n scales per row, E experts' groups of rows, M_e rows of one group, padding included.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepep_train import checks
from deepep_train.engines.base import Payload
from deepep_train.errors import ArgumentError
from deepep_train.fp8 import kernels
from deepep_train.fp8.deepep import scaled
from deepep_train.scale_blocks import BLOCK_SCALING, MXFP8, ScaleBlocks

HIDDEN_MULTIPLE = 128  # of every recipe, so that a row's scales always fill whole 32-bit words on the wire
_PER_SCALE = {"block": 128, "mxfp8": 32}
DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


class Recipe(enum.Enum):
    """How values share scales: 1x128 blocks with a float32 each, 1x32 blocks with an E8M0 each, or one float32 for all."""

    BLOCK = "block"
    MXFP8 = "mxfp8"
    TENSOR = "tensor"

    @property
    def blocks(self) -> ScaleBlocks | None:
        """Where GEMMs read them; None: one for all rows."""
        return {Recipe.BLOCK: BLOCK_SCALING, Recipe.MXFP8: MXFP8}.get(self)

    @property
    def grad_dtype(self) -> torch.dtype:
        """What gradients are quantized to: that of Transformer Engine's default format for the recipe, E4M3 or HYBRID."""
        return torch.float8_e5m2 if self is Recipe.TENSOR else torch.float8_e4m3fn

    def scales_per_row(self, hidden: int) -> int:
        return 1 if self is Recipe.TENSOR else hidden // _PER_SCALE[self.value]


@dataclass(frozen=True)
class Quantized:
    """FP8 rows and their scales where Transformer Engine's (grouped) GEMM reads them. data * scale is about the value.

    Attributes:
        recipe: which values share a scale.
        data: float8_e4m3fn or float8_e5m2 [M, K].
        scales: flat, one contiguous block for each group of rows (scale_blocks.py). BLOCK: float32
            [K / 128, roundup(M_e, 4)], tokens innermost; MXFP8: uint8 E8M0 [roundup(M_e, 128), K / 32]; TENSOR: float32 [1]
            for all groups together.
        splits: M_e of every group, their sum M: (M,) if there is one.
        rows: [M, K] of the dtype that was quantized: stands for the values in autograd, and holds none (it reads as NaN and
            takes no memory). Its gradient is the gradient of the values.
    """

    recipe: Recipe
    data: Tensor
    scales: Tensor
    splits: tuple[int, ...]
    rows: Tensor

    def check(self, argument: str) -> None:
        """Raise `ArgumentError` unless the parts belong together. (`quantize` and dispatches make nothing else.)"""
        checks.need(isinstance(self.recipe, Recipe), f"{argument}: recipe", "a Recipe", self.recipe)
        data = checks.tensor(self.data, f"{argument}: data", [None, None], DTYPES, None)
        check_hidden(data.size(1), argument)
        checks.need(data.is_contiguous(), f"{argument}: data", f"contiguous, not of strides {data.stride()}", data)
        known = isinstance(self.splits, tuple) and all(isinstance(m, int) and m >= 0 for m in self.splits)
        fits = known and len(self.splits) > 0 and sum(self.splits) == data.size(0)
        checks.need(fits, f"{argument}: splits", f"a tuple of ints that sum to {data.size(0)}", self.splits)
        blocks, dtype = self.recipe.blocks, torch.uint8 if self.recipe is Recipe.MXFP8 else torch.float32
        size = 1 if blocks is None else blocks.size(self.splits, data.size(1) // 128) * (4 // dtype.itemsize)
        scales = checks.tensor(self.scales, f"{argument}: scales", [size], (dtype,), data.device)
        checks.need(scales.is_contiguous(), f"{argument}: scales", "contiguous", scales)
        is_aligned = scales.storage_offset() * scales.element_size() % 4 == 0
        checks.need(is_aligned, f"{argument}: scales", "at a multiple of 4 bytes of its memory, as words", scales)
        checks.tensor(self.rows, f"{argument}: rows", data.shape, FLOATS, data.device, is_read=False)

    @property
    def dtype(self) -> torch.dtype:
        """Of the values that were quantized and of their gradient."""
        return self.rows.dtype

    def groups(self) -> list[tuple[Tensor, Tensor]]:
        """(data [M_e, K], scales of the shape above) of every group: contiguous views."""
        data, blocks, num_words = self.data.split(list(self.splits)), self.recipe.blocks, self.data.size(1) // 128
        if blocks is None:
            return [(d, self.scales) for d in data]
        per_word = 4 // self.scales.element_size()
        scales = self.scales.split([blocks.size([m], num_words) * per_word for m in self.splits])
        shapes = [scale_shape(self.recipe, m, self.data.size(1)) for m in self.splits]
        return [(d, s.view(shape)) for d, s, shape in zip(data, scales, shapes, strict=True)]

    def row_scales(self) -> Tensor:
        """[M, n]: float32, or uint8 E8M0 under MXFP8; of one group a view."""
        num_rows, hidden = self.data.shape
        blocks = self.recipe.blocks
        if blocks is None:
            return self.scales.view(1, 1).expand(num_rows, 1)
        groups = blocks.by_row(self.scales.view(torch.int32), self.splits, hidden // 128)
        words = groups[0] if len(groups) == 1 else torch.cat(groups)
        return words.view(self.scales.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The values [M, K] in `dtype` (None: the one that was quantized), differentiable."""
        if dtype is not None:
            checks.need(dtype in checks.PAYLOAD_DTYPES, "dtype", "a floating dtype of at least 16 bits", dtype)
        return _Dequantize.apply(self.rows, self, dtype or self.dtype)

    def to_wire(self) -> Payload:
        """What crosses: every row with its scales beside it in 32-bit words, K / 128 of them or, under TENSOR, one."""
        # Side by side in memory: the dispatch reads a row's scales once for each destination.
        scales, blocks = self.row_scales().contiguous(), self.recipe.blocks
        return Payload(self.data, scales.view(torch.int32) if self.recipe is Recipe.MXFP8 else scales, blocks)

    def arrived(self, payload: Payload, splits: tuple[int, ...], rows: Tensor) -> Quantized:
        """What came of a tensor like this one, in these groups."""
        assert payload.scales is not None
        scales = self.scales if self.recipe is Recipe.TENSOR else payload.scales.view(self.scales.dtype)
        return Quantized(self.recipe, payload.data, scales, splits, rows)

    def agreement(self) -> str:
        """What must be the same on all ranks, besides dtypes and shapes. TENSOR reads its scale, and so waits for a GPU.

        Raises:
            ArgumentError: unless that scale is positive and finite.
        """
        scale = f", scale {_checked_scale(self.scales):.9g}" if self.recipe is Recipe.TENSOR else ""
        return f"{self.recipe.value} of {str(self.dtype).removeprefix('torch.')}{scale}"


def quantize(
    x: Tensor,
    recipe: Recipe = Recipe.BLOCK,
    *,
    fp8_dtype: torch.dtype = torch.float8_e4m3fn,
    power_of_two: bool = True,
    min_amax: float = 0.0,
    scale: Tensor | None = None,
) -> Quantized:
    """Quantize rows for `deepep_train.dispatch`; differentiable: the gradient of the values passes through unchanged.

    By Transformer Engine's kernels on GPUs where it is installed, else in torch; the bits are the same.

    Args:
        x: [M, K] bfloat16, float16 or float32, K a multiple of 128.
        fp8_dtype: float8_e4m3fn or float8_e5m2.
        power_of_two, min_amax: BLOCK only; Transformer Engine's `force_pow_2_scales` and `amax_epsilon`.
        scale: TENSOR only and there required, float32 [1], positive, the same on all ranks: values are divided by it. On a GPU
            its value is looked at by the dispatch, which has to wait for it anyway.

    Raises:
        ArgumentError: naming the argument and its value.
    """
    if not isinstance(recipe, Recipe):
        raise ArgumentError(f"recipe must be one of {', '.join(map(str, Recipe))}, got {recipe!r}", "recipe")
    if fp8_dtype not in DTYPES:
        raise ArgumentError(f"fp8_dtype must be torch.float8_e4m3fn or torch.float8_e5m2, got {fp8_dtype}", "fp8_dtype")
    if not isinstance(x, Tensor) or x.dtype not in FLOATS or x.dim() != 2:
        got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else repr(x)
        raise ArgumentError(f"x must be [rows, hidden], bfloat16, float16 or float32, got {got}", "x")
    check_hidden(x.size(1), "x")
    is_scale = isinstance(scale, Tensor) and scale.dtype == torch.float32 and scale.numel() == 1
    if is_scale != (recipe is Recipe.TENSOR):
        raise ArgumentError(f"scale must be float32 [1] with {Recipe.TENSOR} and None otherwise, got {scale!r}", "scale")
    if scale is not None:
        checks.need(scale.device == x.device, "scale", f"on {x.device}", scale)
        if not scale.is_cuda:
            _checked_scale(scale)
    checks.flag(power_of_two, "power_of_two")
    checks.number(min_amax, "min_amax")
    with torch.no_grad():
        from deepep_train.fp8 import te_present

        # Its MXFP8 kernel wants a multiple of 32 rows.
        is_easy = x.size(0) and (recipe is Recipe.BLOCK or (recipe is Recipe.MXFP8 and x.size(0) % 32 == 0))
        if is_easy and te_present.has_te_kernels(x.device, recipe):
            from deepep_train.fp8 import gemm_te

            data, scales = gemm_te.quantize(x, recipe, fp8_dtype, power_of_two, min_amax)
        else:
            fused = kernels.quantize(x, fp8_dtype, power_of_two, min_amax) if recipe is Recipe.BLOCK else None
            data, scales = fused or quantize_in_torch(x, recipe, fp8_dtype, power_of_two, min_amax, scale)
    return Quantized(recipe, data, scales, (x.size(0),), _Rows.apply(x))


def _checked_scale(scale: Tensor) -> float:
    value = float(scale)
    if not 0.0 < value < float("inf"):
        raise ArgumentError(f"scale must be positive and finite, got {value:g}", "scale")
    return value


def check_hidden(hidden: int, argument: str) -> None:
    if hidden % HIDDEN_MULTIPLE or not hidden:
        raise ArgumentError(
            f"{argument} must have a hidden size that is a multiple of {HIDDEN_MULTIPLE} in FP8, got {hidden}", argument
        )


def scale_shape(recipe: Recipe, num_rows: int, hidden: int) -> tuple[int, int]:
    """Of one group's scales, BLOCK or MXFP8, as `Quantized.groups` gives them."""
    assert recipe.blocks is not None
    height, width = recipe.blocks.shape(num_rows, hidden // 128)
    return height, width * (4 if recipe is Recipe.MXFP8 else 1)


def placeholder(num_rows: int, hidden: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`Quantized.rows`."""
    return torch.full((), float("nan"), dtype=dtype, device=device).expand(num_rows, hidden)


def is_placeholder(rows: Tensor) -> bool:
    """Whether `rows` can only be a `placeholder` or a view of one: more elements than one, all in one place."""
    return rows.numel() > 1 and not any(rows.stride())


def quantize_in_torch(
    x: Tensor, recipe: Recipe, fp8_dtype: torch.dtype, power_of_two: bool, min_amax: float, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(data, `Quantized.scales`)."""
    num_rows, hidden = x.shape
    values, largest = x.detach().to(torch.float32), torch.finfo(fp8_dtype).max
    if scale is not None:
        inverse = torch.ones_like(scale) / scale
        return _cast(values * inverse.view(1, 1), fp8_dtype), scale.detach().reshape(1)
    blocks = values.reshape(num_rows, recipe.scales_per_row(hidden), _PER_SCALE[recipe.value])
    amax = blocks.abs().masked_fill(blocks.isnan(), 0.0).amax(2)  # fmaxf, too, passes NaN over
    if recipe is Recipe.MXFP8:
        row_scales = _e8m0(amax * torch.tensor(1.0 / largest, dtype=torch.float32))
        exponent = row_scales.to(torch.int32)
        factor = ((254 - exponent) << 23).view(torch.float32)
        factor = torch.where(exponent == 0, 1.0, torch.where(exponent == 255, float("nan"), factor))
    else:
        amax = torch.where(amax < min_amax, min_amax, amax)
        factor = torch.full_like(amax, largest) / amax  # a number / amax would multiply by the reciprocal, rounding twice
        factor = torch.where(factor.isinf(), torch.finfo(x.dtype).max, factor)
        if power_of_two:
            factor = (factor.contiguous().view(torch.int32) & ~0x7FFFFF).view(torch.float32)
        factor = torch.where((amax == 0) | amax.isinf() | amax.isnan(), 1.0, factor)
        row_scales = 1.0 / factor
    data = _cast(blocks * factor.unsqueeze(2), fp8_dtype).view(num_rows, hidden)
    assert recipe.blocks is not None
    return data, recipe.blocks.put(row_scales, [num_rows])


def _cast(values: Tensor, fp8_dtype: torch.dtype) -> Tensor:
    """To nearest even; what is too large becomes the largest finite value, as the kernels' casts do."""
    largest = torch.finfo(fp8_dtype).max
    return values.clamp(-largest, largest).to(fp8_dtype)


def _e8m0(scale: Tensor) -> Tensor:
    """Positive float32 -> uint8 biased exponents, rounded up; infinity becomes the largest, NaN 255."""
    bits = scale.contiguous().view(torch.int32)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    up = (mantissa > 0) & (exponent != 0xFE) & ~((exponent == 0) & (mantissa <= 0x400000))
    exponent = torch.where(scale.isnan(), 0xFF, torch.where(scale.isinf(), 0xFE, exponent + up.to(torch.int32)))
    return exponent.to(torch.uint8)


class _Rows(torch.autograd.Function):
    """x -> `Quantized.rows`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return placeholder(x.size(0), x.size(1), x.dtype, x.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _Dequantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, q: Quantized, dtype: torch.dtype) -> Tensor:
        ctx.dtype = rows.dtype
        scales = q.row_scales()
        if q.recipe is Recipe.MXFP8:
            scales = (scales.to(torch.int32) << 23).view(torch.float32)
        return scaled(q.data, scales, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return grad.to(ctx.dtype), None, None
