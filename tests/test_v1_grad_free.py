"""DeepEP V1's calls carry no gradient: tensors that want one are taken as they are, on one rank as on all."""

from __future__ import annotations

import torch
import torch.distributed as dist
from harness import run_ranks

import deepep_train as dt


def weights_want_gradients(rank: int, size: int, group: dist.ProcessGroup, on: tuple[int, ...]) -> None:
    buffer = dt.Buffer(group, timeout=10)
    x, idx = torch.randn(4, 16), torch.tensor([[0, 2], [1, 3], [0, 1], [2, 3]])
    weights = torch.rand(4, 2, requires_grad=rank in on)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, 2 * size)
    how = {"num_tokens_per_rank": per_rank, "num_tokens_per_expert": per_expert, "is_token_in_rank": in_rank}
    _, _, got, *_ = buffer.dispatch(x, **how, topk_idx=idx, topk_weights=weights)
    assert got is not None and not got.requires_grad


def test_weights_that_want_gradients() -> None:
    for on in ((0,), (0, 1)):
        run_ranks(2, weights_want_gradients, on, timeout=40)
