"""Wrong calls with quantized tensors: what rank 1 of three does, and what every rank must hear of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import deepep_train as dt
from deepep_train import fp8, moe
from deepep_train.fp8 import Quantized, Recipe

HIDDEN = 256


Told = tuple[str, Any, Any]  # text, argument, ranks


def wrong_call(rank: int, buffer: dt.Buffer, device: str, name: str) -> tuple[Told, Callable[[], Any]]:
    """What this rank was told when rank 1 made the wrong call, and a good call to make afterwards."""
    g = torch.Generator().manual_seed(rank)
    x = torch.randn(4, HIDDEN, generator=g).bfloat16().to(device)
    idx = torch.randint(0, 6, (4, 2), generator=g).to(device)
    good = {"topk_idx": idx, "buffer": buffer, "num_experts": 6, "layout": "expert"}
    told: Told = ("", None, None)
    try:
        WRONG[name](rank == 1, x, good)
    except dt.ArgumentError as error:
        told = (str(error), error.argument, tuple(error.ranks or ()))
    return told, lambda: dt.dispatch(fp8.quantize(x), **good)


def on_a_rank(rank: int, buffer: dt.Buffer, device: str, name: str) -> Told:
    told, good_call = wrong_call(rank, buffer, device, name)
    good_call()
    return told


def _scales_differ(me: bool, x: Tensor, good: dict) -> None:
    dt.dispatch(fp8.quantize(x, Recipe.TENSOR, scale=torch.tensor([0.5 if me else 0.25], device=x.device)), **good)


def _recipes_differ(me: bool, x: Tensor, good: dict) -> None:
    dt.dispatch(fp8.quantize(x, Recipe.MXFP8 if me else Recipe.BLOCK), **good)


def _dtypes_differ(me: bool, x: Tensor, good: dict) -> None:
    dt.dispatch(fp8.quantize(x.float() if me else x), **good)


def _pair_among_them(me: bool, x: Tensor, good: dict) -> None:
    q = fp8.quantize(x)
    dt.dispatch(q.to_wire() if me else q, **good)


def _groups(me: bool, x: Tensor, good: dict) -> None:
    q = fp8.quantize(x)
    dt.dispatch(fp8.Quantized(q.recipe, q.data, q.scales, (4, 0), q.rows) if me else q, **good)


def _malformed(part: str, value: Callable[[Quantized], Any]) -> Callable[[bool, Tensor, dict], None]:
    def call(me: bool, x: Tensor, good: dict) -> None:
        q = fp8.quantize(x)
        dt.dispatch(replace(q, **{part: value(q)}) if me else q, **good)

    return call


def _scales_between_words(me: bool, x: Tensor, good: dict) -> None:
    q = fp8.quantize(x, Recipe.MXFP8)
    shifted = torch.cat([q.scales[:1], q.scales])[1:]
    dt.dispatch(replace(q, scales=shifted) if me else q, **good)


class _Broken(Quantized):
    def to_wire(self) -> Any:
        raise RuntimeError("a kernel failed")


def _no_wire_form(me: bool, x: Tensor, good: dict) -> None:
    """An error of no kind that this library raises: the rank itself gets it as it is."""
    q = fp8.quantize(x)
    try:
        dt.dispatch(_Broken(q.recipe, q.data, q.scales, q.splits, q.rows) if me else q, **good)
    except RuntimeError as error:
        if not me or str(error) != "a kernel failed":
            raise
        raise dt.ArgumentError(f"rank 1: RuntimeError: {error}", "", (1,)) from error


def _zero_scale(me: bool, x: Tensor, good: dict) -> None:
    q = fp8.quantize(x, Recipe.TENSOR, scale=torch.tensor([0.25], device=x.device))
    dt.dispatch(replace(q, scales=torch.zeros_like(q.scales)) if me else q, **good)


def _blocks(value: Any) -> Callable[[bool, Tensor, dict], None]:
    def call(me: bool, x: Tensor, good: dict) -> None:
        data, scales = fp8.quantize_blocks(x.repeat(1, 2))
        dt.dispatch(fp8.Payload(data, scales, value if me else fp8.ScaleBlocks(True, 4, 0)), **good)

    return call


def _pair_bounded(me: bool, x: Tensor, good: dict) -> None:
    data, scales = fp8.quantize_blocks(x.repeat(1, 2))
    dt.dispatch(fp8.Payload(data, scales, fp8.ScaleBlocks(True, 4, 0)), **good, num_worst_tokens=64 if me else 0)


def _scales_forgotten(me: bool, x: Tensor, good: dict) -> None:
    dt.dispatch((x, None) if me else x, **good)


def _layer_of_another_dtype(me: bool, x: Tensor, good: dict) -> None:
    layer = moe.MoELayer(HIDDEN, 128, 6, 2, buffer=good["buffer"], fp8_recipe=Recipe.BLOCK).to(x.device)
    layer.to(torch.float64 if me else torch.bfloat16)(x.double() if me else x)


def _groups_with_a_handle(me: bool, x: Tensor, good: dict) -> None:
    handle = dt.dispatch(fp8.quantize(x), **good).handle
    _groups(me, x, {"buffer": good["buffer"], "handle": handle})


def _bound(me: bool, x: Tensor, good: dict) -> None:
    dt.dispatch(fp8.quantize(x), **good, num_worst_tokens=64 if me else 0)


def _handle_with_a_bound(_: bool, x: Tensor, good: dict) -> None:
    handle = dt.dispatch(x, **good, num_worst_tokens=64).handle
    dt.dispatch(fp8.quantize(x), buffer=good["buffer"], handle=handle)


def _grad_dtype(me: bool, x: Tensor, good: dict) -> None:
    out = dt.dispatch(x, **good)
    dt.combine(out.x, out.handle, grad_dtype=torch.float16 if me else None)


def _width(me: bool, x: Tensor, good: dict) -> None:
    out = dt.dispatch(x, **good)
    dt.combine(out.x[:, : 200 if me else HIDDEN], out.handle, grad_dtype=torch.float8_e4m3fn)


WRONG: dict[str, Callable[[bool, Tensor, dict], None]] = {
    "scales differ": _scales_differ,
    "recipes differ": _recipes_differ,
    "dtypes differ": _dtypes_differ,
    "pair among them": _pair_among_them,
    "groups": _groups,
    "groups with a handle": _groups_with_a_handle,
    "bound": _bound,
    "handle with a bound": _handle_with_a_bound,
    "scales of another size": _malformed("scales", lambda q: q.scales[:4]),
    "scales between words": _scales_between_words,
    "strided data": _malformed("data", lambda q: q.data.view(torch.uint8).repeat(1, 2).view(q.data.dtype)[:, :HIDDEN]),
    "no wire form": _no_wire_form,
    "splits of another sum": _malformed("splits", lambda q: (5,)),
    "a recipe's name": _malformed("recipe", lambda q: "block"),
    "rows of another shape": _malformed("rows", lambda q: q.rows[1:]),
    "data that is not FP8": _malformed("data", lambda q: q.data.float()),
    "zero scale": _zero_scale,
    "blocks of no multiple": _blocks(fp8.ScaleBlocks(True, 0, 0)),
    "blocks that are none": _blocks("x"),
    "pair's bound": _pair_bounded,
    "scales forgotten": _scales_forgotten,
    "layer of another dtype": _layer_of_another_dtype,
    "grad_dtype": _grad_dtype,
    "width": _width,
}


EXPECTED = [
    ("scales differ", "recipe", ["scale 0.5 on rank 1", "scale 0.25 on rank 0, 2"]),
    ("recipes differ", "recipe", ["mxfp8 of bfloat16 on rank 1"]),
    ("dtypes differ", "recipe", ["block of float32 on rank 1"]),
    ("pair among them", "recipe", ["block of bfloat16 on rank 0, 2"]),
    ("groups", "x", ["rank 1", "(4, 0)"]),
    ("groups with a handle", "x", ["rank 1", "(4, 0)"]),
    ("bound", "num_worst_tokens", ["rank 1", "64"]),
    ("handle with a bound", "handle", ["rank 0", "rank 2"]),
    ("scales between words", "x", ["rank 1", "scales must be", "4 bytes"]),
    ("strided data", "x", ["rank 1", "data must be", "contiguous"]),
    ("no wire form", "", ["rank 1", "RuntimeError: a kernel failed"]),
    ("scales of another size", "x", ["rank 1", "scales must be", "[4]"]),
    ("splits of another sum", "x", ["rank 1", "splits must be", "(5,)"]),
    ("a recipe's name", "x", ["rank 1", "recipe must be", "'block'"]),
    ("rows of another shape", "x", ["rank 1", "rows must be", "[3, 256]"]),
    ("data that is not FP8", "x", ["rank 1", "data must be", "a float32 tensor"]),
    ("zero scale", "scale", ["rank 1", "got 0"]),
    ("blocks of no multiple", "x", ["rank 1", "multiple", "got 0"]),
    ("blocks that are none", "x", ["rank 1", "blocks must be", "'x'"]),
    ("pair's bound", "num_worst_tokens", ["rank 1", "64"]),
    ("scales forgotten", "x[0]", ["rank 1"]),
    ("layer of another dtype", "x", ["rank 1", "float64"]),
    ("grad_dtype", "grad_dtype", ["rank 1", "float16"]),
    ("width", "y", ["rank 1", "200"]),
]
# Their calls do not wait for the others: on the nvlink engine these hear of it at their next call, and the buffer is lost;
# unless all ranks are wrong, when each raises for itself.
UNWAITED = ("groups with a handle", "handle with a bound", "grad_dtype", "width")


def check(results: list[Told], name: str, argument: str, texts: list[str]) -> None:
    """`results`: of `on_a_rank`, from every rank."""
    for text, named, ranks in results:
        assert named == argument, text
        assert all(t in text for t in texts), text
        assert ranks == ((0, 1, 2) if name == "handle with a bound" else (1,)), text
