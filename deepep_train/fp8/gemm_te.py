"""The operands and grouped GEMMs of `grouped_linear` by Transformer Engine's kernels. Imports Transformer Engine.

Its call patterns are those of transformer_engine/pytorch/module/grouped_linear.py, version 2.20: forward TN, input gradient NN,
weight gradient NT, each with a list of one operand for every group.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
import transformer_engine.pytorch  # noqa: F401 - loads what the next line names
import transformer_engine_torch as tex
from torch import Tensor
from transformer_engine.pytorch.constants import TE_DType_To_Torch
from transformer_engine.pytorch.cpp_extensions import general_grouped_gemm
from transformer_engine.pytorch.quantized_tensor import prepare_for_saving, restore_from_saved
from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer
from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Quantizer
from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import Float8BlockwiseQTensorStorage
from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage
from transformer_engine.pytorch.tensor.storage.mxfp8_tensor_storage import MXFP8TensorStorage

from deepep_train.fp8.quantized import Quantized, Recipe

DTYPES = {torch_dtype: dtype for dtype, torch_dtype in TE_DType_To_Torch.items()}


def quantizer(
    recipe: Recipe,
    fp8_dtype: torch.dtype,
    *,
    rowwise: bool = True,
    columnwise: bool = False,
    is_weight: bool = False,
    power_of_two: bool = True,
    min_amax: float = 0.0,
) -> Any:
    """Transformer Engine's for one operand; it gives bare storages."""
    usage, dtype = {"rowwise": rowwise, "columnwise": columnwise}, DTYPES[fp8_dtype]
    if recipe is Recipe.BLOCK:
        how = {"force_pow_2_scales": power_of_two, "amax_epsilon": min_amax, "block_scaling_dim": 2 if is_weight else 1}
        made: Any = Float8BlockQuantizer(dtype, **usage, **how)
    elif recipe is Recipe.MXFP8:
        made = MXFP8Quantizer(dtype, **usage)
    else:
        made = Float8CurrentScalingQuantizer(dtype, device=torch.device("cuda"), **usage)
    made.internal = True
    return made


def quantize(x: Tensor, recipe: Recipe, fp8_dtype: torch.dtype, power_of_two: bool, min_amax: float) -> tuple[Tensor, Tensor]:
    """`Quantized.data` and `.scales` of one group: BLOCK, or MXFP8 with a multiple of 32 rows."""
    made = quantizer(recipe, fp8_dtype, power_of_two=power_of_two, min_amax=min_amax)(x.detach().contiguous())
    return made._rowwise_data.view(fp8_dtype), made._rowwise_scale_inv.view(-1)


class Rows:
    """Activations or gradients that were quantized here, in one direction or both."""

    def __init__(self, storages: list[Any]) -> None:
        self.rowwise = storages

    def columnwise(self) -> list[Any]:
        return self.rowwise

    def release_rowwise(self) -> None:
        for storage in self.rowwise:
            storage.update_usage(rowwise_usage=False, columnwise_usage=True)

    def unload(self) -> list[Tensor | None]:
        """The tensors, for autograd to save: they are gone from here until `load`."""
        return prepare_for_saving(*self.rowwise)[0]

    def load(self, tensors: list[Tensor | None]) -> None:
        restore_from_saved(self.rowwise, tensors)


class Received:
    """Received groups as GEMM operands: rowwise as they came; columnwise, for the weight gradient, quantized again from their
    values, once, when the first of them is asked for it."""

    def __init__(self, q: Quantized, quantizers: Sequence[Any] | None = None) -> None:
        """`quantizers`: one for every group, whose settings the columnwise operands take; None: this library's."""
        self._q: Quantized | None = q
        self._quantizers = quantizers or [quantizer(q.recipe, q.data.dtype)] * len(q.splits)
        self.rowwise = [self._storage(q, *group, own) for group, own in zip(q.groups(), self._quantizers, strict=True)]
        self._columnwise: list[Any] | None = None

    @staticmethod
    def _storage(q: Quantized, data: Tensor, scales: Tensor, own: Any) -> Any:
        data, kind = data.view(torch.uint8), {"fp8_dtype": DTYPES[q.data.dtype], "quantizer": own, "fake_dtype": q.dtype}
        if q.recipe is Recipe.TENSOR:
            return Float8TensorStorage(data=data, fp8_scale_inv=scales, data_transpose=None, **kind)
        parts = {"rowwise_data": data, "rowwise_scale_inv": scales, "columnwise_data": None, "columnwise_scale_inv": None}
        if q.recipe is Recipe.BLOCK:
            return Float8BlockwiseQTensorStorage(is_2D_scaled=False, **parts, **kind)
        return MXFP8TensorStorage(with_gemm_swizzled_scales=False, **parts, **kind)

    def columnwise(self) -> list[Any]:
        """One operand for every group."""
        if self._columnwise is None:
            assert self._q is not None
            q, self._q = self._q, None
            self._columnwise = _columnwise(q, self._quantizers)
        return self._columnwise

    def become_columnwise_on_demand(self) -> list[Any]:
        """The storages, which then know `update_usage(rowwise_usage=False, columnwise_usage=True)`, as those of Transformer
        Engine's own quantizer do that made both at once. (A subclass could not: the kernels' binding wants the exact class.)"""
        if self._q is not None and self._q.recipe is not Recipe.TENSOR:  # whose class makes its transpose
            for i, storage in enumerate(self.rowwise):
                storage.update_usage = _Usage(self, i, storage)
        handed_over, self.rowwise = self.rowwise, []  # else the storages would keep themselves alive
        return handed_over


class _Usage:
    """`update_usage` of one storage of a `Received`. Refers to it weakly: nothing but its user keeps it alive."""

    def __init__(self, received: Received, index: int, storage: Any) -> None:
        self._received, self._index, self._storage = received, index, weakref.ref(storage)

    def __call__(self, rowwise_usage: bool | None = None, columnwise_usage: bool | None = None) -> None:
        storage = self._storage()
        assert storage is not None
        if columnwise_usage:
            made = self._received.columnwise()[self._index]
            storage._columnwise_data, storage._columnwise_scale_inv = made._columnwise_data, made._columnwise_scale_inv
            del storage.update_usage
        if rowwise_usage is False:
            storage._rowwise_data = storage._rowwise_scale_inv = None


def _columnwise(q: Quantized, quantizers: Sequence[Any]) -> list[Any]:
    """Every group quantized along its columns, from its values in the dtype that was quantized before the wire."""
    if q.recipe is Recipe.TENSOR:
        storages = [Received._storage(q, *group, own) for group, own in zip(q.groups(), quantizers, strict=True)]
        for storage in storages:
            storage.update_usage(rowwise_usage=False, columnwise_usage=True)
        return storages
    columnwise = []
    for given in quantizers:
        own = given.copy()
        own.set_usage(rowwise=False, columnwise=True)
        own.internal = True
        columnwise.append(own)
    return tex.split_quantize(q.dequantize().detach(), list(q.splits), columnwise)


class Operands:
    """The weights of one linear, and its three products. Shapes as in `grouped_linear`."""

    def __init__(self, weights: Sequence[Tensor], recipe: Recipe, is_transposed: bool, fp8_dtype: torch.dtype) -> None:
        self.recipe, self.is_transposed = recipe, is_transposed
        own = quantizer(recipe, fp8_dtype, columnwise=True, is_weight=True)
        self.weights = [own(w.detach().contiguous()) for w in weights]

    received = staticmethod(Received)

    def unload(self) -> list[Tensor | None]:
        """The weights' tensors, for autograd to save; `rows` and `weight_gradient` do without."""
        return prepare_for_saving(*self.weights)[0]

    def load(self, tensors: list[Tensor | None]) -> None:
        restore_from_saved(self.weights, tensors)

    def rows(self, x: Tensor, splits: Sequence[int], fp8_dtype: torch.dtype, columnwise: bool) -> Rows:
        own = quantizer(self.recipe, fp8_dtype, columnwise=columnwise)
        return Rows(tex.split_quantize(x.detach().contiguous(), list(splits), [own] * len(splits)))

    def forward(self, x: Rows | Received, out: Tensor, splits: Sequence[int]) -> Tensor:
        return _gemm(self.weights, x.rowwise, [out], "NN" if self.is_transposed else "TN", splits)

    def input_gradient(self, grad: Rows, out: Tensor, splits: Sequence[int]) -> Tensor:
        return _gemm(self.weights, grad.rowwise, [out], "TN" if self.is_transposed else "NN", splits, grad=True)

    def weight_gradient(self, x: Rows | Received, grad: Rows, out: list[Tensor], splits: Sequence[int]) -> None:
        a, b = x.columnwise(), grad.columnwise()
        if self.is_transposed:
            a, b = b, a
        _gemm(a, b, out, "NT", splits, grad=True, is_single=False)


def _gemm(
    a: list, b: list, out: list[Tensor], layout: str, splits: Sequence[int], grad: bool = False, is_single: bool = True
) -> Tensor:
    how = {"layout": layout, "m_splits": list(splits), "grad": grad, "single_output": is_single}
    general_grouped_gemm(a, b, out, [None] * len(a), out[0].dtype, use_split_accumulator=True, **how)
    return out[0]
