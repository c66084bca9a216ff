"""`grouped_linear`: the experts' linear layers in FP8, on blocks as a dispatch left them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from deepep_train.errors import ArgumentError
from deepep_train.fp8.quantized import Quantized, Recipe, check_hidden
from deepep_train.fp8.te_present import has_te_kernels


def grouped_linear(
    x: Quantized | Tensor,
    weight: Tensor | Sequence[Tensor],
    splits: Sequence[int] | None = None,
    *,
    recipe: Recipe = Recipe.BLOCK,
    is_transposed: bool = False,
    delayed: list[Callable[[], None]] | None = None,
) -> Tensor:
    """Rows of group e times the transpose of weight e, in FP8: [M, out]. Differentiable.

    Rows that were quantized before the wire enter the forward product as they came. The weight gradient needs them quantized
    along the other dimension: their values are quantized again for it, in the backward pass. Products are Transformer Engine's
    grouped GEMM on GPUs where it is installed, elsewhere torch's with the same roundings of the operands.

    Args:
        x: what a dispatch into expert layout gave, or rows [M, in], bfloat16, float16 or float32, which are quantized here.
        weight: [E, out, in] or E tensors [out, in]; quantized here, under BLOCK in blocks of 128x128.
        splits: rows of every group, for rows [M, in]; a multiple of 16, MXFP8 of 32, for Transformer Engine's kernels.
        recipe: for rows [M, in]; a `Quantized` has its own. Gradients are e4m3 under BLOCK and MXFP8, e5m2 under TENSOR.
        is_transposed: weights are [in, out] instead.
        delayed: if given, the backward pass appends a function that computes the weight gradient and adds it to `.grad`,
            instead of computing it.

    Raises:
        ArgumentError: naming the argument and its value.
    """
    if isinstance(x, Quantized):
        rows, q, recipe, splits = x.rows, x, x.recipe, x.splits
    else:
        if splits is None or sum(splits) != x.size(0):
            raise ArgumentError(f"splits must sum to the {x.size(0)} rows of x, got {splits}", "splits")
        rows, q, splits = x, None, tuple(int(m) for m in splits)
    weights = (weight,) if isinstance(weight, Tensor) else tuple(weight)
    count = weights[0].size(0) if isinstance(weight, Tensor) else len(weights)
    if count != len(splits):
        raise ArgumentError(f"weight must be for {len(splits)} groups, got {count}", "weight")
    shape = weights[0].shape[-2:]
    check_hidden(shape[0], "weight")
    check_hidden(shape[1], "weight")
    if shape[0 if is_transposed else 1] != rows.size(1):
        raise ArgumentError(f"weight must take {rows.size(1)} values, got shape {list(weights[0].shape)}", "weight")
    call = _Call(q, splits, recipe, is_transposed, delayed, isinstance(weight, Tensor))
    return _GroupedLinear.apply(rows, call, *weights)


class _Call:
    """What carries no gradient."""

    def __init__(
        self, q: Quantized | None, splits: tuple[int, ...], recipe: Recipe, is_transposed: bool, delayed: Any, is_stacked: bool
    ) -> None:
        self.q, self.splits, self.recipe, self.is_transposed = q, splits, recipe, is_transposed
        self.delayed, self.is_stacked = delayed, is_stacked

    def each(self, weights: Sequence[Tensor]) -> list[Tensor]:
        return list(weights[0].unbind(0)) if self.is_stacked else list(weights)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, call: _Call, *weights: Tensor) -> Tensor:
        each = call.each(weights)
        operands = _operands(rows, call.recipe)(each, call.recipe, call.is_transposed, torch.float8_e4m3fn)
        needs_weight = any(ctx.needs_input_grad[2:])
        if call.q is not None:
            x = operands.received(call.q)
        else:
            x = operands.rows(rows, call.splits, torch.float8_e4m3fn, needs_weight)
        out_features = each[0].size(1 if call.is_transposed else 0)
        out = torch.empty(rows.size(0), out_features, dtype=rows.dtype, device=rows.device)
        operands.forward(x, out, call.splits)
        if needs_weight:
            x.release_rowwise()
        ctx.operands, ctx.x, ctx.call = operands, x if needs_weight else None, call
        ctx.rows, ctx.weights = (rows.shape, rows.dtype), weights
        call.q = None
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        call, operands = ctx.call, ctx.operands
        fp8_dtype = torch.float8_e5m2 if call.recipe is Recipe.TENSOR else torch.float8_e4m3fn
        needs_weight = any(ctx.needs_input_grad[2:])
        g = operands.rows(grad, call.splits, fp8_dtype, needs_weight)
        grad_rows = None
        if ctx.needs_input_grad[0]:
            shape, dtype = ctx.rows
            grad_rows = operands.input_gradient(g, torch.empty(shape, dtype=dtype, device=grad.device), call.splits)
        if not needs_weight:
            return grad_rows, None, *[None] * len(ctx.weights)
        x, weights = ctx.x, ctx.weights

        def weight_gradients() -> list[Tensor]:
            into = [torch.empty_like(w, memory_format=torch.contiguous_format) for w in weights]
            operands.weight_gradient(x, g, call.each(into), call.splits)
            return into

        if call.delayed is None:
            return grad_rows, None, *weight_gradients()

        def later() -> None:
            with torch.no_grad():
                for w, more in zip(weights, weight_gradients(), strict=True):
                    w.grad = more if w.grad is None else w.grad.add_(more)

        call.delayed.append(later)
        return grad_rows, None, *[None] * len(weights)


def _operands(rows: Tensor, recipe: Recipe) -> Any:
    if rows.size(0) and has_te_kernels(rows.device, recipe):  # without rows there is nothing for kernels to do
        from deepep_train.fp8.gemm_te import Operands
    else:
        from deepep_train.fp8.gemm_reference import Operands  # type: ignore[assignment]
    return Operands
