"""DeepEP V1's calls carry no gradients: tensors that want one are taken as they are, on one rank as on all."""

from __future__ import annotations

import torch
import torch.distributed as dist
from harness import run_ranks

import deepep_train as dt


def all_want_gradients(rank: int, size: int, group: dist.ProcessGroup, on: tuple[int, ...]) -> None:
    buffer, wanted = dt.Buffer(group, timeout=10), rank in on
    x, idx = torch.randn(4, 16, requires_grad=wanted), torch.tensor([[0, 2], [1, 3], [0, 1], [2, 3]])
    weights = torch.rand(4, 2, requires_grad=wanted)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, 2 * size)
    how = {"num_tokens_per_rank": per_rank, "num_tokens_per_expert": per_expert, "is_token_in_rank": in_rank}
    rows, _, got, _, handle, _ = buffer.dispatch(x, **how, topk_idx=idx, topk_weights=weights)
    again = buffer.dispatch(x, handle=handle)[0]
    y = rows.clone().requires_grad_(wanted)
    w = got.clone().requires_grad_(wanted)
    z, back, _ = buffer.combine(y, handle, topk_weights=w, bias=torch.ones(4, 16, requires_grad=wanted))
    assert not any(t.requires_grad for t in (rows, got, again, z, back))


def test_tensors_that_want_gradients() -> None:
    for on in ((0,), (0, 1)):
        run_ranks(2, all_want_gradients, on, timeout=40)
