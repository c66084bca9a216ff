"""Transformer Engine's own classes through dispatch. Its kernels need a GPU; its classes and layouts do not, and neither
does the arithmetic of block scaling's `dequantize`, which is torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import assert_same_bits, run_ranks
from torch import Tensor

import deepep_train as dt
from deepep_train import fp8
from deepep_train.fp8 import Recipe, te

pytest.importorskip("transformer_engine.pytorch", reason="Transformer Engine is not installed")

IDX = torch.tensor([[0, 3], [1, -1], [2, 3], [3, 0]]).repeat(8, 1)  # MXFP8 tensors have a multiple of 32 rows
CLASSES = {Recipe.BLOCK: "Float8BlockwiseQTensor", Recipe.MXFP8: "MXFP8Tensor", Recipe.TENSOR: "Float8Tensor"}


def empty(recipe: Recipe, rows: int, hidden: int = 256, **how: Any) -> Any:
    """A tensor as Transformer Engine allocates it; per-tensor ones are made by hand, as allocating them asks for a GPU."""
    from transformer_engine.pytorch.constants import DType
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor
    from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Quantizer

    where: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cpu"}
    if recipe is Recipe.TENSOR:
        data = torch.zeros(rows, hidden, dtype=torch.uint8)
        kind = {"fp8_dtype": DType.kFloat8E4M3, "quantizer": None}
        return Float8Tensor(shape=data.shape, data=data, fp8_scale_inv=torch.ones(1), **kind, **where)
    usage = {"rowwise": True, "columnwise": False} | how
    if recipe is Recipe.MXFP8:
        return MXFP8Quantizer(DType.kFloat8E4M3, **usage).make_empty((rows, hidden), **where)
    return Float8BlockQuantizer(DType.kFloat8E4M3, **{"block_scaling_dim": 1} | usage).make_empty((rows, hidden), **where)


def filled(x: Tensor, recipe: Recipe) -> tuple[Any, fp8.Quantized]:
    """x in Transformer Engine's class, and the same from the reference quantizer."""
    q = fp8.quantize(x, recipe, scale=torch.tensor([1 / 32]) if recipe is Recipe.TENSOR else None)
    tensor = empty(recipe, *x.shape)
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


def both(rank: int, size: int, group: dist.ProcessGroup, recipe: Recipe, layout: str) -> None:
    """A Transformer Engine tensor and the same values as `Quantized`: the same bits arrive, in the right class."""
    buffer = dt.Buffer(group, timeout=20)
    x = torch.randn(32, 256, generator=torch.Generator().manual_seed(rank)).bfloat16()
    tensor, q = filled(x, recipe)
    tensor.requires_grad_()
    how: dict[str, Any] = {"buffer": buffer, "num_experts": 4, "layout": layout, "alignment": 32}
    out, plain = dt.dispatch(tensor, IDX, **how), dt.dispatch(q, IDX, **how)
    tensors = out.x if layout == "expert" else [out.x]
    assert len(tensors) == (2 if layout == "expert" else 1)
    for got, (data, scales) in zip(tensors, plain.x.groups(), strict=True):
        assert type(got).__name__ == CLASSES[recipe]
        assert got.dtype == torch.bfloat16
        assert got.shape == data.shape
        assert_same_bits(parts(got)[0], data.view(torch.uint8))
        assert_same_bits(parts(got)[1], scales)
        assert all(p.is_contiguous() for p in parts(got))
        if recipe is not Recipe.TENSOR:
            assert got._quantizer.get_scale_shape(got.shape, columnwise=False) == tuple(scales.shape)
            assert not got._quantizer.columnwise_usage
    if recipe is Recipe.BLOCK:
        assert_same_bits(torch.cat([t.dequantize() for t in tensors]), plain.x.dequantize().detach())
    again = dt.dispatch(tensor, buffer=buffer, handle=out.handle).x
    assert_same_bits(parts(again[-1] if layout == "expert" else again)[0], parts(tensors[-1])[0])

    c = torch.randn(out.handle.plan.num_rows, 256).bfloat16()
    # The last group's gradient is left out: it counts as zero.
    kept = tensors[:-1] if layout == "expert" else tensors
    used = sum(t.size(0) for t in kept)
    torch.autograd.backward(kept, list(c[:used].split([t.size(0) for t in kept])))
    c[used:] = 0
    assert_same_bits(tensor.grad, dt.combine(c, out.handle))


@pytest.mark.parametrize("layout", ["rank", "expert"])
@pytest.mark.parametrize("recipe", Recipe)
def test_classes_arrive_as_themselves(recipe: Recipe, layout: str) -> None:
    run_ranks(2, both, recipe, layout)


def test_from_te_and_back_keeps_the_bytes() -> None:
    for recipe in Recipe:
        tensor, q = filled(torch.randn(32, 384).bfloat16(), recipe)
        read = te.from_te(tensor)
        assert_same_bits(read.data, q.data)
        assert_same_bits(read.scales, q.scales)
        for mine, value in zip(parts(te.to_te(read, tensor)[0]), parts(tensor), strict=True):
            assert_same_bits(mine, value)


def refused(rank: int, size: int, group: dist.ProcessGroup, name: str) -> tuple[str, tuple[int, ...]]:
    """Rank 1 sends what cannot travel: what the error says on this rank."""
    buffer = dt.Buffer(group, timeout=20)
    x = empty(Recipe.BLOCK, 32) if rank == 0 else unsuitable(name)
    with pytest.raises(dt.ArgumentError) as caught:
        dt.dispatch(x, IDX, buffer=buffer, num_experts=4)
    assert caught.value.argument == "x"
    return str(caught.value), tuple(caught.value.ranks or ())


def unsuitable(name: str) -> Any:
    from transformer_engine.pytorch.constants import DType
    from transformer_engine.pytorch.tensor.storage.nvfp4_tensor_storage import NVFP4TensorStorage

    if name == "2D":
        return empty(Recipe.BLOCK, 128, block_scaling_dim=2)
    if name == "columnwise":
        return empty(Recipe.BLOCK, 32, rowwise=False, columnwise=True)
    if name == "width":
        return empty(Recipe.BLOCK, 32, 192)
    if name == "swizzled":
        tensor = empty(Recipe.MXFP8, 32)
        tensor._with_gemm_swizzled_scales = True
        return tensor
    data, scales = torch.zeros(32, 128, dtype=torch.uint8), torch.zeros(128, 16, dtype=torch.uint8)
    return NVFP4TensorStorage(data, scales, None, None, torch.ones(1), None, DType.kFloat4E2M1, None, False)


@pytest.mark.parametrize(
    ("name", "text"),
    [("2D", "128x128"), ("columnwise", "columnwise"), ("width", "192"), ("swizzled", "swizzled"), ("NVFP4", "4-bit")],
)
def test_what_cannot_travel_is_refused_on_all_ranks(name: str, text: str) -> None:
    for message, ranks in run_ranks(2, refused, name):
        assert text in message
        assert ranks == (1,)
