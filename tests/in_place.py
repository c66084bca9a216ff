"""Training code that writes to what dispatch and combine return."""

from __future__ import annotations

import torch
from harness import assert_same_bits
from torch import Tensor

import deepep_train as dt


def check_writes(buffer: dt.Buffer, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, num_experts: int) -> None:
    """In both layouts: results and gradients are those of code that makes new tensors."""
    for layout in ("rank", "expert"):
        found = []
        for in_place in (False, True):
            x, topk_weights = (t.detach().clone().requires_grad_() for t in (x, topk_weights))
            out = dt.dispatch(x, topk_idx, topk_weights, buffer=buffer, num_experts=num_experts, layout=layout)
            rows, weights = out.x, out.topk_weights
            assert weights is not None
            if in_place:
                rows.mul_(2), weights.mul_(3)
            else:
                rows, weights = rows * 2, weights * 3
            z = dt.combine(rows, out.handle)
            z = z.add_(x.detach()) if in_place else z + x.detach()
            torch.autograd.backward([z, weights], [torch.ones_like(z), torch.ones_like(weights)])
            assert x.grad is not None and topk_weights.grad is not None
            found.append((z.detach(), weights.detach(), x.grad, topk_weights.grad))
        for plain, written in zip(*found, strict=True):
            assert_same_bits(written.cpu(), plain.cpu())
