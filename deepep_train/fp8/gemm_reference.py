"""The operands and grouped products of `grouped_linear` in plain torch, with the numerics of Transformer Engine's kernels.

Every operand is quantized and dequantized; products are float32. For CPUs, tests, and GPUs without Transformer Engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from deepep_train.fp8.quantized import Quantized, Recipe, quantize

_WEIGHT_BLOCK = 128


def rounded(x: Tensor, recipe: Recipe, fp8_dtype: torch.dtype) -> Tensor:
    """x [m, k] quantized along k and back, float32; k is filled up with zeros to a multiple of 128."""
    if not x.numel():
        return x.detach().to(torch.float32)
    k = x.size(1)
    padded = F.pad(x.detach(), (0, -k % 128))
    scale = None
    if recipe is Recipe.TENSOR:
        amax = padded.abs().amax().to(torch.float32).clamp(min=torch.finfo(torch.float32).tiny)
        scale = (amax / torch.finfo(fp8_dtype).max).view(1)
    return quantize(padded, recipe, fp8_dtype=fp8_dtype, scale=scale).dequantize(torch.float32)[:, :k]


def rounded_weight(w: Tensor, recipe: Recipe, fp8_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """w [m, k] as it enters products along k and along m, float32. Under BLOCK one scale serves 128x128 values, so that both
    are the same."""
    if recipe is not Recipe.BLOCK:
        return rounded(w, recipe, fp8_dtype), rounded(w.detach().t().contiguous(), recipe, fp8_dtype).t()
    m, k = w.shape
    padded = F.pad(w.detach(), (0, -k % _WEIGHT_BLOCK, 0, -m % _WEIGHT_BLOCK))
    rows, columns = padded.size(0) // _WEIGHT_BLOCK, padded.size(1) // _WEIGHT_BLOCK
    tiles = padded.view(rows, _WEIGHT_BLOCK, columns, _WEIGHT_BLOCK).transpose(1, 2)
    # A tile shares the scale of its largest value, as it would if each of its rows held that value as well.
    amax = tiles.abs().amax((2, 3), keepdim=True).expand(rows, columns, _WEIGHT_BLOCK, 1)
    flat = torch.cat([tiles, amax.expand(-1, -1, -1, _WEIGHT_BLOCK)], 3).reshape(-1, 2 * _WEIGHT_BLOCK)
    factors = quantize(flat.contiguous(), recipe, fp8_dtype=fp8_dtype).row_scales()[:, 1:]
    scaled = (tiles.reshape(-1, _WEIGHT_BLOCK).to(torch.float32) / factors).to(fp8_dtype).to(torch.float32) * factors
    values = scaled.view(rows, columns, _WEIGHT_BLOCK, _WEIGHT_BLOCK).transpose(1, 2).reshape(padded.shape)[:m, :k]
    return values, values


class Rows:
    """Activations or gradients: [M_e, k] for every group."""

    def __init__(self, rowwise: list[Tensor], source: list[Tensor], recipe: Recipe, fp8_dtype: torch.dtype) -> None:
        self.rowwise, self._source, self._recipe, self._fp8_dtype = rowwise, source, recipe, fp8_dtype

    def columnwise(self) -> list[Tensor]:
        """Quantized along the rows' number and back; what shares one scale is so in both directions."""
        if self._recipe is Recipe.TENSOR:
            return self.rowwise
        return [rounded(s.t().contiguous(), self._recipe, self._fp8_dtype).t() for s in self._source]

    def release_rowwise(self) -> None:
        if self._recipe is not Recipe.TENSOR:
            self.rowwise = []

    def unload(self) -> list[Tensor | None]:
        """What `columnwise` needs, for autograd to save: it is gone from here until `load`."""
        kept, self._source = self._source, []
        return list(kept)

    def load(self, tensors: list[Tensor]) -> None:
        self._source = tensors


def _received(q: Quantized) -> Rows:
    values = q.dequantize().detach()
    return Rows(list(values.to(torch.float32).split(q.splits)), list(values.split(q.splits)), q.recipe, q.data.dtype)


class Operands:
    """The weights of one linear, and its three products; as in gemm_te.py."""

    def __init__(self, weights: Sequence[Tensor], recipe: Recipe, is_transposed: bool, fp8_dtype: torch.dtype) -> None:
        self.recipe, self.is_transposed = recipe, is_transposed
        given = [w.t().contiguous() if is_transposed else w for w in weights]
        self.weights = [rounded_weight(w, recipe, fp8_dtype) for w in given]

    received = staticmethod(_received)

    def unload(self) -> list[Tensor]:
        """What `input_gradient` needs of the weights, for autograd to save; nothing else needs any of them again."""
        kept, self.weights = [w for _, w in self.weights], []
        return kept

    def load(self, tensors: list[Tensor]) -> None:
        self.weights = [(w, w) for w in tensors]

    def rows(self, x: Tensor, splits: Sequence[int], fp8_dtype: torch.dtype, columnwise: bool) -> Rows:
        source = list(x.detach().split(list(splits)))
        return Rows([rounded(s, self.recipe, fp8_dtype) for s in source], source, self.recipe, fp8_dtype)

    def forward(self, x: Rows, out: Tensor, splits: Sequence[int]) -> Tensor:
        for y, x_e, (w, _) in zip(out.split(list(splits)), x.rowwise, self.weights, strict=True):
            y.copy_(x_e @ w.t())
        return out

    def input_gradient(self, grad: Rows, out: Tensor, splits: Sequence[int]) -> Tensor:
        for y, g_e, (_, w) in zip(out.split(list(splits)), grad.rowwise, self.weights, strict=True):
            y.copy_(g_e @ w)
        return out

    def weight_gradient(self, x: Rows, grad: Rows, out: list[Tensor], splits: Sequence[int]) -> None:
        for into, x_e, g_e in zip(out, x.columnwise(), grad.columnwise(), strict=True):
            into.copy_(x_e.t() @ g_e if self.is_transposed else g_e.t() @ x_e)
