"""`MoELayer` trains in FP8 on CPU ranks, and its messages have FP8's size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from torch import Tensor

import deepep_train as dt
from deepep_train import fp8, moe
from deepep_train.engines.peers import Peers

HIDDEN, FFN, EXPERTS, TOP_K, TOKENS, STEPS = 2048, 128, 4, 2, 24, 12


def train(rank: int, size: int, group: dist.ProcessGroup, recipe: fp8.Recipe | None) -> tuple[str, list[float], list[int]]:
    """The engine, every step's loss, and the bytes of rows to the other rank in dispatches (combine's backward is one)."""
    crossed: list[int] = []
    stock = Peers.all_to_all_rows

    def all_to_all_rows(
        self: Peers, rows: Tensor, give: Sequence[int], take: Sequence[int], operation: str, *args: Any, **how: Any
    ) -> Tensor:
        if operation == "dispatch":
            width = rows[0].nbytes if len(rows) else 0
            crossed.append(width * sum(n for to, n in enumerate(give) if to != rank))
        return stock(self, rows, give, take, operation, *args, **how)

    torch.manual_seed(3)
    buffer = dt.Buffer(group, timeout=20)
    grad_dtype = None if recipe is None else torch.float8_e4m3fn
    layer = moe.MoELayer(
        HIDDEN, FFN, EXPERTS, TOP_K, buffer=buffer, fp8_recipe=recipe, grad_dtype=grad_dtype, dtype=torch.bfloat16
    )
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
    g = torch.Generator().manual_seed(rank)
    x, target = (torch.randn(TOKENS, HIDDEN, generator=g).bfloat16() for _ in range(2))
    losses = []
    Peers.all_to_all_rows = all_to_all_rows  # type: ignore[method-assign]
    try:
        for _ in range(STEPS):
            loss = (layer(x) - target).float().square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    finally:
        Peers.all_to_all_rows = stock  # type: ignore[method-assign]
    return buffer.engine, losses, crossed


@pytest.mark.parametrize("recipe", [fp8.Recipe.BLOCK, fp8.Recipe.MXFP8])
def test_trains_with_messages_of_fp8_size(recipe: fp8.Recipe) -> None:
    in_bf16, in_fp8 = run_ranks(2, train, None), run_ranks(2, train, recipe)
    for (engine, losses, crossed), (_, losses_bf16, crossed_bf16) in zip(in_fp8, in_bf16, strict=True):
        assert engine == "collective"
        assert losses[-1] < 0.8 * losses[0], losses
        assert all(abs(a - b) < 0.02 * b for a, b in zip(losses, losses_bf16, strict=True)), (losses, losses_bf16)
        # The first step's: routing is the same there, before weights move apart.
        calls, calls_bf16 = len(crossed) // STEPS, len(crossed_bf16) // STEPS
        assert 0 < sum(crossed[:calls]) <= 0.53 * sum(crossed_bf16[:calls_bf16])
