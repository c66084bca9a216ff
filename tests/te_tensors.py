"""Transformer Engine's tensors without its kernels: on CPUs, and of recipes whose kernels the GPU at hand does not run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepep_train import fp8
from deepep_train.fp8 import Recipe
from deepep_train.fp8.quantized import quantize_in_torch

Device = torch.device | str  # of a GPU with its index, else autograd's engine refuses what has a gradient

CLASSES = {Recipe.BLOCK: "Float8BlockwiseQTensor", Recipe.MXFP8: "MXFP8Tensor", Recipe.TENSOR: "Float8Tensor"}


def empty(recipe: Recipe, rows: int, hidden: int = 256, device: Device = "cpu", **how: Any) -> Any:
    """A tensor as Transformer Engine allocates it; per-tensor ones are made by hand, as allocating them asks for a GPU."""
    from transformer_engine.pytorch.constants import DType
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor
    from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Quantizer

    where: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    if recipe is Recipe.TENSOR:
        data = torch.zeros(rows, hidden, dtype=torch.uint8, device=device)
        kind = {"fp8_dtype": DType.kFloat8E4M3, "quantizer": None}
        return Float8Tensor(shape=data.shape, data=data, fp8_scale_inv=torch.ones(1, device=device), **kind, **where)
    usage = {"rowwise": True, "columnwise": False} | how
    if recipe is Recipe.MXFP8:
        return MXFP8Quantizer(DType.kFloat8E4M3, **usage).make_empty((rows, hidden), **where)
    return Float8BlockQuantizer(DType.kFloat8E4M3, **{"block_scaling_dim": 1} | usage).make_empty((rows, hidden), **where)


def filled(x: Tensor, recipe: Recipe) -> tuple[Any, fp8.Quantized]:
    """x in Transformer Engine's class, and the same from the reference quantizer."""
    scale = torch.tensor([1 / 32], device=x.device) if recipe is Recipe.TENSOR else None
    data, scales = quantize_in_torch(x, recipe, torch.float8_e4m3fn, True, 0.0, scale)
    q = fp8.Quantized(recipe, data, scales, (x.size(0),), x.detach())
    tensor = empty(recipe, *x.shape, device=x.device)
    data, scales = q.groups()[0]
    for mine, value in zip(parts(tensor), (data.view(torch.uint8), scales), strict=True):
        assert mine.shape == value.shape, "the layouts are Transformer Engine's"
        assert mine.dtype == value.dtype
        mine.copy_(value)
    return tensor, q


def parts(tensor: Any) -> tuple[Tensor, Tensor]:
    if hasattr(tensor, "_data"):
        return tensor._data, tensor._scale_inv
    return tensor._rowwise_data, tensor._rowwise_scale_inv


# What cannot travel, and what the error says.
UNSUITABLE = [
    ("2D", "128x128"),
    ("columnwise", "columnwise"),
    ("no scales", "without them"),
    ("width", "192"),
    ("swizzled", "swizzled"),
    ("NVFP4", "4-bit"),
]


def unsuitable(name: str, device: Device = "cpu") -> Any:
    """What dispatch refuses, by a name of `UNSUITABLE`."""
    from transformer_engine.pytorch.constants import DType
    from transformer_engine.pytorch.tensor.storage.nvfp4_tensor_storage import NVFP4TensorStorage

    if name == "2D":
        return empty(Recipe.BLOCK, 128, device=device, block_scaling_dim=2)
    if name == "columnwise":
        return empty(Recipe.BLOCK, 32, device=device, rowwise=False, columnwise=True)
    if name == "no scales":
        tensor = empty(Recipe.BLOCK, 32, device=device)
        tensor._rowwise_scale_inv = None
        return tensor
    if name == "width":
        return empty(Recipe.BLOCK, 32, 192, device)
    if name == "swizzled":
        tensor = empty(Recipe.MXFP8, 32, device=device)
        tensor._with_gemm_swizzled_scales = True
        return tensor
    kind: dict[str, Any] = {"dtype": torch.uint8, "device": device}
    data, scales = torch.zeros(32, 128, **kind), torch.zeros(128, 16, **kind)
    return NVFP4TensorStorage(data, scales, None, None, torch.ones(1, device=device), None, DType.kFloat4E2M1, None, False)
