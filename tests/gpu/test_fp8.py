"""FP8 tensors through the nvlink engine and into Transformer Engine's kernels, on ranks that share a GPU.

`--junitxml FILE` keeps how far products lie apart.
"""

from __future__ import annotations

from typing import Any

import fp8_misuses
import pytest
import torch
import torch.distributed as dist
from draws import Exchange
from harness import assert_same_bits
from reference import Given, Picture
from shared import buffer_of, run_ranks, to
from torch import Tensor

import deepep_train as dt
from deepep_train import fp8
from deepep_train.fp8 import Quantized, Recipe, te_present
from deepep_train.fp8.quantized import quantize_in_torch

HIDDEN, OUT = 512, 384
needs_te = pytest.mark.skipif(not te_present.is_installed(), reason="Transformer Engine is not installed")


def given_of(size: int, layout: str, alignment: int, hidden: int = HIDDEN) -> tuple[Exchange, list[Given]]:
    exchange = Exchange((70, 0, 131, 33, 64, 1, 97, 40)[:size], hidden, 4, 3, "mixed", torch.bfloat16, layout, alignment)
    g = exchange.generator()
    xs = [(torch.randn(n, hidden, generator=g) * 3).bfloat16() for n in exchange.tokens]
    return exchange, [Given(x, old.topk_idx, old.topk_weights) for x, old in zip(xs, exchange.given(), strict=True)]


def how_of(exchange: Exchange) -> dict[str, Any]:
    return {"num_experts": exchange.num_experts, "layout": exchange.layout, "alignment": exchange.alignment}


def sent(x: Tensor, recipe: Recipe) -> Quantized:
    """By the torch quantizer, which has every recipe on every GPU."""
    scale = torch.tensor([1 / 32], device=x.device) if recipe is Recipe.TENSOR else None
    data, scales = quantize_in_torch(x, recipe, torch.float8_e4m3fn, True, 0.0, scale)
    return Quantized(recipe, data, scales, (x.size(0),), x)


# Bits on the nvlink engine, all recipes, as the collective engine's and the quantizer's ----------------------------------


def arrive(rank: int, size: int, group: dist.ProcessGroup, exchange: Exchange, given: list[Given], recipe: Recipe) -> Any:
    found = []
    for engine in ("nvlink", "collective"):
        buffer = buffer_of(group, engine)
        x, idx = to((given[rank].x, given[rank].topk_idx), "cuda")
        out = dt.dispatch(sent(x, recipe), idx, buffer=buffer, **how_of(exchange))
        again = dt.dispatch(sent(x, recipe), buffer=buffer, handle=out.handle).x
        found.append([to(t, "cpu") for t in (out.x.data, out.x.scales, again.data, again.scales)] + [out.x.splits])
    return found


@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize(("layout", "alignment"), [("rank", 1), ("expert", 16), ("expert", 6)])
@pytest.mark.parametrize("recipe", Recipe)
def test_bits(recipe: Recipe, layout: str, alignment: int, size: int) -> None:
    exchange, given = given_of(size, layout, alignment)
    picture = Picture(given, exchange.num_experts)
    for rank, (nvlink, collective) in enumerate(run_ranks(size, arrive, exchange, given, recipe)):
        arrived = picture.arrive(rank, layout, exchange.alignment)
        expected = sent(arrived.x, recipe)
        splits = tuple(arrived.tokens_per_expert) if layout == "expert" else (len(arrived.rows),)
        scales = expected.scales
        if recipe.blocks is not None:
            scales = recipe.blocks.put(expected.row_scales().contiguous(), splits)
        for data, scales_got, again, scales_again, splits_got in (nvlink, collective):
            assert splits_got == splits
            for one, other in ((data, expected.data), (again, data), (scales_got, scales), (scales_again, scales_got)):
                assert_same_bits(one, other)


def worst(rank: int, size: int, group: dist.ProcessGroup, exchange: Exchange, given: list[Given]) -> Any:
    x, idx = to((given[rank].x, given[rank].topk_idx), "cuda")
    how = {"num_experts": exchange.num_experts, "num_worst_tokens": 500}
    out = dt.dispatch(sent(x, Recipe.BLOCK), idx, buffer=buffer_of(group), **how)
    return to((out.x.data, out.x.scales), "cpu")


def test_num_worst_tokens() -> None:
    exchange, given = given_of(4, "rank", 1)
    picture = Picture(given, exchange.num_experts)
    for rank, (data, scales) in enumerate(run_ranks(4, worst, exchange, given)):
        expected = sent(picture.arrive(rank, "rank", worst=500).x, Recipe.BLOCK)
        assert_same_bits(data, expected.data)
        assert_same_bits(scales, expected.scales)


def many_experts(rank: int, size: int, group: dist.ProcessGroup) -> Any:
    """More groups than a warp has lanes, most of them empty, and words that do not fill a tile."""
    g = torch.Generator().manual_seed(rank)
    idx = torch.randint(0, 2048, (50, 4), generator=g)
    x = torch.randn(50, 128 * 37, generator=g).bfloat16()
    found = []
    for engine in ("nvlink", "collective"):
        got = dt.dispatch(
            sent(x.cuda(), Recipe.BLOCK),
            idx.cuda(),
            buffer=buffer_of(group, engine),
            num_experts=2048,
            layout="expert",
            alignment=4,
        ).x
        found.append(to((got.data, got.scales), "cpu"))
    return found


def test_many_experts() -> None:
    for nvlink, collective in run_ranks(4, many_experts):
        for mine, other in zip(nvlink, collective, strict=True):
            assert_same_bits(mine, other)


# With Transformer Engine's kernels ---------------------------------------------------------------------------------------


@needs_te
@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("fp8_dtype", fp8.DTYPES)
def test_the_quantizer_in_torch_has_the_kernels_bits(fp8_dtype: torch.dtype, dtype: torch.dtype, power_of_two: bool) -> None:
    from deepep_train.fp8 import gemm_te

    g = torch.Generator("cuda").manual_seed(1)
    magnitude = torch.logspace(-30, 4, 77, device="cuda").unsqueeze(1)
    x = (torch.randn(77, HIDDEN, device="cuda", generator=g) * magnitude).to(dtype)
    x[5] = 0
    x[6, :128] = 0
    x[7, 3] = float("inf")
    for min_amax in (0.0, 1e-4):
        data, scales = gemm_te.quantize(x, Recipe.BLOCK, fp8_dtype, power_of_two, min_amax)
        expected, expected_scales = quantize_in_torch(x, Recipe.BLOCK, fp8_dtype, power_of_two, min_amax, None)
        mine = Quantized(Recipe.BLOCK, data, scales, (77,), x)
        other = Quantized(Recipe.BLOCK, expected, expected_scales, (77,), x)
        assert_same_bits(mine.row_scales().contiguous(), other.row_scales().contiguous(), "scales")
        finite = torch.arange(77) != 7
        assert_same_bits(data.view(torch.uint8)[finite], expected.view(torch.uint8)[finite], "data")


def products(rank: int, size: int, group: dist.ProcessGroup, exchange: Exchange, given: list[Given]) -> Any:
    """What the dispatch assembled beside what Transformer Engine's quantizer makes of the same rows; the products of both; how
    far gradients lie from the reference's; and the kernels between the dispatch and the end of the forward product."""
    from deepep_train.fp8 import gemm_te
    from deepep_train.fp8.gemm_reference import Operands as Reference

    torch.manual_seed(3)
    buffer, mine = buffer_of(group), given[rank]
    x, idx, weights = to((mine.x, mine.topk_idx, mine.topk_weights), "cuda")
    how = how_of(exchange)
    plain = dt.dispatch(x, idx, weights, buffer=buffer, **how)
    q = dt.dispatch(fp8.quantize(x), idx, weights, buffer=buffer, **how).x
    own = gemm_te.tex.split_quantize(
        plain.x, list(q.splits), [gemm_te.quantizer(Recipe.BLOCK, torch.float8_e4m3fn)] * len(q.splits)
    )
    for storage, (data, scales), m in zip(own, q.groups(), q.splits, strict=True):
        assert_same_bits(data.view(torch.uint8), storage._rowwise_data, "data")
        assert storage._rowwise_scale_inv.shape == scales.shape
        assert_same_bits(scales[:, :m].contiguous(), storage._rowwise_scale_inv[:, :m].contiguous(), "scales")

    w = (torch.randn(len(q.splits), OUT, HIDDEN, device="cuda") * 0.05).bfloat16()
    grad = torch.randn(sum(q.splits), OUT, device="cuda").bfloat16()
    errors = {}
    for is_transposed in (False, True):
        weight = (w.transpose(1, 2).contiguous() if is_transposed else w.clone()).requires_grad_()
        rows = q.rows.detach().requires_grad_()
        y = fp8.grouped_linear(Quantized(q.recipe, q.data, q.scales, q.splits, rows), weight, is_transposed=is_transposed)
        y.backward(grad)
        again = fp8.grouped_linear(q.dequantize().detach(), weight.detach(), q.splits, is_transposed=is_transposed)
        reference = Reference(list(weight.detach()), Recipe.BLOCK, is_transposed, torch.float8_e4m3fn)
        received, g = reference.received(q), reference.rows(grad, q.splits, torch.float8_e4m3fn, True)
        y_r, x_r = torch.empty_like(y), torch.empty_like(rows)
        w_r = [torch.empty_like(one) for one in weight.detach()]
        reference.forward(received, y_r, q.splits)
        reference.input_gradient(g, x_r, q.splits)
        reference.weight_gradient(received, g, w_r, q.splits)
        assert rows.grad is not None and weight.grad is not None
        pairs = {
            "y": (y, y_r),
            "x.grad": (rows.grad, x_r),
            "w.grad": (weight.grad, torch.stack(w_r)),
            "requantized": (y, again),
        }
        errors |= {f"{n}, {'in x out' if is_transposed else 'out x in'}": apart(a, b) for n, (a, b) in pairs.items()}

    operands = gemm_te.Operands(list(w), Recipe.BLOCK, False, torch.float8_e4m3fn)
    sent_q, out = fp8.quantize(x), torch.empty(sum(q.splits), OUT, dtype=torch.bfloat16, device="cuda")
    torch.cuda.synchronize()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    ) as profile:
        got = dt.dispatch(sent_q, idx, weights, buffer=buffer, **how).x
        operands.forward(gemm_te.Received(got), out, got.splits)
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return errors, kernels


def apart(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


@needs_te
@pytest.mark.parametrize("size", [4, 8])
def test_products_on_what_was_dispatched(record_property: Any, size: int) -> None:
    exchange, given = given_of(size, "expert", 16)
    results = run_ranks(size, products, exchange, given, timeout=120)
    record_property("errors", [errors for errors, _ in results])
    record_property("kernels", results[0][1])
    for errors, kernels in results:
        # Products of the same operands differ by the order of float32 additions and bf16's rounding.
        assert all(e < 0.01 for e in errors.values()), errors
        names = " ".join(kernels).lower()
        assert "scales_kernel" in names and ("gemm" in names or "nvjet" in names), kernels
        between = [k for k in kernels if any(word in k.lower() for word in ("quantize", "transpose", "cast_"))]
        assert not between, between


def trains(rank: int, size: int, group: dist.ProcessGroup) -> list[float]:
    """`MoELayer` in FP8 beside bf16: output, input's gradient, weights' gradients."""
    from deepep_train import moe

    found = []
    for recipe in (None, Recipe.BLOCK):
        torch.manual_seed(5)
        how = {"buffer": buffer_of(group), "dtype": torch.bfloat16, "device": "cuda", "fp8_recipe": recipe}
        grad_dtype = None if recipe is None else torch.float8_e4m3fn
        layer = moe.MoELayer(256, 512, 8, 2, grad_dtype=grad_dtype, **how)
        x = torch.randn(100 + rank, 256, generator=torch.Generator().manual_seed(rank)).bfloat16().cuda().requires_grad_()
        y = layer(x)
        y.backward(torch.linspace(-1, 1, 256, device="cuda").bfloat16().expand_as(y))
        found.append((y, x.grad, layer.experts.w1.grad, layer.experts.w2.grad))
    return [apart(b, a) for a, b in zip(*found, strict=True)]


@needs_te
@pytest.mark.parametrize("size", [4, 8])
def test_the_layer_follows_bf16(record_property: Any, size: int) -> None:
    results = run_ranks(size, trains, timeout=120)
    record_property("errors", results)
    for errors in results:
        assert all(0.005 < e < 0.15 for e in errors), results


# Refusals, and gradients, on the nvlink engine ----------------------------------------------------------------------------


def wrong(rank: int, size: int, group: dist.ProcessGroup, name: str) -> tuple[str, Any, Any]:
    return fp8_misuses.on_a_rank(rank, buffer_of(group), "cuda", name)


@pytest.mark.parametrize(
    ("name", "argument", "texts"),
    [e for e in fp8_misuses.EXPECTED if e[0] not in fp8_misuses.UNWAITED],
    ids=lambda v: str(v)[:24],
)
def test_an_error_on_one_rank_is_an_error_on_all(name: str, argument: str, texts: list[str]) -> None:
    fp8_misuses.check(run_ranks(3, wrong, name), name, argument, texts)


def wrong_and_unwaited(rank: int, size: int, group: dist.ProcessGroup, name: str) -> tuple[str, Any, Any]:
    """The error of this rank's call, or of its next one."""
    buffer = dt.Buffer(group, engine="nvlink", timeout=20)
    told, good_call = fp8_misuses.wrong_call(rank, buffer, "cuda", name)
    if name == "handle with a bound":  # on every rank
        good_call()
        return told
    with pytest.raises(dt.DeepEPError, match="refused to take part") as lost:
        good_call()
        torch.cuda.synchronize()
        buffer.check()
    return told if told[0] else (str(lost.value), None, None)


@pytest.mark.parametrize(("name", "argument", "texts"), [e for e in fp8_misuses.EXPECTED if e[0] in fp8_misuses.UNWAITED])
def test_an_error_in_a_call_without_a_wait_is_heard_by_all(name: str, argument: str, texts: list[str]) -> None:
    results = run_ranks(3, wrong_and_unwaited, name)
    if name == "handle with a bound":
        assert all(named == argument and "num_worst_tokens" in text for text, named, _ in results), results
        return
    for rank, (text, named, _) in enumerate(results):
        if rank == 1:  # its text is its own, before anybody has met
            assert named == argument and all(t in text for t in texts if t != "rank 1"), text
        else:
            assert named is None and "rank 1 refused to take part" in text, text


def gradients(
    rank: int, size: int, group: dist.ProcessGroup, exchange: Exchange, given: list[Given], recipe: Recipe, grads: list[Tensor]
) -> list[Any]:
    """For every engine: of Σ values · c by the tokens and of Σ weights by the weights; combine(c); and y's gradient by FP8."""
    found = []
    mine, how = given[rank], how_of(exchange)
    for engine in ("nvlink", "collective"):
        buffer = buffer_of(group, engine)
        x, idx, weights, grad = to((mine.x, mine.topk_idx, mine.topk_weights, grads[rank]), "cuda")
        x.requires_grad_(), weights.requires_grad_()
        scale = torch.tensor([1 / 32], device="cuda") if recipe is Recipe.TENSOR else None
        out = dt.dispatch(fp8.quantize(x, recipe, scale=scale), idx, weights, buffer=buffer, **how)
        values = out.x.dequantize()
        c = torch.randn(values.shape, generator=torch.Generator().manual_seed(rank)).bfloat16().cuda()
        ((values * c).sum() + out.topk_weights.sum()).backward()
        by_fp8 = []
        for grad_dtype in fp8.DTYPES:
            y = torch.zeros_like(c).requires_grad_()
            dt.combine(y, out.handle, grad_dtype=grad_dtype).backward(grad)
            by_fp8.append(y.grad)
        found.append(to([x.grad, weights.grad, dt.combine(c, out.handle), *by_fp8], "cpu"))
        buffer.check()
    return found


@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("layout", ["rank", "expert"])
@pytest.mark.parametrize("recipe", Recipe)
def test_gradients(recipe: Recipe, layout: str, size: int) -> None:
    exchange, given = given_of(size, layout, 16 if layout == "expert" else 1)
    g = exchange.generator()
    grads = [(torch.randn(n, HIDDEN, generator=g) * 1e-5).bfloat16() for n in exchange.tokens]
    picture = Picture(given, exchange.num_experts)
    for rank, (nvlink, collective) in enumerate(run_ranks(size, gradients, exchange, given, recipe, grads)):
        grad_x, grad_weights, combined, *by_fp8 = nvlink
        assert_same_bits(grad_x, combined)
        assert_same_bits(grad_weights, (given[rank].topk_idx >= 0).float())
        rows = picture.arrive(rank, layout, exchange.alignment).rows
        for grad_dtype, got in zip(fp8.DTYPES, by_fp8, strict=True):
            sent_once = [fp8.quantize(one.float(), fp8_dtype=grad_dtype).dequantize(torch.bfloat16) for one in grads]
            assert_same_bits(got, picture.gather(rows, sent_once))
        for one, other in zip(nvlink, collective, strict=True):
            assert_same_bits(one, other)
