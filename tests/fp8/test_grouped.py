"""`grouped_linear` without Transformer Engine: roundings of its operands, gradients, delayed ones; `MoELayer` on it."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import assert_same_bits, run_ranks
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import deepep_train as dt
from deepep_train import fp8, moe
from deepep_train.fp8 import Quantized, Recipe, gemm_reference

SPLITS, IN, OUT = (16, 0, 48), 256, 128
# Products of values that carry 3 bits of mantissa: measured 0.037 (two operands, each 0.027).
BOUND = 0.05
# With gradients in e5m2, of 2 bits: measured 0.059.
TENSOR_BOUND = 0.08


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.detach().double() - exact).norm() / exact.norm())


def operands(is_transposed: bool, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    x, grad = torch.randn(sum(SPLITS), IN, generator=g), torch.randn(sum(SPLITS), OUT, generator=g)
    w = torch.randn(len(SPLITS), *((IN, OUT) if is_transposed else (OUT, IN)), generator=g) * 0.1
    return x.to(dtype), w.to(dtype), grad.to(dtype)


def received(x: Tensor, recipe: Recipe) -> Quantized:
    """x in groups, as a dispatch into expert layout gives it."""
    q = fp8.quantize(x, recipe, scale=torch.tensor([1 / 64]) if recipe is Recipe.TENSOR else None)
    scales = q.scales if recipe.blocks is None else recipe.blocks.put(q.row_scales().contiguous(), SPLITS)
    return Quantized(recipe, q.data, scales, SPLITS, q.rows)


def exact(x: Tensor, w: Tensor, grad: Tensor, is_transposed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y and the gradients of x and w in float64."""
    x, w = x.double().requires_grad_(), w.double().requires_grad_()
    parts = [a @ (b if is_transposed else b.t()) for a, b in zip(x.split(SPLITS), w, strict=True)]
    y = torch.cat(parts)
    y.backward(grad.double())
    assert x.grad is not None and w.grad is not None
    return y.detach(), x.grad, w.grad


@pytest.mark.parametrize("is_received", [False, True], ids=["quantized here", "received"])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("recipe", Recipe)
def test_against_float64(recipe: Recipe, is_transposed: bool, is_received: bool) -> None:
    x, w, grad = operands(is_transposed)
    y_exact, x_exact, w_exact = exact(x, w, grad, is_transposed)
    x.requires_grad_()
    w.requires_grad_()
    given = received(x, recipe) if is_received else x
    y = fp8.grouped_linear(given, w, None if is_received else SPLITS, recipe=recipe, is_transposed=is_transposed)
    y.backward(grad)
    bound = TENSOR_BOUND if recipe is Recipe.TENSOR else BOUND
    for got, expected, most in ((y, y_exact, BOUND), (x.grad, x_exact, bound), (w.grad, w_exact, bound)):
        assert most / 5 < error(got, expected) < most
    assert float(w.grad[1].abs().max()) == 0.0, "an expert without tokens has a gradient of zeros"


def test_received_rows_enter_the_product_as_they_came() -> None:
    """The forward product is that of the sent values: not one more rounding."""
    x, w, _ = operands(False)
    q = received(x * 3, Recipe.BLOCK)
    weights = [gemm_reference.rounded_weight(one, Recipe.BLOCK, torch.float8_e4m3fn)[0].double() for one in w]
    expected = torch.cat([a @ b.t() for a, b in zip(q.dequantize().double().split(SPLITS), weights, strict=True)])
    assert error(fp8.grouped_linear(q, w), expected) < 1e-6


def test_rows_that_share_one_scale_are_not_quantized_again() -> None:
    """The weight gradient's product is that of the sent values, too."""
    x, w, grad = operands(False)
    q = received(x, Recipe.TENSOR)
    w.requires_grad_()
    fp8.grouped_linear(q, w).backward(grad)
    g = [gemm_reference.rounded(one, Recipe.TENSOR, torch.float8_e5m2).double() for one in grad.split(SPLITS)]
    expected = [a.t() @ b for a, b in zip(g, q.dequantize().detach().double().split(SPLITS), strict=True)]
    assert error(w.grad, torch.stack(expected)) < 1e-6


@pytest.mark.parametrize("recipe", Recipe)
def test_no_rows_at_all(recipe: Recipe) -> None:
    x, w = torch.zeros(0, IN, requires_grad=True), torch.ones(3, OUT, IN, requires_grad=True)
    y = fp8.grouped_linear(x, w, (0, 0, 0), recipe=recipe)
    y.backward(torch.zeros(0, OUT))
    assert x.grad is not None and x.grad.shape == (0, IN)
    assert w.grad is not None and not w.grad.any()


def test_weights_share_a_scale_in_tiles_of_128() -> None:
    w = torch.rand(256, 256) + 1
    w[0, 0] = 2.0**9  # one large value: its tile alone becomes coarse
    values, _ = gemm_reference.rounded_weight(w, Recipe.BLOCK, torch.float8_e4m3fn)
    scale = 2.0  # 512 / 2 is the largest power of two's worth below 448
    tile = (w[:128, :128] / scale).to(torch.float8_e4m3fn).float() * scale
    assert_same_bits(values[:128, :128].contiguous(), tile)
    fine = (w[128:] * 128).to(torch.float8_e4m3fn).float() / 128
    assert_same_bits(values[128:].contiguous(), fine)


def test_delayed_weight_gradient() -> None:
    x, w, grad = operands(True)
    at_once, later = w.clone().requires_grad_(), w.clone().requires_grad_()
    fp8.grouped_linear(received(x, Recipe.BLOCK), at_once, is_transposed=True).backward(grad)
    waiting: list[Any] = []
    for _ in range(2):
        fp8.grouped_linear(received(x, Recipe.BLOCK), later, is_transposed=True, delayed=waiting).backward(grad)
    assert later.grad is None and len(waiting) == 2
    waiting[0]()
    assert_same_bits(later.grad, at_once.grad)
    waiting[1]()
    assert_same_bits(later.grad, at_once.grad * 2)


def test_frozen_experts_get_no_gradient() -> None:
    x, w, grad = operands(False)
    for delayed in (None, []):
        weights = [one.clone().requires_grad_(e != 2) for e, one in enumerate(w)]
        fp8.grouped_linear(x, weights, SPLITS, delayed=delayed).backward(grad)
        for late in delayed or []:
            late()
        assert [one.grad is not None for one in weights] == [True, True, False]


@pytest.mark.parametrize("by", [0, 1], ids=["x", "w"])
def test_second_derivatives_are_refused(by: int) -> None:
    x, w, grad = operands(False)
    source = (x, w)[by].requires_grad_()
    (once,) = torch.autograd.grad(fp8.grouped_linear(x, w, SPLITS), source, grad, create_graph=True)
    with pytest.raises(dt.DeepEPError, match=r"second derivatives of deepep_train\.fp8\.grouped_linear"):
        (source.square().sum() + once.square().sum()).backward()


@pytest.mark.parametrize(("recipe", "multiple"), [(Recipe.BLOCK, 16), (Recipe.MXFP8, 32), (Recipe.TENSOR, 16)])
def test_splits_that_transformer_engines_kernels_do_not_take(
    monkeypatch: pytest.MonkeyPatch, recipe: Recipe, multiple: int
) -> None:
    x, w, _ = operands(False)
    q = fp8.quantize(x, recipe, scale=torch.tensor([1 / 64]) if recipe is Recipe.TENSOR else None)
    splits = (8, 0, 56)
    scales = q.scales if recipe.blocks is None else recipe.blocks.put(q.row_scales().contiguous(), splits)
    given = ({"x": x, "splits": splits, "recipe": recipe}, {"x": Quantized(recipe, q.data, scales, splits, q.rows)})
    for how in given:
        fp8.grouped_linear(**how, weight=w)  # torch takes any
    monkeypatch.setattr("deepep_train.fp8.grouped.has_te_kernels", lambda *_: True)
    for how in given:
        with pytest.raises(dt.ArgumentError, match=f"multiples of {multiple} ") as caught:
            fp8.grouped_linear(**how, weight=w)
        assert caught.value.argument == "splits"


def test_non_leaf_weights_cannot_be_delayed() -> None:
    """Their gradient would end in a tensor that nobody looks at."""
    x, w, _ = operands(False)
    with pytest.raises(dt.ArgumentError, match="leaves") as caught:
        fp8.grouped_linear(x, w.requires_grad_() * 2, SPLITS, delayed=[])
    assert caught.value.argument == "weight"


@pytest.mark.parametrize("is_received", [False, True], ids=["quantized here", "received"])
def test_all_that_is_kept_goes_through_autograds_hooks(is_received: bool) -> None:
    """So that checkpointing frees it and offloading moves it; and a graph may be gone through twice."""
    x, w, grad = operands(False)
    x.requires_grad_()
    w.requires_grad_()
    saved: list[Tensor] = []

    def pack(t: Tensor) -> int:
        saved.append(t.clone())
        return len(saved) - 1

    alive: list[weakref.ref] = []
    stock = gemm_reference.Operands.rows

    def rows(*args: Any) -> Any:
        made = stock(*args)
        alive.extend(weakref.ref(t) for t in made.rowwise)
        return made

    with pytest.MonkeyPatch.context() as patch, torch.autograd.graph.saved_tensors_hooks(pack, saved.__getitem__):
        patch.setattr(gemm_reference.Operands, "rows", rows)
        y = fp8.grouped_linear(received(x, Recipe.BLOCK) if is_received else x, w, None if is_received else SPLITS)
    gc.collect()
    assert saved and all(t() is None for t in alive)
    once = torch.autograd.grad(y, (x, w), grad, retain_graph=True)
    for t in saved:
        t.zero_()  # the hooks' tensors are what the backward reads
    zeros = torch.autograd.grad(y, (x, w), grad)
    assert all(float(g.abs().max()) > 0 for g in once) and float(zeros[0].abs().max()) == 0


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_keeps_nothing_and_changes_nothing(use_reentrant: bool) -> None:
    layer = moe.MoELayer(128, 256, 4, 2, fp8_recipe=Recipe.BLOCK)
    x = torch.randn(64, 128)
    _, expected, weights = step(layer, x)
    layer.zero_grad()
    bytes_kept = [0]

    def pack(t: Tensor) -> Tensor:
        bytes_kept[0] += t.nbytes
        return t

    x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = checkpoint(layer, x, use_reentrant=use_reentrant)
    assert bytes_kept[0] <= x.nbytes
    (y * torch.linspace(-1, 1, y.size(1))).sum().backward()
    assert_same_bits(x.grad, expected)
    for name, p in layer.named_parameters():
        assert_same_bits(p.grad, weights[name])


@pytest.mark.parametrize(
    ("argument", "how"),
    [
        ("x", {"x": None}),
        ("x", {"x": torch.zeros(IN)}),
        ("x", {"x": torch.zeros(sum(SPLITS), IN, dtype=torch.float64)}),
        ("splits", {"splits": (1, 2, 3)}),
        ("splits", {"splits": None}),
        ("splits", {"splits": (-8, 8, 64)}),
        ("splits", {"splits": (16.0, 0, 48)}),
        ("splits", {"x": torch.zeros(0, IN), "splits": ()}),
        ("recipe", {"recipe": "block"}),
        ("delayed", {"delayed": ()}),
        ("is_transposed", {"is_transposed": "yes"}),
        ("weight", {"weight": torch.zeros(2, OUT, IN)}),
        ("weight", {"weight": torch.zeros(3, OUT, 128)}),
        ("weight", {"weight": torch.zeros(3, 100, IN)}),
        ("weight", {"weight": torch.zeros(3, IN)}),
        ("weight", {"weight": torch.zeros(3, OUT, IN, dtype=torch.float64)}),
        ("weight", {"weight": torch.zeros(3, OUT, IN, device="meta")}),
        ("weight", {"weight": [torch.zeros(OUT, IN)] * 2}),
        ("weight", {"weight": [torch.zeros(OUT, IN), torch.zeros(2 * OUT, IN), torch.zeros(OUT, IN)]}),
    ],
)
def test_wrong_arguments_are_named(argument: str, how: dict[str, Any]) -> None:
    x, w, _ = operands(False)
    with pytest.raises(dt.ArgumentError) as caught:
        fp8.grouped_linear(**({"x": x, "weight": w, "splits": SPLITS} | how))
    assert caught.value.argument == argument


@pytest.mark.parametrize(
    ("argument", "how"), [("splits", {"splits": (0, 16, 48)}), ("splits", {"splits": 5}), ("recipe", {"recipe": Recipe.MXFP8})]
)
def test_what_received_rows_know_may_only_be_repeated(argument: str, how: dict[str, Any]) -> None:
    x, w, _ = operands(False)
    q = received(x, Recipe.BLOCK)
    fp8.grouped_linear(q, w, SPLITS, recipe=Recipe.BLOCK)
    with pytest.raises(dt.ArgumentError) as caught:
        fp8.grouped_linear(q, w, **how)
    assert caught.value.argument == argument


# The layer ----------------------------------------------------------------------------------------------------------------


def layer_of(buffer: dt.Buffer, **how: Any) -> moe.MoELayer:
    torch.manual_seed(5)
    return moe.MoELayer(128, 256, 4, 2, buffer=buffer, **how)


def step(layer: moe.MoELayer, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    x = x.clone().requires_grad_()
    y = layer(x)
    (y * torch.linspace(-1, 1, y.size(1))).sum().backward()
    layer.backward_dw()
    assert x.grad is not None
    return y.detach(), x.grad, {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}


def layers(rank: int, size: int, group: dist.ProcessGroup, recipe: Recipe) -> list[float]:
    """How far FP8 lies from float32, and delayed weight gradients from those computed at once."""
    buffer = dt.Buffer(group, timeout=20)
    x = torch.randn(20 + rank, 128, generator=torch.Generator().manual_seed(rank))
    plain, in_fp8, delayed = (
        step(layer_of(buffer, **how), x) for how in ({}, {"fp8_recipe": recipe}, {"fp8_recipe": recipe, "delay_wgrad": True})
    )
    for name, grad in in_fp8[2].items():
        assert_same_bits(delayed[2][name], grad, name)
    both = [(in_fp8[0], plain[0]), (in_fp8[1], plain[1])]
    both += [(in_fp8[2][f"experts.{w}"], plain[2][f"experts.{w}"]) for w in ("w1", "w2")]
    return [error(a, b.double()) for a, b in both]


@pytest.mark.parametrize(
    ("recipe", "grad_dtype"),
    [(Recipe.BLOCK, torch.float8_e4m3fn), (Recipe.MXFP8, torch.float8_e4m3fn), (Recipe.TENSOR, torch.float8_e5m2)],
)
def test_the_recipes_dtype_of_gradients(recipe: Recipe, grad_dtype: torch.dtype) -> None:
    assert recipe.grad_dtype is grad_dtype
    sizes = {"hidden_size": 128, "ffn_hidden_size": 256, "num_experts": 4, "top_k": 2}
    if recipe is not Recipe.TENSOR:  # which the layer does not take
        assert moe.MoELayer(**sizes, fp8_recipe=recipe, grad_dtype="recipe").grad_dtype is grad_dtype
        assert moe.MoELayer(**sizes, fp8_recipe=recipe).grad_dtype is None


def test_the_layers_gradients_cross_in_what_was_asked_for() -> None:
    x, grads = torch.randn(40, 128), []
    for dtype in (None, torch.float8_e5m2):  # e4m3 would be no news: the experts quantize to it
        torch.manual_seed(5)
        grads.append(step(moe.MoELayer(128, 256, 4, 2, fp8_recipe=Recipe.BLOCK, grad_dtype=dtype), x)[1])
    assert 0.01 < error(grads[1], grads[0].double()) < 0.1


@pytest.mark.parametrize("recipe", [Recipe.BLOCK, Recipe.MXFP8])
def test_the_layer_in_fp8_follows_float32(recipe: Recipe) -> None:
    for errors in run_ranks(2, layers, recipe):
        assert all(0.005 < e < 0.12 for e in errors), errors


@pytest.mark.parametrize(
    ("argument", "how"),
    [
        ("fp8_recipe", {"fp8_recipe": Recipe.TENSOR}),
        ("ffn_hidden_size", {"ffn_hidden_size": 192, "fp8_recipe": Recipe.BLOCK}),
        ("alignment", {"alignment": 8, "fp8_recipe": Recipe.BLOCK}),
        ("delay_wgrad", {"delay_wgrad": True}),
        ("dtype", {"dtype": torch.float64, "fp8_recipe": Recipe.BLOCK}),
        ("grad_dtype", {"grad_dtype": "recipe"}),
        ("grad_dtype", {"grad_dtype": torch.bfloat16}),
    ],
)
def test_the_layers_wrong_arguments_are_named(argument: str, how: dict[str, Any]) -> None:
    with pytest.raises(dt.ArgumentError) as caught:
        moe.MoELayer(**({"hidden_size": 128, "ffn_hidden_size": 256, "num_experts": 4, "top_k": 2} | how))
    assert caught.value.argument == argument
