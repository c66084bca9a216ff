"""Gradients of first order only, and an error where a second one is asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepep_train.errors import DeepEPError


class _NoSecondDerivative(torch.autograd.Function):
    """The identity, with a backward that says why there is none."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, operation: str, _: Tensor) -> Tensor:
        ctx.operation = operation
        return grad

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple:
        raise DeepEPError(
            f"second derivatives of deepep_train.{ctx.operation} are not supported: its gradient was differentiated again"
        )


def differentiable_once(operation: str, grad: Tensor | None, depends_on: Tensor) -> Tensor | None:
    """In a backward pass: `grad` as it is, but that differentiating it again raises, where `depends_on` has a graph."""
    if grad is None or not torch.is_grad_enabled():
        return grad
    return _NoSecondDerivative.apply(grad, operation, depends_on)
