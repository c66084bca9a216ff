"""Transformer Engine's quantized tensors <-> `Quantized`. Imports Transformer Engine only once the caller has.

Its internals are read where no accessor exists: pytorch/tensor/{float8_blockwise_tensor,mxfp8_tensor,float8_tensor}.py of
version 2.20.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deepep_train.errors import ArgumentError
from deepep_train.fp8.quantized import Quantized, Recipe, check_hidden, placeholder, scale_shape


def is_te(x: Any) -> bool:
    """Whether `x` is one of Transformer Engine's quantized tensors, of whatever kind."""
    module = sys.modules.get("transformer_engine.pytorch.quantized_tensor")
    return module is not None and isinstance(x, module.QuantizedTensorStorage)


def from_te(x: Any, argument: str = "x") -> Quantized:
    """The same bytes as a `Quantized` of one group.

    Raises:
        ArgumentError: for kinds that do not travel: NVFP4 and others, 2D-scaled, columnwise only, swizzled scales; for what
            wants a gradient and does not know its GPU's index.
    """
    name = type(x).__name__
    storage = {cls.__name__ for cls in type(x).__mro__}
    if "Float8BlockwiseQTensorStorage" in storage:
        if x._is_2D_scaled:
            raise ArgumentError(f"{argument} must be scaled in 1x128 blocks, got a {name} with 128x128 blocks (2D)", argument)
        recipe, data, scales = Recipe.BLOCK, x._rowwise_data, x._rowwise_scale_inv
    elif "MXFP8TensorStorage" in storage:
        if x._with_gemm_swizzled_scales:
            raise ArgumentError(f"{argument} must be an MXFP8 tensor whose scales are not yet swizzled for GEMM", argument)
        recipe, data, scales = Recipe.MXFP8, x._rowwise_data, x._rowwise_scale_inv
    elif "Float8TensorStorage" in storage:
        recipe, data, scales = Recipe.TENSOR, x._data, x._scale_inv
    else:
        missing = "packed 4-bit rows and their two levels of scales" if "NVFP4TensorStorage" in storage else "its layout"
        raise ArgumentError(
            f"{argument}: {name} cannot be dispatched ({missing} are not implemented); "
            "1x128 block scaling, MXFP8 and per-tensor scaling can",
            argument,
        )
    if data is None:
        raise ArgumentError(f"{argument} must hold rowwise data, got a {name} with columnwise data only", argument)
    if scales is None:
        raise ArgumentError(f"{argument} must hold its rowwise data's scales, got a {name} without them", argument)
    if data.dim() != 2:
        raise ArgumentError(f"{argument} must be [tokens, hidden], got a {name} of shape {list(data.shape)}", argument)
    num_rows, hidden = data.shape
    check_hidden(hidden, argument)
    if recipe is not Recipe.TENSOR:
        expected = scale_shape(recipe, num_rows, hidden)
        if not scales.is_contiguous() or tuple(scales.shape) != expected:
            raise ArgumentError(
                f"{argument}: the scales of a {name} of shape {[num_rows, hidden]} must be {list(expected)} and contiguous, "
                f"got {list(scales.shape)}",
                argument,
            )
        scales = scales.view(-1)
    from transformer_engine.pytorch.constants import TE_DType_To_Torch

    if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
        _check_autograd_device(x, data, argument)
    # A tensor is its own place in autograd; a bare storage has none.
    rows = x if isinstance(x, Tensor) else placeholder(num_rows, hidden, x._dtype, data.device)
    return Quantized(recipe, data.detach().view(TE_DType_To_Torch[x._fp8_dtype]), scales, (num_rows,), rows)


def _check_autograd_device(x: Tensor, data: Tensor, argument: str) -> None:
    """Its `.device` is its data's, but what autograd knows is what it was allocated with: by default "cuda"
    without an index, at which autograd's engine fails in the backward pass (an internal assertion on its ready queues)."""
    known = torch._C.TensorBase.device.__get__(x, type(x))
    if known.type == "cuda" and known.index is None:
        raise ArgumentError(
            f"{argument}: a {type(x).__name__} allocated on 'cuda', without the GPU's index, cannot have a gradient: PyTorch's "
            f"backward pass fails on it. Allocate it with make_empty(..., device='{data.device}'), or detach it",
            argument,
        )


def to_te(q: Quantized, like: Any) -> list[Tensor]:
    """Every group as a tensor of the class and with the quantizer of `like`, rowwise only, over the same memory;
    differentiable."""
    return list(_ToTE.apply(q.rows, q, like))


def _builder(q: Quantized, like: Any) -> Callable[[Tensor, Tensor], Tensor]:
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockwiseQTensor
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor
    from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Tensor

    quantizer = like._quantizer
    if quantizer is not None:
        quantizer = quantizer.copy()
        quantizer.set_usage(rowwise=True, columnwise=False)
    rowwise = {"columnwise_data": None, "columnwise_scale_inv": None, "fp8_dtype": like._fp8_dtype, "quantizer": quantizer}

    def build(data: Tensor, scales: Tensor) -> Tensor:
        where = {"shape": data.shape, "dtype": q.dtype, "device": data.device}
        if q.recipe is Recipe.TENSOR:
            how = {"fp8_dtype": like._fp8_dtype, "quantizer": quantizer}
            return Float8Tensor(data=data, fp8_scale_inv=scales, **how, **where)
        both = {"rowwise_data": data, "rowwise_scale_inv": scales, **rowwise, **where}
        if q.recipe is Recipe.BLOCK:
            return Float8BlockwiseQTensor(is_2D_scaled=False, **both)
        return MXFP8Tensor(with_gemm_swizzled_scales=False, **both)

    return build


class _ToTE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, q: Quantized, like: Any) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # a group whose gradient nobody computed
        ctx.shapes = [(m, rows.size(1)) for m in q.splits]
        ctx.kind = {"dtype": q.dtype, "device": q.data.device}
        build = _builder(q, like)
        return tuple(build(data.view(torch.uint8), scales) for data, scales in q.groups())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        given = zip(grads, ctx.shapes, strict=True)
        parts = [torch.zeros(shape, **ctx.kind) if g is None else g.to(ctx.kind["dtype"]) for g, shape in given]
        return torch.cat(parts), None, None
