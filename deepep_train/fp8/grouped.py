"""`grouped_linear`: the experts' linear layers in FP8, on blocks as a dispatch left them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepep_train import checks
from deepep_train.derivatives import differentiable_once
from deepep_train.errors import ArgumentError
from deepep_train.fp8.quantized import FLOATS, Quantized, Recipe, check_hidden, placeholder
from deepep_train.fp8.te_present import has_te_kernels


def grouped_linear(
    x: Quantized | Tensor,
    weight: Tensor | Sequence[Tensor],
    splits: Sequence[int] | None = None,
    *,
    recipe: Recipe | None = None,
    is_transposed: bool = False,
    delayed: list[Callable[[], None]] | None = None,
) -> Tensor:
    """Rows of group e times the transpose of weight e, in FP8: [M, out]. Differentiable once.

    Rows that were quantized before the wire enter the forward product as they came. The weight gradient needs them quantized
    along the other dimension: their values are quantized again for it, in the backward pass. Products are Transformer Engine's
    grouped GEMM on GPUs where it is installed, elsewhere torch's with the same roundings of the operands. All that the backward
    pass needs is saved as autograd saves tensors, so that activation checkpointing and saved-tensor hooks free or move it.

    Args:
        x: what a dispatch into expert layout gave, or rows [M, in], bfloat16, float16 or float32, which are quantized here.
        weight: [E, out, in] or E tensors [out, in], bfloat16, float16 or float32; quantized here, under BLOCK in blocks of
            128x128.
        splits: rows of every group, for rows [M, in]; None or x's own for what was received. Where Transformer Engine's kernels
            multiply, multiples of 16, under MXFP8 of 32: dispatch's alignment.
        recipe: for rows [M, in], None for BLOCK; a `Quantized` has its own. Gradients are in its
            `grad_dtype`.
        is_transposed: weights are [in, out] instead.
        delayed: if given, the backward pass appends a function that computes the weight gradient and adds it to `.grad`,
            instead of computing it. Weights must be leaves then: nothing would carry their gradient on.

    Raises:
        ArgumentError: naming the argument and its value.
    """
    if isinstance(x, Quantized):
        x.check("x")
        is_same = splits is None or (isinstance(splits, (tuple, list)) and tuple(splits) == x.splits)
        checks.need(is_same, "splits", f"None or x's own, {x.splits}", splits)
        checks.need(recipe in (None, x.recipe), "recipe", f"None or x's own, {x.recipe}", recipe)
        rows, q, recipe, groups = x.rows, x, x.recipe, x.splits
    else:
        rows, q, recipe = checks.tensor(x, "x", [None, None], FLOATS, None), None, Recipe.BLOCK if recipe is None else recipe
        checks.need(isinstance(recipe, Recipe), "recipe", f"one of {', '.join(map(str, Recipe))}", recipe)
        groups = _checked_splits(splits, rows.size(0))
    checks.flag(is_transposed, "is_transposed")
    checks.need(delayed is None or isinstance(delayed, list), "delayed", "a list or None", delayed)
    weights = _checked_weights(weight, len(groups), rows, is_transposed, delayed is not None)
    if _runs_te_kernels(rows, recipe):
        multiple = 32 if recipe is Recipe.MXFP8 else 16
        fits = all(m % multiple == 0 for m in groups)
        checks.need(fits, "splits", f"multiples of {multiple} for Transformer Engine's kernels (dispatch's alignment)", groups)
    call = _Call(q, groups, recipe, is_transposed, delayed, isinstance(weight, Tensor))
    return _GroupedLinear.apply(rows, call, *weights)


def _checked_splits(splits: Any, num_rows: int) -> tuple[int, ...]:
    known = isinstance(splits, (tuple, list)) and len(splits) > 0
    known = known and all(isinstance(m, int) and not isinstance(m, bool) and m >= 0 for m in splits)
    if not known or sum(splits) != num_rows:
        raise ArgumentError(f"splits must be ints from 0 on that sum to the {num_rows} rows of x, got {splits!r}", "splits")
    return tuple(splits)


def _checked_weights(weight: Any, num_groups: int, rows: Tensor, is_transposed: bool, is_delayed: bool) -> tuple[Tensor, ...]:
    if isinstance(weight, Tensor):
        weights: tuple[Tensor, ...] = (checks.tensor(weight, "weight", [num_groups, None, None], FLOATS, rows.device),)
    else:
        known = isinstance(weight, (tuple, list)) and len(weight) == num_groups
        checks.need(known, "weight", f"a tensor or a list of {num_groups} tensors", weight)
        first = checks.tensor(weight[0], "weight", [None, None], FLOATS, rows.device)
        weights = tuple(checks.tensor(w, "weight", first.shape, (first.dtype,), rows.device) for w in weight)
    shape = weights[0].shape[-2:]
    for features in shape:
        check_hidden(features, "weight")
    takes = shape[0 if is_transposed else 1]
    checks.need(takes == rows.size(1), "weight", f"for rows of {rows.size(1)} values, not {takes}", weights[0])
    lost = is_delayed and any(w.requires_grad and not w.is_leaf for w in weights)
    checks.need(not lost, "weight", "leaves of the graph with delayed=, which adds to their .grad", weights[0])
    return weights


@dataclass
class _Call:
    """What carries no gradient."""

    q: Quantized | None
    splits: tuple[int, ...]
    recipe: Recipe
    is_transposed: bool
    delayed: list[Callable[[], None]] | None
    is_stacked: bool

    def each(self, weights: Sequence[Tensor]) -> list[Tensor]:
        return list(weights[0].unbind(0)) if self.is_stacked else list(weights)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, call: _Call, *weights: Tensor) -> Tensor:
        each = call.each(weights)
        operands = _operands(rows, call.recipe)(each, call.recipe, call.is_transposed, torch.float8_e4m3fn)
        needs_weight = any(ctx.needs_input_grad[2:])
        q, call.q = call.q, None
        x = operands.rows(rows, call.splits, torch.float8_e4m3fn, needs_weight) if q is None else operands.received(q)
        out_features = each[0].size(1 if call.is_transposed else 0)
        out = torch.empty(rows.size(0), out_features, dtype=rows.dtype, device=rows.device)
        operands.forward(x, out, call.splits)
        kept: list[Tensor | None] = []
        ctx.x = None
        if needs_weight and q is not None:
            kept = [q.data, q.scales]
        elif needs_weight:
            x.release_rowwise()
            ctx.x, kept = x, x.unload()
        ctx.num_kept, ctx.is_received = len(kept), q is not None
        ctx.save_for_backward(*kept, *operands.unload())
        ctx.operands, ctx.call = operands, call
        ctx.rows = rows.shape, rows.dtype
        # The weights themselves only where `.grad` is theirs to fill: what is kept of them is quantized.
        ctx.like = [(w.shape, w.dtype) for w in weights]
        ctx.weights = weights if call.delayed is not None else ()
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        call, operands, saved = ctx.call, ctx.operands, list(ctx.saved_tensors)
        (num_rows, features), dtype = ctx.rows
        needs_weight = any(ctx.needs_input_grad[2:])
        g = operands.rows(grad, call.splits, call.recipe.grad_dtype, needs_weight)
        grad_rows = None
        if ctx.needs_input_grad[0]:
            operands.load(saved[ctx.num_kept :])
            out = torch.empty(num_rows, features, dtype=dtype, device=grad.device)
            grad_rows = operands.input_gradient(g, out, call.splits)
            operands.unload()
            grad_rows = _first_order(grad_rows)
        if not needs_weight:
            return grad_rows, None, *[None] * len(ctx.like)
        if ctx.is_received:
            data, scales = saved[:2]
            values = placeholder(num_rows, features, dtype, grad.device)
            x = operands.received(Quantized(call.recipe, data, scales, call.splits, values))
        else:
            x = ctx.x
            x.load(saved[: ctx.num_kept])
        like, weights = ctx.like, ctx.weights

        def weight_gradients() -> list[Tensor]:
            into = [torch.empty(shape, dtype=dtype, device=grad.device) for shape, dtype in like]
            operands.weight_gradient(x, g, call.each(into), call.splits)
            return into

        if call.delayed is None:
            gradients = weight_gradients()
            if not ctx.is_received:
                x.unload()
            return grad_rows, None, *map(_first_order, gradients)

        needed = ctx.needs_input_grad[2:]

        def later() -> None:
            with torch.no_grad():
                for w, more, is_needed in zip(weights, weight_gradients(), needed, strict=True):
                    if not is_needed:
                        continue
                    w.grad = more if w.grad is None else w.grad.add_(more)

        call.delayed.append(later)
        return grad_rows, None, *[None] * len(like)


def _first_order(grad: Tensor) -> Any:
    """It depends on the values that were multiplied, which nothing of it shows: hence the leaf that stands for them."""
    return differentiable_once("fp8.grouped_linear", grad, torch.empty(0, requires_grad=True))


def _runs_te_kernels(rows: Tensor, recipe: Recipe) -> bool:
    return bool(rows.size(0)) and has_te_kernels(rows.device, recipe)  # without rows there is nothing for them to do


def _operands(rows: Tensor, recipe: Recipe) -> Any:
    if _runs_te_kernels(rows, recipe):
        from deepep_train.fp8.gemm_te import Operands
    else:
        from deepep_train.fp8.gemm_reference import Operands  # type: ignore[assignment]
    return Operands
