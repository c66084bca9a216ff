"""Gradients and clipping across ranks, with plain reduction, DDP and FSDP2, against the same model on one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks, torch_release
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from deepep_train import Buffer, moe

HIDDEN, EXPERTS = 8, 8


class Model(nn.Module):
    def __init__(self, group: dist.ProcessGroup | None = None, buffer: Buffer | None = None) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first = nn.Linear(HIDDEN, HIDDEN)
        self.moe = moe.MoELayer(HIDDEN, 16, EXPERTS, 2, group, buffer=buffer, num_shared_experts=1)
        self.last = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + self.moe(self.first(x)))


def _batch(rank: int, step: int) -> Tensor:
    return torch.randn(10 + 3 * rank, HIDDEN, generator=torch.Generator().manual_seed(100 * step + rank))


def _train(model: nn.Module, reduce: Any, clip: Any, batches: Any) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), 0.02)
    norms = []
    for step in range(4):
        optimizer.zero_grad()
        for x, scale in batches(step):
            (model(x).square().mean() * scale).backward()
        reduce()
        norms.append(float(clip()))
        optimizer.step()
    return norms


def _on_one_process(size: int, own_group: dist.ProcessGroup | None) -> tuple[list[float], dict[str, Tensor]]:
    model = Model(buffer=Buffer(own_group))
    norms = _train(
        model,
        lambda: None,
        lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5),
        lambda step: [(_batch(r, step), 1 / size) for r in range(size)],
    )
    return norms, {n: p.detach() for n, p in model.named_parameters()}


def _full(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def _rank(rank: int, size: int, group: dist.ProcessGroup, how: str, ep: int) -> dict[str, Any]:
    groups = [dist.new_group(list(range(i, i + ep))) for i in range(0, size, ep)]
    replica_groups = [dist.new_group(list(range(i, size, ep))) for i in range(ep)]
    own, replicas = groups[rank // ep], replica_groups[rank % ep] if ep < size else None
    model: nn.Module = Model(own)
    trained = model
    if how == "ddp":
        moe.ignore_experts_in_ddp(model)
        trained = nn.parallel.DistributedDataParallel(model)
    elif how == "fsdp2":
        mesh = dist.init_device_mesh("cpu", (size,))
        fully_shard(model, mesh=mesh, ignored_params=set(moe.expert_parameters(model)))

    def reduce() -> None:
        if how == "plain":
            moe.reduce_gradients(model, None, replicas)
        else:
            moe.reduce_expert_gradients(model, None, replicas)

    norms = _train(trained, reduce, lambda: moe.clip_grad_norm_(model, 0.5, own), lambda step: [(_batch(rank, step), 1.0)])
    single = [dist.new_group([r]) for r in range(size)]
    expected_norms, expected = _on_one_process(size, single[rank])
    parameters = {n: _full(p.detach()) for n, p in model.named_parameters()}
    return {"norms": norms, "expected_norms": expected_norms, "parameters": parameters, "expected": expected}


@pytest.mark.parametrize("how", ["plain", "ddp", "fsdp2"])
@pytest.mark.parametrize("size,ep", [(2, 2), (4, 2)])
def test_trains_like_one_process(how: str, size: int, ep: int) -> None:
    if how == "fsdp2" and torch_release() < (2, 9):
        pytest.skip("fully_shard of torch 2.8 adds gradients up over gloo, and before it has no ignored_params")
    results = run_ranks(size, _rank, how, ep, timeout=120)
    for rank, result in enumerate(results):
        assert result["norms"] == pytest.approx(result["expected_norms"], rel=1e-4)
        for name, p in result["parameters"].items():
            expected = result["expected"][name]
            if "experts.w" in name:
                here = rank % ep * (EXPERTS // ep)
                expected = expected[here : here + EXPERTS // ep]
            torch.testing.assert_close(p, expected, rtol=1e-3, atol=2e-5)


def _missing(rank: int, size: int, group: dist.ProcessGroup) -> list[bool]:
    """A rank whose loss never touched the layer must still take part in the reduction."""
    model = Model(group)
    if rank == 0:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
    moe.reduce_gradients(model)
    return [bool((p.grad == (1 / size if rank == 0 or not _is_expert(n) else 0)).all()) for n, p in model.named_parameters()]


def _is_expert(name: str) -> bool:
    return "experts.w" in name


def test_rank_without_gradients_takes_part() -> None:
    assert all(all(r) for r in run_ranks(2, _missing))


def _infinity_norm(rank: int, size: int, group: dist.ProcessGroup) -> float:
    model = Model(group)
    for n, p in model.named_parameters():
        p.grad = torch.full_like(p, 3.0 + rank if _is_expert(n) else 1.0)
    norm = moe.clip_grad_norm_(model, 1.0, norm_type=float("inf"))
    assert all(float(p.grad.abs().max()) <= 1.0 for p in model.parameters())
    return float(norm)


def test_infinity_norm_sees_every_ranks_experts() -> None:
    assert run_ranks(2, _infinity_norm) == [4.0, 4.0]
