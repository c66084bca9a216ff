"""Wrong calls with quantized tensors: what rank 1 of three does, and what every rank must hear of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import deepep_train as dt
from deepep_train import fp8
from deepep_train.fp8 import Recipe

HIDDEN = 256


def on_a_rank(rank: int, buffer: dt.Buffer, device: str, name: str) -> tuple[str, Any, Any]:
    """(text, argument, ranks) of the error that rank 1's call made on this rank; a good call afterwards goes through."""
    g = torch.Generator().manual_seed(rank)
    x = torch.randn(4, HIDDEN, generator=g).bfloat16().to(device)
    idx = torch.randint(0, 6, (4, 2), generator=g).to(device)
    good = {"topk_idx": idx, "buffer": buffer, "num_experts": 6, "layout": "expert"}
    text, argument, ranks = "", None, None
    try:
        WRONG[name](rank == 1, x, good)
    except dt.ArgumentError as error:
        text, argument, ranks = str(error), error.argument, tuple(error.ranks or ())
    dt.dispatch(fp8.quantize(x), **good)
    return text, argument, ranks


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
    "grad_dtype": _grad_dtype,
    "width": _width,
}

EXPECTED = [
    ("scales differ", "recipe", ["scale 0.5 on rank 1", "scale 0.25 on rank 0, 2"]),
    ("recipes differ", "scales dtype", ["int32 on rank 1"]),
    ("dtypes differ", "recipe", ["block of float32 on rank 1"]),
    ("pair among them", "recipe", ["block of bfloat16 on rank 0, 2"]),
    ("groups", "x", ["rank 1", "(4, 0)"]),
    ("groups with a handle", "x", ["rank 1", "(4, 0)"]),
    ("bound", "num_worst_tokens", ["rank 1", "64"]),
    ("handle with a bound", "handle", ["rank 0", "rank 2"]),
    ("grad_dtype", "grad_dtype", ["rank 1", "float16"]),
    ("width", "y", ["rank 1", "200"]),
]


def check(results: list[tuple[str, Any, Any]], name: str, argument: str, texts: list[str]) -> None:
    """`results`: of `on_a_rank`, from every rank."""
    for text, named, ranks in results:
        assert named == argument, text
        assert all(t in text for t in texts), text
        assert ranks == ((0, 1, 2) if name == "handle with a bound" else (1,)), text
