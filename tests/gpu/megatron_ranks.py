"""What the ranks of the GPU's Megatron tests do.

Megatron looks for `deep_ep` when it is imported, so that these processes have its own DeepEP backend, too.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deepep_train import Buffer, compat, engines, ops

compat.install()

import gloo_on_cuda  # noqa: E402
import megatrons_own  # noqa: E402
import small  # noqa: E402

from deepep_train.megatron import TokenDispatcher, quantized_experts  # noqa: E402
from deepep_train.megatron.replacements import Replacements  # noqa: E402
from deepep_train.megatron.switches import FP8_VARIABLE, GRADIENTS_VARIABLE  # noqa: E402

compat.uninstall()  # Megatron keeps what it found

DEEPEP = {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "deepep", "moe_router_dtype": "fp32"}

# Buffers take 2 GiB unless told to take more, and every training makes one.
engines.DEFAULT_ARENA_BYTES = 128 << 20

MODEL = {"hidden_size": 256, "moe_ffn_hidden_size": 128, "attention_backend": "unfused"}


def setup_of(config: dict[str, Any] | None = None, **how: Any) -> Any:
    # At higher rates bf16's rounding grows to several percent within 20 steps, between Megatron's own dispatchers as well.
    how = {"ep": 4, "in_bf16": True, "with_te": True, "micro_batch_size": 8, "learning_rate": 5e-4} | how
    return small.Setup(config=MODEL | (config or {}), **how)


def apart(a: list[list[float]], b: list[list[float]]) -> float:
    """The largest relative difference of losses; all of them are 0 on a rank of an earlier pipeline stage."""
    assert all(math.isfinite(number) for step in a + b for number in step), (a, b)
    return max(abs(x - y) / abs(y) if x != y else 0.0 for (x, _), (y, _) in zip(a, b, strict=True))


@contextmanager
def on_gloo() -> Iterator[list[str]]:
    """Megatron over gloo on a GPU; gives the engines of the buffers made meanwhile."""
    made: list[str] = []
    spy = Replacements()
    stock = Buffer.__init__

    def init(self: Buffer, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        made.append(self.engine)

    spy.put(Buffer, "__init__", init)
    gloo_on_cuda.enable()
    try:
        yield made
    finally:
        gloo_on_cuda.disable()
        spy.take_back()


def trainings(
    rank: int, size: int, group: Any, setup: small.Setup, dispatchers: list[dict[str, Any]], steps: int
) -> tuple[list[list[list[float]]], list[str]]:
    """As `small.trainings`, and the engines."""
    with on_gloo() as made:
        return small.trainings(rank, size, group, setup, dispatchers, steps), made


def container(rank: int, size: int, group: Any, *case: Any) -> None:
    """`megatrons_own.container` over nvlink."""
    with on_gloo() as made:
        megatrons_own.container(rank, size, group, *case)
    assert set(made) == {"nvlink"}, made


def overlap(rank: int, size: int, group: Any, *case: Any) -> None:
    """`megatrons_own.overlap` over nvlink."""
    with on_gloo() as made:
        megatrons_own.overlap(rank, size, group, *case)
    assert set(made) == {"nvlink"}, made


def fused_trainings(
    rank: int, size: int, group: Any, setup: small.Setup, dispatchers: list[dict[str, Any]], steps: int
) -> tuple[list[list[list[float]]], list[str], list[bool]]:
    """With what Megatron wants to see before it fuses experts; and whether combine was given the memory that was handed out."""
    places: list[int] = []
    in_place: list[bool] = []
    spy = Replacements()
    hand_out, combine = TokenDispatcher.get_expert_zero_copy_buffers, TokenDispatcher.token_combine

    def get_expert_zero_copy_buffers(self: TokenDispatcher) -> Any:
        buffers = hand_out(self)
        if buffers[0] is not None:
            places.append(buffers[0].data_ptr())
        return buffers

    def token_combine(self: TokenDispatcher, hidden_states: Any) -> Any:
        if places:
            in_place.append(hidden_states.data_ptr() == places.pop())
        return combine(self, hidden_states)

    spy.put(TokenDispatcher, "get_expert_zero_copy_buffers", get_expert_zero_copy_buffers)
    spy.put(TokenDispatcher, "token_combine", token_combine)
    os.environ["NVTE_CUTEDSL_FUSED_GROUPED_MLP"] = "1"
    try:
        return *trainings(rank, size, group, setup, dispatchers, steps), in_place
    finally:
        del os.environ["NVTE_CUTEDSL_FUSED_GROUPED_MLP"]
        spy.take_back()


def fp8_trainings(
    rank: int,
    size: int,
    group: Any,
    setup: small.Setup,
    dispatcher: dict[str, Any],
    steps: int,
    switches: tuple[str, ...] = ("0", "1"),
) -> tuple[list[list[list[float]]], list[str], list[int]]:
    """Curves with tokens sent as they are ("0") and sent in FP8; the engines; how many dispatches crossed in FP8 in each."""
    curves, made, sent = [], [], []
    for switch in switches:
        spy = Replacements()
        count = [0]

        def carry(rows: Any, quantized: Any, count: list[int] = count, stock: Any = quantized_experts.carry) -> Any:
            count[0] += 1
            return stock(rows, quantized)

        spy.put(quantized_experts, "carry", carry)
        os.environ[FP8_VARIABLE] = switch
        try:
            (curve,), engines = trainings(rank, size, group, setup, [dispatcher], steps)
        finally:
            del os.environ[FP8_VARIABLE]
            spy.take_back()
        curves.append(curve)
        made += engines
        sent.append(count[0])
    return curves, made, sent


def fp8_gradients(
    rank: int, size: int, group: Any, setup: small.Setup, dispatcher: dict[str, Any], steps: int
) -> tuple[list[list[list[float]]], int]:
    """`fp8_trainings`' curves where combine's gradients cross in FP8 if tokens do, and how many did."""
    spy, count, stock = Replacements(), [0], ops._send_gradient

    def send_gradient(grad: Any, handle: Any, grad_dtype: Any, num_sms: int) -> Any:
        count[0] += grad_dtype is not None
        return stock(grad, handle, grad_dtype, num_sms)

    spy.put(ops, "_send_gradient", send_gradient)
    os.environ[GRADIENTS_VARIABLE] = "1"
    try:
        return fp8_trainings(rank, size, group, setup, dispatcher, steps)[0], count[0]
    finally:
        del os.environ[GRADIENTS_VARIABLE]
        spy.take_back()
