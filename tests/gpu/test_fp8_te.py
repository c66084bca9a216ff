"""Transformer Engine's own classes through the nvlink engine: made by its quantizers, dispatched, and given to its grouped GEMM
as they arrive."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import assert_same_bits
from reference import Given
from shared import buffer_of, run_ranks, to
from te_tensors import CLASSES, UNSUITABLE, empty, filled, parts, unsuitable
from test_fp8 import HIDDEN, OUT, apart, given_of, how_of
from torch import Tensor

import deepep_train as dt
from deepep_train import fp8
from deepep_train.fp8 import Quantized, Recipe, te_present

pytestmark = pytest.mark.skipif(not te_present.is_installed(), reason="Transformer Engine is not installed")

KINDS = ("block", "block, any scale", "delayed", "current")


def quantizer_of(kind: str) -> Any:
    """As Transformer Engine's modules make them, but that it gives tensors and not bare storages."""
    from transformer_engine.pytorch.constants import DType
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer, Float8Quantizer

    usage = {"rowwise": True, "columnwise": False}
    if kind == "delayed":
        scale, amax = torch.tensor([13.0], device="cuda"), torch.zeros(1, device="cuda")
        return Float8Quantizer(scale, amax, DType.kFloat8E4M3, **usage)
    if kind == "current":
        return Float8CurrentScalingQuantizer(
            DType.kFloat8E4M3, device=torch.device("cuda", torch.cuda.current_device()), **usage
        )
    return Float8BlockQuantizer(
        DType.kFloat8E4M3, force_pow_2_scales=kind == "block", amax_epsilon=0.0, block_scaling_dim=1, **usage
    )


def made(quantizer: Any, rows: Tensor) -> Any:
    """Its kernels want rows."""
    return quantizer(rows) if len(rows) else quantizer.make_empty(rows.shape, dtype=rows.dtype, device=rows.device)


def weights_of(kind: str, count: int) -> list[Any]:
    from deepep_train.fp8 import gemm_te

    recipe = Recipe.BLOCK if kind.startswith("block") else Recipe.TENSOR
    own = gemm_te.quantizer(recipe, torch.float8_e4m3fn, columnwise=True, is_weight=True)
    g = torch.Generator("cuda").manual_seed(1)
    return [own((torch.randn(OUT, HIDDEN, device="cuda", generator=g) * 0.05).bfloat16()) for _ in range(count)]


def multiply(weights: list[Any], rows: list[Any], splits: list[int]) -> Tensor:
    from transformer_engine.pytorch.cpp_extensions import general_grouped_gemm

    out = torch.empty(sum(splits), OUT, dtype=torch.bfloat16, device="cuda")
    how = {"layout": "TN", "m_splits": splits, "use_split_accumulator": True, "single_output": True}
    general_grouped_gemm(weights, rows, [out], [None] * len(weights), out.dtype, **how)
    return out


def classes(rank: int, size: int, group: dist.ProcessGroup, exchange: Any, given: list[Given], kind: str) -> bool:
    """Checks everything here, where the tensors are; gives whether both products have the same bits."""
    buffer, mine, how = buffer_of(group), given[rank], how_of(exchange)
    x, idx, weights = to((mine.x, mine.topk_idx, mine.topk_weights), "cuda")
    quantizer = quantizer_of(kind)
    name = "Float8BlockwiseQTensor" if kind.startswith("block") else "Float8Tensor"
    sent = made(quantizer, x)
    assert type(sent).__name__ == name
    sent.requires_grad_()
    out = dt.dispatch(sent, idx, weights, buffer=buffer, **how)
    plain = dt.dispatch(x, idx, weights, buffer=buffer, **how)
    splits = plain.tokens_per_expert.tolist()
    assert isinstance(out.x, list) and [t.size(0) for t in out.x] == splits
    own: list[Any] = []
    for got, rows in zip(out.x, plain.x.split(splits), strict=True):
        assert type(got).__name__ == name and got.dtype == torch.bfloat16 and tuple(got.shape) == tuple(rows.shape)
        if kind == "current":  # of each expert's rows alone it would find another scale
            continue
        own.append(made(quantizer, rows))
        for one, other in zip(parts(got), parts(own[-1]), strict=True):
            assert one.is_contiguous() and other.is_contiguous()
            if len(rows):
                assert_same_bits(one, other)
            else:
                assert one.shape == other.shape or kind == "delayed"
    products = [multiply(weights_of(kind, len(splits)), rows, splits) for rows in (out.x, own) if rows]
    if kind == "current":
        values = torch.cat([t.dequantize() for t in out.x if t.size(0)]) if sum(splits) else plain.x
        assert apart(values, plain.x) < 0.03
        exact = [
            a.float() @ w.dequantize().float().t()
            for a, w in zip(values.split(splits), weights_of(kind, len(splits)), strict=True)
        ]
        assert apart(products[0], torch.cat(exact)) < 0.005
        products *= 2
    assert apart(*products) < 1e-3

    c = torch.randn_like(plain.x)
    torch.autograd.backward(out.x, list(c.split(splits)))
    assert_same_bits(sent.grad, dt.combine(c, plain.handle), "gradient")
    flat = dt.dispatch(sent.detach(), idx, buffer=buffer, num_experts=exchange.num_experts).x
    ranked = dt.dispatch(x, idx, buffer=buffer, num_experts=exchange.num_experts).x
    assert type(flat).__name__ == name
    if kind != "current" and len(ranked):
        m = len(ranked)
        expected = quantizer(ranked)
        assert_same_bits(parts(flat)[0], parts(expected)[0], "data by rank")
        scales = [t[..., :m].contiguous() for t in (parts(flat)[1], parts(expected)[1])]  # what is left of a block is undefined
        assert_same_bits(*scales, "scales by rank")
    buffer.check()
    return torch.equal(*products)


@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_what_arrives_is_what_the_quantizer_makes_and_grouped_gemm_takes_it(record_property: Any, kind: str, size: int) -> None:
    exchange, given = given_of(size, "expert", 16)
    if not kind.startswith("block"):  # one scale for all ranks, which no tokens don't have
        exchange = replace(exchange, tokens=tuple(n or 5 for n in exchange.tokens))
        g = exchange.generator()
        given = [
            Given(torch.randn(n, HIDDEN, generator=g).bfloat16().clamp(-3, 3), o.topk_idx, o.topk_weights)
            for n, o in zip(exchange.tokens, exchange.given(), strict=True)
        ]
        for one in given:
            one.x[0, 0] = 4.0
    results = run_ranks(size, classes, exchange, given, kind, timeout=120)
    record_property("same bits", results)
    assert all(results), "products of the same operands"


def scales_differ(rank: int, size: int, group: dist.ProcessGroup) -> tuple[str, str, Any]:
    x = torch.ones(16, HIDDEN, device="cuda").bfloat16() * (rank == 1 or 2)
    with pytest.raises(dt.ArgumentError) as caught:
        dt.dispatch(
            quantizer_of("current")(x),
            torch.zeros(16, 1, dtype=torch.int64, device="cuda"),
            buffer=buffer_of(group),
            num_experts=size,
        )
    return str(caught.value), str(caught.value.argument), tuple(caught.value.ranks or ())


def test_ranks_with_different_scales_are_refused() -> None:
    for text, argument, ranks in run_ranks(4, scales_differ):
        assert "scale 0.00223" in text and "scale 0.00446" in text, text
        assert (argument, ranks) == ("recipe", (1,))


def refused(rank: int, size: int, group: dist.ProcessGroup, name: str) -> tuple[str, Any]:
    idx = torch.tensor([[0, 3], [1, -1], [2, 3], [3, 0]], device="cuda").repeat(8, 1)
    x = unsuitable(name, idx.device) if rank == 1 else empty(Recipe.BLOCK, 32, device=idx.device)
    with pytest.raises(dt.ArgumentError) as caught:
        dt.dispatch(x, idx, buffer=buffer_of(group), num_experts=4)
    assert caught.value.argument == "x"
    return str(caught.value), tuple(caught.value.ranks or ())


@pytest.mark.parametrize(("name", "text"), UNSUITABLE)
def test_what_cannot_travel_is_refused_on_all_ranks(name: str, text: str) -> None:
    for message, ranks in run_ranks(4, refused, name):
        assert text in message
        assert ranks == (1,)


def without_index(rank: int, size: int, group: dist.ProcessGroup) -> None:
    """As `make_empty` allocates by default: sent, but autograd's engine could not give it a gradient."""
    x, how = empty(Recipe.BLOCK, 32, device="cuda"), {"buffer": buffer_of(group), "num_experts": size}
    idx = torch.full((32, 1), rank, device="cuda")
    assert_same_bits(parts(dt.dispatch(x, idx, **how).x)[0], parts(x)[0])
    with pytest.raises(dt.ArgumentError, match=f"device='cuda:{torch.cuda.current_device()}'"):
        dt.dispatch(x.requires_grad_(), idx, **how)


def test_a_gpu_without_index() -> None:
    run_ranks(2, without_index)


def mx(rank: int, size: int, group: dist.ProcessGroup) -> None:
    """MXFP8's kernels need SM100: its class and the places of its scales, in a tensor that torch filled."""
    g = torch.Generator().manual_seed(rank)
    x, idx = torch.randn(64, HIDDEN, generator=g).bfloat16().cuda(), torch.randint(0, 8, (64, 3), generator=g).cuda()
    tensor, _ = filled(x, Recipe.MXFP8)
    how: dict[str, Any] = {"buffer": buffer_of(group), "num_experts": 8, "layout": "expert", "alignment": 32}
    got, plain = dt.dispatch(tensor, idx, **how).x, dt.dispatch(x, idx, **how)
    for mine, rows in zip(got, plain.x.split(plain.tokens_per_expert.tolist()), strict=True):
        assert type(mine).__name__ == CLASSES[Recipe.MXFP8]
        if not len(rows):
            continue
        expected, _ = filled(rows.contiguous(), Recipe.MXFP8)  # in memory that Transformer Engine laid out
        for one, other in zip(parts(mine), parts(expected), strict=True):
            assert_same_bits(one, other)


@pytest.mark.parametrize("size", [4, 8])
def test_mxfp8_layout(size: int) -> None:
    run_ranks(size, mx)


# grouped_linear: one scale for all rows, and experts without rows ------------------------------------------------------------


@pytest.mark.parametrize("splits", [(16, 0, 48), (0, 0, 32), (0, 0, 0), (32, 16, 16)], ids=str)
@pytest.mark.parametrize("is_received", [True, False], ids=["received", "quantized here"])
@pytest.mark.parametrize("recipe", [Recipe.BLOCK, Recipe.TENSOR])
def test_grouped_linear(record_property: Any, recipe: Recipe, is_received: bool, splits: tuple[int, ...]) -> None:
    """Beside the reference's products; an expert without rows has a gradient of zeros."""
    from deepep_train.fp8.gemm_reference import Operands as Reference
    from deepep_train.fp8.quantized import quantize_in_torch

    torch.manual_seed(7)
    x = torch.randn(sum(splits), HIDDEN, device="cuda").bfloat16()
    w = (torch.randn(len(splits), OUT, HIDDEN, device="cuda") * 0.05).bfloat16().requires_grad_()
    grad = torch.randn(sum(splits), OUT, device="cuda").bfloat16()
    scale = torch.tensor([1 / 64], device="cuda") if recipe is Recipe.TENSOR else None
    data, scales = quantize_in_torch(x, recipe, torch.float8_e4m3fn, True, 0.0, scale)
    rows = x.detach().requires_grad_()
    q = Quantized(recipe, data, scales, (len(x),), rows)
    if recipe.blocks is not None:
        q = replace(q, scales=recipe.blocks.put(q.row_scales().contiguous(), splits))
    q = replace(q, splits=splits)
    reference = Reference(list(w.detach()), recipe, False, torch.float8_e4m3fn)
    grad_dtype = torch.float8_e5m2 if recipe is Recipe.TENSOR else torch.float8_e4m3fn
    operand = reference.received(replace(q, rows=x)) if is_received else reference.rows(x, splits, torch.float8_e4m3fn, True)
    g = reference.rows(grad, splits, grad_dtype, True)
    y_r, x_r, w_r = torch.empty_like(grad), torch.empty_like(x), [torch.zeros_like(one) for one in w.detach()]
    reference.forward(operand, y_r, splits)
    reference.input_gradient(g, x_r, splits)
    reference.weight_gradient(operand, g, w_r, splits)

    y = fp8.grouped_linear(q if is_received else rows, w, None if is_received else splits, recipe=recipe)
    y.backward(grad)
    errors = {"y": apart(y, y_r), "x.grad": apart(rows.grad, x_r), "w.grad": apart(w.grad, torch.stack(w_r))}
    record_property("errors", errors)
    assert all(e < 0.01 for e in errors.values()), errors
    for m, one in zip(splits, w.grad, strict=True):
        assert m or not one.any(), "an expert without rows"


@pytest.mark.parametrize("splits", [(16, 0, 48), (0, 0, 32), (0, 0, 0)], ids=str)
def test_megatrons_grouped_linear_with_experts_without_rows(splits: tuple[int, ...]) -> None:
    """Transformer Engine's own layer, given what arrived, beside the same layer that quantizes the same values itself."""
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import Float8BlockScaling

    from deepep_train.megatron import quantized_experts

    torch.manual_seed(8)
    x = torch.randn(sum(splits), HIDDEN, device="cuda").bfloat16()
    grad = torch.randn(sum(splits), OUT, device="cuda").bfloat16()
    layer = te.GroupedLinear(len(splits), HIDDEN, OUT, bias=False, params_dtype=torch.bfloat16, device="cuda")
    q = fp8.quantize(x)
    q = Quantized(q.recipe, q.data, Recipe.BLOCK.blocks.put(q.row_scales().contiguous(), splits), splits, q.rows)
    results = []
    quantized_experts.install()
    try:
        for is_carried in (True, False):
            rows = (x if not is_carried else fp8.placeholder(*x.shape, x.dtype, x.device)).detach().requires_grad_()
            with te.autocast(enabled=True, recipe=Float8BlockScaling()):
                given = rows.view_as(rows)
                y = layer(quantized_experts.carry(given, q) if is_carried else given, list(splits))
            y.backward(grad)
            results.append([y, rows.grad] + [p.grad for p in layer.parameters()])
            layer.zero_grad()
    finally:
        quantized_experts.uninstall()
    (y, dx, *dws), (y_own, dx_own, *dws_own) = results
    assert_same_bits(y, y_own, "y")
    assert_same_bits(dx, dx_own, "x's gradient")
    for m, one, other in zip(splits, dws, dws_own, strict=True):
        assert one is not None and other is not None
        assert apart(one, other) < 0.03  # quantized twice along tokens
        assert m or not one.any()
