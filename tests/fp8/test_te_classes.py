"""Transformer Engine's own classes through dispatch. Its kernels need a GPU; its classes and layouts do not, and neither
does the arithmetic of block scaling's `dequantize`, which is torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import assert_same_bits, run_ranks
from te_tensors import CLASSES, UNSUITABLE, empty, filled, parts, unsuitable

import deepep_train as dt
from deepep_train.fp8 import Recipe, te

pytest.importorskip("transformer_engine.pytorch", reason="Transformer Engine is not installed")

IDX = torch.tensor([[0, 3], [1, -1], [2, 3], [3, 0]]).repeat(8, 1)  # MXFP8 tensors have a multiple of 32 rows


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


def without_index(rank: int, size: int, group: dist.ProcessGroup) -> tuple[str, tuple[int, ...]]:
    """Rank 1's tensor was allocated on "cuda", as far as autograd knows: it is sent if it needs no gradient."""
    buffer = dt.Buffer(group, timeout=20)
    x = filled(torch.randn(32, 256, generator=torch.Generator().manual_seed(rank)).bfloat16(), Recipe.BLOCK)[0]
    good = dt.dispatch(x, IDX, buffer=buffer, num_experts=4).x
    if rank == 1:
        kept = {k: v for k, v in x.get_metadata().items() if k != "fake_dtype"}
        x = type(x)(shape=x.shape, dtype=x.dtype, device="cuda", **kept)
    got = dt.dispatch(x, IDX, buffer=buffer, num_experts=4).x
    assert all(torch.equal(a, b) for a, b in zip(parts(got), parts(good), strict=True))
    with pytest.raises(dt.ArgumentError) as caught:
        dt.dispatch(x.requires_grad_(), IDX, buffer=buffer, num_experts=4)
    return str(caught.value), tuple(caught.value.ranks or ())


def test_a_gpu_without_index_is_refused_where_there_is_a_gradient() -> None:
    for message, ranks in run_ranks(2, without_index):
        assert "make_empty(..., device='cpu')" in message and ranks == (1,)


def refused(rank: int, size: int, group: dist.ProcessGroup, name: str) -> tuple[str, tuple[int, ...]]:
    """Rank 1 sends what cannot travel: what the error says on this rank."""
    buffer = dt.Buffer(group, timeout=20)
    x = empty(Recipe.BLOCK, 32) if rank == 0 else unsuitable(name)
    with pytest.raises(dt.ArgumentError) as caught:
        dt.dispatch(x, IDX, buffer=buffer, num_experts=4)
    assert caught.value.argument == "x"
    return str(caught.value), tuple(caught.value.ranks or ())


@pytest.mark.parametrize(("name", "text"), UNSUITABLE)
def test_what_cannot_travel_is_refused_on_all_ranks(name: str, text: str) -> None:
    for message, ranks in run_ranks(2, refused, name):
        assert text in message
        assert ranks == (1,)
