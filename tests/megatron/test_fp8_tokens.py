"""When tokens and gradients cross in FP8 in Megatron, and what is then refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import run_ranks

small = pytest.importorskip("small", reason="megatron-core is not installed", exc_type=ImportError)


from deepep_train import ArgumentError, DeepEPError, fp8  # noqa: E402
from deepep_train.megatron import dispatcher, quantized_experts, switches  # noqa: E402


def fp8_config(**how: Any) -> SimpleNamespace:
    """The fields that decide, as a model of Transformer Engine's layers under an FP8 recipe has them."""
    return SimpleNamespace(
        **({"fp8": "e4m3", "moe_grouped_gemm": True, "moe_apply_probs_on_input": False, "hidden_size": 256} | how)
    )


@pytest.mark.parametrize(
    ("expected", "how"),
    [
        (True, {}),
        (False, {"fp8": None}),
        (False, {"moe_grouped_gemm": False}),
        (False, {"moe_use_legacy_grouped_gemm": True}),
        (False, {"use_transformer_engine_op_fuser": True}),
        (False, {"transformer_impl": "inference_optimized"}),
        (False, {"transformer_impl": "local"}),
        (False, {"moe_apply_probs_on_input": True}),
        (False, {"hidden_size": 192}),
        (False, {"moe_latent_size": 96}),
        (False, {"moe_fp8_dispatch": False}),
        (False, {"fine_grained_activation_offloading": True, "offload_modules": ["expert_fc1", "attn_norm"]}),
        (True, {"fine_grained_activation_offloading": True, "offload_modules": ["moe_act"]}),
        (True, {"fine_grained_activation_offloading": False, "offload_modules": ["expert_fc1"]}),
    ],
)
def test_which_configurations_send_fp8(expected: bool, how: dict[str, Any]) -> None:
    assert dispatcher._may_send_fp8(fp8_config(**how)) is expected


@pytest.mark.parametrize(
    ("word", "expected"),
    [(w, False) for w in ("0", "false", "OFF", "no")] + [(w, True) for w in ("", "1", "true", "On", "yes")],
)
def test_the_environment_switches_fp8_off(monkeypatch: pytest.MonkeyPatch, word: str, expected: bool) -> None:
    monkeypatch.setenv(switches.FP8_VARIABLE, word)
    assert dispatcher._may_send_fp8(fp8_config()) is expected
    assert dispatcher._may_send_fp8(fp8_config(moe_fp8_dispatch=True)), "the configuration goes first"


def test_a_switch_that_means_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match="'maybe'"):
        dispatcher._may_send_fp8(fp8_config(moe_fp8_dispatch="maybe"))
    monkeypatch.setenv(switches.FP8_VARIABLE, "maybe")
    with pytest.raises(ArgumentError, match="'maybe'"):
        dispatcher._may_send_fp8(fp8_config())


def test_the_command_line_switches_fp8_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(switches.FP8_VARIABLE, "1")
    assert switches.take_option(["train.py", "--fp8-format", "e4m3"]) == ["train.py", "--fp8-format", "e4m3"]
    assert switches.wants_fp8_dispatch(fp8_config())
    assert switches.take_option(["train.py", switches.FP8_OPTION, "--bf16"]) == ["train.py", "--bf16"]
    assert not switches.wants_fp8_dispatch(fp8_config())


E4M3, E5M2 = fp8.DTYPES


@pytest.mark.parametrize(
    ("expected", "how"),
    [
        (None, {}),
        (E4M3, {"moe_fp8_gradients": True}),
        (E5M2, {"moe_fp8_gradients": True, "fp8": "hybrid"}),
        (None, {"moe_fp8_gradients": True, "fp8": None}),
        (None, {"moe_fp8_gradients": False}),
    ],
)
def test_in_what_gradients_cross(expected: torch.dtype | None, how: dict[str, Any]) -> None:
    assert switches.gradient_dtype(fp8_config(**how)) is expected


def test_the_command_line_and_the_environment_switch_fp8_gradients_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(switches.GRADIENTS_VARIABLE, "0")
    assert switches.gradient_dtype(fp8_config()) is None
    assert switches.take_option(["train.py", switches.GRADIENTS_OPTION, "--bf16"]) == ["train.py", "--bf16"]
    assert switches.gradient_dtype(fp8_config()) is E4M3
    assert switches.gradient_dtype(fp8_config(moe_fp8_gradients=False)) is None, "the configuration goes first"
    for how in ({"moe_fp8_gradients": "yes"}, {"fp8": "e5m2"}):
        with pytest.raises(ArgumentError):
            switches.gradient_dtype(fp8_config(**how))


def gradients_as(rank: int, size: int, group: Any) -> list[Any]:
    """What combine's backward is asked to send: where tokens cross in FP8, and outside of the FP8 context."""
    setup, asked = small.Setup(config={"hidden_size": 128}), []
    with setup.parallel(), pytest.MonkeyPatch.context() as patch:
        layer = small.layer_of(setup.transformer_config(small.OURS))
        ours = layer.token_dispatcher
        ours.may_send_fp8, ours.fp8_gradient_dtype = True, E5M2
        patch.setattr(dispatcher.ops, "combine", lambda y, handle, **how: asked.append(how["grad_dtype"]))
        patch.setattr(quantized_experts, "is_installed", lambda: True)
        for now in (quantized_experts.Settings(fp8.Recipe.BLOCK), None):
            patch.setattr(quantized_experts, "settings", lambda now=now: now)
            x = torch.randn(4, 2, 128)
            probs, routing_map = layer.router(x)
            ours.token_dispatch(*ours.dispatch_preprocess(x, routing_map, probs))
            ours.token_combine(x)
    return asked


def test_gradients_cross_in_fp8_where_tokens_do() -> None:
    assert run_ranks(2, gradients_as, timeout=60) == [[E5M2, None]] * 2


def sent_as(rank: int, size: int, group: Any) -> list[bool]:
    """Whether rows cross in FP8: installed, uninstalled in between, outside of the FP8 context."""
    setup, sent = small.Setup(config={"hidden_size": 128}), []
    with setup.parallel(), pytest.MonkeyPatch.context() as patch:
        layer = small.layer_of(setup.transformer_config(small.OURS))
        ours = layer.token_dispatcher
        ours.may_send_fp8 = True
        settings = quantized_experts.Settings(fp8.Recipe.BLOCK)
        for is_installed, now in ((True, settings), (False, settings), (True, None)):
            patch.setattr(quantized_experts, "is_installed", lambda now=is_installed: now)
            patch.setattr(quantized_experts, "settings", lambda now=now: now)
            x = torch.randn(4, 2, 128)
            probs, routing_map = layer.router(x)
            rows, _, _ = ours.dispatch_postprocess(*ours.token_dispatch(*ours.dispatch_preprocess(x, routing_map, probs)))
            sent.append(isinstance(rows, quantized_experts.Carried))
            assert sent[-1] or not rows.isnan().any()
    return sent


def test_rows_cross_in_fp8_only_to_experts_that_take_them() -> None:
    assert run_ranks(2, sent_as, timeout=60) == [[True, False, False]] * 2


def other_experts(rank: int, size: int, group: Any, local_experts: int) -> None:
    """Megatron's local specification gives SequentialMLP even for `moe_grouped_gemm`."""
    setup = small.Setup(config={"hidden_size": 128, "num_moe_experts": 2 * local_experts})
    with setup.parallel(), pytest.MonkeyPatch.context() as patch:
        layer = small.layer_of(setup.transformer_config(small.OURS))
        layer.token_dispatcher.may_send_fp8 = True
        patch.setattr(quantized_experts, "is_installed", lambda: True)
        patch.setattr(quantized_experts, "settings", lambda: quantized_experts.Settings(fp8.Recipe.BLOCK))
        with pytest.raises(DeepEPError, match=f"only Transformer Engine's GroupedLinear.*{switches.FP8_OPTION}"):
            layer(torch.randn(4, 2, 128, requires_grad=True))


@pytest.mark.parametrize("local_experts", [1, 4])
def test_other_experts_never_compute_with_rows_that_have_no_values(local_experts: int) -> None:
    run_ranks(2, other_experts, local_experts, timeout=60)


class Passing(torch.autograd.Function):
    """Megatron's mappings between parallel regions, activation offloading, FSDP's hooks: another tensor of the same memory."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


@pytest.mark.parametrize(
    "use",
    [
        Passing.apply,
        lambda x: torch.nn.functional.linear(x, torch.ones(4, 256, dtype=torch.bfloat16)),  # an adapter
        torch.clone,
        lambda x: x[0],
    ],
    ids=["passed on", "multiplied", "cloned", "a row"],
)
@pytest.mark.parametrize("with_grad", [True, False])
def test_whatever_computes_with_rows_without_values_is_refused(use: Any, with_grad: bool) -> None:
    q = fp8.quantize(torch.randn(16, 256).bfloat16().requires_grad_(with_grad))
    carried = quantized_experts.carry(q.rows, q)
    assert (carried.shape, carried.dtype, carried.requires_grad) == ((16, 256), torch.bfloat16, with_grad)
    with pytest.raises(DeepEPError, match=switches.FP8_VARIABLE):
        use(carried)


def test_experts_refuse_rows_whose_values_were_lost() -> None:
    q = fp8.quantize(torch.randn(16, 256).bfloat16().requires_grad_())
    forward = quantized_experts._forward(lambda self, rows: rows)
    with pytest.raises(DeepEPError, match=switches.FP8_VARIABLE):
        forward(None, q.rows)
    plain = torch.randn(16, 256)
    assert forward(None, plain) is plain
