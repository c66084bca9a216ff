"""How received rows reach Transformer Engine's GroupedLinear. Its kernels need a GPU (tests/gpu/test_fp8_megatron.py); which
operands it is given does not."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import assert_same_bits

pytest.importorskip("transformer_engine.pytorch", reason="Transformer Engine is not installed")

from transformer_engine.common import recipe as recipes
from transformer_engine.debug.pytorch.debug_state import TEDebugState
from transformer_engine.pytorch.constants import DType
from transformer_engine.pytorch.module import _split_quantization, grouped_linear
from transformer_engine.pytorch.quantization import FP8GlobalStateManager
from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer

from deepep_train import DeepEPError, fp8
from deepep_train.fp8 import Quantized, Recipe, gemm_te
from deepep_train.megatron import quantized_experts

SPLITS = (16, 0, 32)


@pytest.fixture(autouse=True)
def installed() -> Any:
    quantized_experts.install()
    yield
    quantized_experts.uninstall()


def received() -> Quantized:
    q = fp8.quantize(torch.randn(sum(SPLITS), 256).bfloat16())
    scales = fp8.Recipe.BLOCK.blocks.put(q.row_scales().contiguous(), SPLITS)
    return Quantized(q.recipe, q.data, scales, SPLITS, q.rows)


def quantizers() -> list[Any]:
    return [Float8BlockQuantizer(DType.kFloat8E4M3, rowwise=True, columnwise=True, block_scaling_dim=1) for _ in SPLITS]


def give(monkeypatch: pytest.MonkeyPatch, q: Quantized, recipe: Any, splits: Any = SPLITS, **linear: Any) -> Any:
    """What the replaced `forward` makes of `q`, in a GroupedLinear that does nothing but split its input."""
    monkeypatch.setattr(FP8GlobalStateManager, "is_fp8_enabled", lambda: recipe is not None)
    monkeypatch.setattr(FP8GlobalStateManager, "get_fp8_recipe", lambda: recipe)
    seen: list[Any] = []

    def stock(self: Any, inp: Any) -> Any:
        seen.append(inp)
        return None if self.forgets else _split_quantization._split_quantize(inp, list(splits), quantizers(), inp.dtype)[0]

    how = {"save_original_input": False, "use_grouped_tensor": False, "forgets": False}
    layer = SimpleNamespace(**(how | linear))
    got = quantized_experts._forward(stock)(layer, quantized_experts.carry(q.rows, q))
    return got, seen[0]


def test_operands_are_the_received_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    q = received()
    got, _ = give(monkeypatch, q, recipes.Float8BlockScaling())
    for storage, (data, scales), m in zip(got, q.groups(), SPLITS, strict=True):
        assert type(storage).__name__ == "Float8BlockwiseQTensorStorage", "the kernels' binding wants the exact class"
        assert storage._rowwise_data.data_ptr() == data.data_ptr()
        assert_same_bits(storage._rowwise_data, data.view(torch.uint8))
        assert_same_bits(storage._rowwise_scale_inv, scales)
        assert tuple(scales.shape) == quantizers()[0].get_scale_shape((m, 256), columnwise=False)


def test_columnwise_operands_are_made_once_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def columnwise(q: Quantized, _: Any) -> list[Any]:
        made.append(q)
        return [SimpleNamespace(_columnwise_data=f"data {i}", _columnwise_scale_inv=f"scale {i}") for i in range(3)]

    monkeypatch.setattr(gemm_te, "_columnwise", columnwise)
    q = received()
    got, _ = give(monkeypatch, q, recipes.Float8BlockScaling())
    assert not made
    for i, storage in enumerate(got):
        storage.update_usage(rowwise_usage=False, columnwise_usage=True)
        assert (storage._columnwise_data, storage._columnwise_scale_inv) == (f"data {i}", f"scale {i}")
        assert storage._rowwise_data is None and storage._rowwise_scale_inv is None
        storage.update_usage(rowwise_usage=False, columnwise_usage=True)  # its own again
    assert len(made) == 1


def test_nothing_is_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    q = received()
    got, _ = give(monkeypatch, q, recipes.Float8BlockScaling())
    gc.disable()
    try:
        data = weakref.ref(got[0]._rowwise_data)
        del got, q
        assert data() is None, "a cycle holds the received rows"
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "how", [{"save_original_input": True}, {"use_grouped_tensor": True}, {}], ids=["kept", "grouped", "debugged"]
)
def test_layers_that_read_their_input_get_values(monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]) -> None:
    q = received()
    monkeypatch.setattr(TEDebugState, "debug_enabled", not how)
    monkeypatch.setattr(_split_quantization, "_split_quantize", lambda x, *_, **__: (x, None))
    _, seen = give(monkeypatch, q, recipes.Float8BlockScaling(), **how)
    assert_same_bits(seen, q.dequantize())


@pytest.mark.parametrize("recipe", [None, recipes.MXFP8BlockScaling(), recipes.Float8CurrentScaling()])
def test_layers_of_another_precision_get_values(monkeypatch: pytest.MonkeyPatch, recipe: Any) -> None:
    q = received()
    monkeypatch.setattr(_split_quantization, "_split_quantize", lambda x, *_, **__: (x, None))
    _, seen = give(monkeypatch, q, recipe)
    assert_same_bits(seen, q.dequantize())


def test_what_does_not_fit_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeepEPError, match=r"\[16, 32, 0\], but \[16, 0, 32\] arrived"):
        give(monkeypatch, received(), recipes.Float8BlockScaling(), splits=(16, 32, 0))
    with pytest.raises(DeepEPError, match=r"where 2\.20 does"):
        give(monkeypatch, received(), recipes.Float8BlockScaling(), forgets=True)
    assert quantized_experts._handing.quantized is None


def test_settings_are_the_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd(recipes.Float8BlockScaling):
        fp8_quant_fwd_inp = recipes.QParams(power_2_scale=False, amax_epsilon=1e-3)

    for recipe, expected in (
        (None, None),
        (recipes.Float8BlockScaling(), quantized_experts.Settings(Recipe.BLOCK, True, 0.0)),
        (Odd(), quantized_experts.Settings(Recipe.BLOCK, False, 1e-3)),
        (recipes.MXFP8BlockScaling(), quantized_experts.Settings(Recipe.MXFP8)),
        (recipes.Float8CurrentScaling(), None),
    ):
        monkeypatch.setattr(FP8GlobalStateManager, "is_fp8_enabled", lambda recipe=recipe: recipe is not None)
        monkeypatch.setattr(FP8GlobalStateManager, "get_fp8_recipe", lambda recipe=recipe: recipe)
        assert quantized_experts.settings() == expected


def test_uninstall_takes_back() -> None:
    ours = grouped_linear.GroupedLinear.forward, _split_quantization._split_quantize
    quantized_experts.uninstall()
    assert ours[0] is not grouped_linear.GroupedLinear.forward
    assert ours[1] is not _split_quantization._split_quantize
    assert not quantized_experts.is_installed()
