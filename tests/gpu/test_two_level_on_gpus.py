"""The two-level path on GPU tensors, over gloo: several ranks share the GPU, and give what they give on CPUs, bit for bit."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from draws import Exchange, values
from harness import assert_same_bits, run_ranks

import deepep_train as dt


def on(device: str, buffer: dt.Buffer, case: Exchange, rank: int) -> list[Any]:
    given, generator = case.given()[rank], case.generator()
    x = values(generator, given.num_tokens, case.hidden, case.dtype).to(device).requires_grad_()
    w = given.topk_weights.to(device).requires_grad_()
    how = {"buffer": buffer, "num_experts": case.num_experts, "layout": case.layout, "alignment": case.alignment}
    out = dt.dispatch(x, given.topk_idx.to(device), w, **how)
    z = dt.combine(out.x, out.handle, bias=x.detach())
    (z.sum() + out.topk_weights.sum()).backward()
    again = dt.dispatch(x.detach(), buffer=buffer, handle=out.handle)
    worst = dt.dispatch(x.detach(), given.topk_idx.to(device), None, **how, num_worst_tokens=out.x.size(0) + 3)
    return [t.detach().cpu() for t in (out.x, out.topk_weights, z, x.grad, w.grad, again.x, worst.x)]


def both(rank: int, size: int, group: dist.ProcessGroup, case: Exchange) -> bool:
    buffer = dt.Buffer(group, timeout=30, engine="collective", num_local_ranks=2)
    assert buffer.two_level
    for a, b in zip(*(on(device, buffer, case, rank) for device in ("cpu", "cuda")), strict=True):
        assert_same_bits(a, b)
    return True


def test_gpus_give_what_cpus_give() -> None:
    for layout in ("rank", "expert"):
        for dtype in (torch.bfloat16, torch.float32):
            case = Exchange((40, 0, 33, 11), 24, 6, 3, "uniform", dtype, layout, 4)
            assert run_ranks(4, both, case, timeout=120) == [True] * 4
