"""Lets Transformer Engine's GroupedLinear, in Megatron's experts, take rows that were quantized before the wire.

As it stands it refuses quantized input. All it does with its input before the first product is to quantize it, in a function of
its own (`_split_quantize`), which is replaced by one that hands over what arrived. Everything else stays Transformer Engine's:
weights and their caches, gradients, accumulation into `main_grad`, delayed weight gradients. The weight gradient's columnwise
operand is made when GroupedLinear asks for it, after its forward product.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepep_train.errors import DeepEPError
from deepep_train.fp8 import Quantized, Recipe, is_placeholder
from deepep_train.megatron.replacements import Replacements
from deepep_train.megatron.switches import FP8_FIELD, FP8_OPTION, FP8_VARIABLE

_QUANTIZERS = {Recipe.BLOCK: "Float8BlockQuantizer", Recipe.MXFP8: "MXFP8Quantizer"}


class Settings(NamedTuple):
    """How Transformer Engine would quantize the experts' input now: arguments of `fp8.quantize`."""

    recipe: Recipe
    power_of_two: bool = True
    min_amax: float = 0.0


class Carried(Tensor):
    """Stands for rows [M, K] that crossed in FP8, on their way to GroupedLinear. It has no values: what would compute with it,
    other experts or an adapter beside them, is refused, whatever kernel it ends in.

    Attributes:
        rows: what stands for the rows in autograd.
        quantized: what arrived.
    """

    rows: Tensor
    quantized: Quantized

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        raise _no_values(f"{func} was to compute with them")


def _no_values(what: str) -> DeepEPError:
    return DeepEPError(
        f"these rows stand for quantized ones, which only Transformer Engine's GroupedLinear takes: {what}. Send tokens as "
        f"they are: {FP8_OPTION} to the launcher, or {FP8_FIELD} = False on the configuration, or {FP8_VARIABLE}=0"
    )


class _Handing(threading.local):
    """What the GroupedLinear whose forward runs in this thread is to take instead of its input."""

    quantized: Quantized | None = None


_handing = _Handing()
_installed = Replacements()


def install() -> None:
    """Put the replacements in place; without Transformer Engine there is nothing to do."""
    try:
        module = importlib.import_module("transformer_engine.pytorch.module.grouped_linear")
        splitting = importlib.import_module("transformer_engine.pytorch.module._split_quantization")
    except (ImportError, OSError, RuntimeError):  # not installed, or not for this machine, or of a release without it
        return
    if _installed:
        return
    _installed.put(splitting, "_split_quantize", _split_quantize(splitting._split_quantize))
    cls = module.GroupedLinear
    _installed.put(cls, "prepare_forward", _prepare_forward(cls.prepare_forward))
    _installed.put(cls, "forward", _forward(cls.forward))


def uninstall() -> None:
    _installed.take_back()


def is_installed() -> bool:
    return bool(_installed)


def settings() -> Settings | None:
    """Of the FP8 context that this code runs in; None where experts' input is not quantized, or by another recipe."""
    state = importlib.import_module("transformer_engine.pytorch.quantization").FP8GlobalStateManager
    if not state.is_fp8_enabled():
        return None
    recipe = state.get_fp8_recipe()
    if getattr(recipe, "backward_override", None) is not None:
        return None
    if recipe.float8_block_scaling() and recipe.x_block_scaling_dim == 1:
        how = recipe.fp8_quant_fwd_inp
        return Settings(Recipe.BLOCK, how.power_2_scale, how.amax_epsilon)
    return Settings(Recipe.MXFP8) if recipe.mxfp8() else None


def carry(rows: Tensor, quantized: Quantized) -> Carried:
    """What stands for `rows` and holds what arrived, to be given to a GroupedLinear."""
    carried = Carried._make_wrapper_subclass(
        Carried, rows.size(), dtype=rows.dtype, device=rows.device, requires_grad=rows.requires_grad
    )
    assert isinstance(carried, Carried)
    carried.rows, carried.quantized = rows, replace(quantized, rows=rows.detach())  # which keeps no graph alive
    return carried


def _forward(stock: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, inp: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(inp, Carried):
            if is_placeholder(inp):
                raise _no_values("these came without them")
            return stock(self, inp, *args, **kwargs)
        rows, quantized = inp.rows, inp.quantized
        if not _takes(self, quantized):
            return stock(self, replace(quantized, rows=rows).dequantize(), *args, **kwargs)
        assert _handing.quantized is None
        _handing.quantized = quantized
        try:
            out = stock(self, rows, *args, **kwargs)
            if _handing.quantized is not None:
                raise DeepEPError("this release of Transformer Engine does not take its input where 2.20 does")
            return out
        finally:
            _handing.quantized = None

    return forward


def _takes(linear: Any, quantized: Quantized) -> bool:
    """Whether this layer's first step, now, is the split quantization that is replaced."""
    now = settings()
    if now is None or now.recipe is not quantized.recipe:
        return False  # this layer computes in another precision
    offload = importlib.import_module("transformer_engine.pytorch.cpu_offload")
    is_debugged = importlib.import_module("transformer_engine.debug.pytorch.debug_state").TEDebugState.debug_enabled
    keeps_input = linear.save_original_input or offload.is_cpu_offload_enabled()
    return not (keeps_input or linear.use_grouped_tensor or is_debugged)


def _prepare_forward(stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def prepare_forward(self: Any, inp: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if _handing.quantized is not None:  # the input has no memory of its own: a contiguous copy would be made of nothing
            kwargs["allow_non_contiguous"] = True
        return stock(self, inp, *args, **kwargs)

    return prepare_forward


def _split_quantize(stock: Callable[..., Any]) -> Callable[..., Any]:
    def split_quantize(tensor: Tensor, split_sizes: Any, quantizers: Any, *args: Any, **kwargs: Any) -> Any:
        quantized, _handing.quantized = _handing.quantized, None
        if quantized is None:
            return stock(tensor, split_sizes, quantizers, *args, **kwargs)
        if tuple(split_sizes) != quantized.splits:
            raise DeepEPError(f"experts split their rows as {list(split_sizes)}, but {list(quantized.splits)} arrived")
        if type(quantizers[0]).__name__ != _QUANTIZERS[quantized.recipe]:  # a layer with a recipe of its own
            with torch.no_grad():
                return stock(quantized.dequantize(), split_sizes, quantizers, *args, **kwargs)
        from deepep_train.fp8.gemm_te import Received

        return Received(quantized, quantizers).become_columnwise_on_demand(), None

    return split_quantize
