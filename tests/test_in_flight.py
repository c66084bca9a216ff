"""Several layers and micro-batches at once: forward and backward passes interleave in any order and disturb nobody."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from draws import Exchange
from harness import run_ranks, same_bits
from torch import Tensor

import deepep_train as dt

MICRO_BATCHES, LAYERS = 3, 2
Grads = list[Tensor]


class Model:
    """Two MoE layers over one buffer, one in each layout, with routings that differ by layer and micro-batch."""

    def __init__(self, rank: int, size: int, group: dist.ProcessGroup, buffer: dt.Buffer | None = None) -> None:
        self.rank = rank
        self.buffer = buffer or dt.Buffer(group, timeout=20)
        self.device = "cpu" if buffer is None else "cuda"
        self.tokens = tuple((4, 0, 6, 1)[:size])
        self.inputs: list[Grads] = []

    def forward(self, micro_batch: int) -> Tensor:
        """A loss; the leaves are kept in `inputs`."""
        leaves, h = [], None
        for layer in range(LAYERS):
            layout = ("rank", "expert")[(layer + micro_batch) % 2]
            case = Exchange(self.tokens, 8, 3, 2, "mixed", torch.float32, layout, 2, seed=10 * micro_batch + layer)
            given = case.given()[self.rank]
            w = given.topk_weights.clone().to(self.device).requires_grad_()
            if h is None:
                h = torch.randn(given.x.shape, generator=case.generator()).to(self.device).requires_grad_()
                leaves.append(h)
            leaves.append(w)
            out = dt.dispatch(
                h,
                given.topk_idx.to(self.device),
                w,
                buffer=self.buffer,
                num_experts=case.num_experts,
                layout=layout,
                alignment=2,
            )
            scale = out.topk_weights.sum(1, keepdim=True) if layout == "rank" else out.topk_weights.unsqueeze(1)
            h = h + dt.combine(torch.sin(out.x) * scale, out.handle)
        self.inputs.append(leaves)
        return (h**2).sum()

    def grads(self) -> list[Grads]:
        return [[t.grad for t in leaves] for leaves in self.inputs]


def one_at_a_time(rank: int, size: int, group: dist.ProcessGroup, buffer: dt.Buffer | None = None) -> list[Grads]:
    model = Model(rank, size, group, buffer)
    for m in range(MICRO_BATCHES):
        model.forward(m).backward()
    return model.grads()


def interleaved(rank: int, size: int, group: dist.ProcessGroup, schedule: str, buffer: dt.Buffer | None = None) -> list[Grads]:
    """`schedule`: F the next forward pass, a digit that micro-batch's backward pass, S a backward pass of the sum of all."""
    model = Model(rank, size, group, buffer)
    losses: list[Tensor] = []
    for step in schedule:
        if step == "F":
            losses.append(model.forward(len(losses)))
        elif step == "S":
            torch.stack(losses).sum().backward()
        else:
            losses[int(step)].backward()
    return model.grads()


SCHEDULES = ["FFF" + "".join(order) for order in itertools.permutations("012")] + ["FF0F12", "FF1F20", "F0FF21", "FFFS"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_give_the_gradients_of_one_at_a_time(schedule: str) -> None:
    expected = run_ranks(3, one_at_a_time)
    got = run_ranks(3, interleaved, schedule)
    for rank in range(3):
        for m in range(MICRO_BATCHES):
            assert all(same_bits(a, b) for a, b in zip(got[rank][m], expected[rank][m], strict=True)), (rank, m)


def double_use(rank: int, size: int, group: dist.ProcessGroup, layout: str) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients through one handle used for two combines and a second dispatch, and the same from separate dispatches."""
    buffer = dt.Buffer(group, timeout=20)
    case = Exchange((4, 5), 6, 3, 2, "holes", torch.float64, layout, 4)
    given = case.given()[rank]
    x0 = torch.randn(given.x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    how = {"buffer": buffer, "num_experts": case.num_experts, "layout": layout, "alignment": 4}

    def run(shared: bool) -> list[Tensor]:
        x, w = x0.clone().requires_grad_(), given.topk_weights.clone().requires_grad_()
        first = dt.dispatch(x, given.topk_idx, w, **how)
        again = dt.dispatch(x * 2, buffer=buffer, handle=first.handle) if shared else dt.dispatch(x * 2, given.topk_idx, **how)
        scale = first.topk_weights.sum(1, keepdim=True) if layout == "rank" else first.topk_weights.unsqueeze(1)
        z = dt.combine(first.x.sin() * scale, first.handle)
        z2 = dt.combine(again.x.cos(), again.handle)
        z3 = dt.combine(first.x.exp(), first.handle if shared else again.handle)
        (z * z2 + z3).sum().backward()
        return [z.detach(), z2.detach(), z3.detach(), x.grad, w.grad]

    return run(True), run(False)


@pytest.mark.parametrize("layout", ["rank", "expert"])
def test_a_handle_used_several_times(layout: str) -> None:
    for shared, separate in run_ranks(2, double_use, layout):
        for a, b in zip(shared, separate, strict=True):
            assert same_bits(a, b)


def backward_twice(rank: int, size: int, group: dist.ProcessGroup) -> bool:
    """With retain_graph, a second backward pass adds the same gradients once more."""
    model = Model(rank, size, group)
    loss = model.forward(0)
    loss.backward(retain_graph=True)
    once = [t.grad.clone() for t in model.inputs[0]]
    loss.backward()
    return all(same_bits(t.grad, g * 2) for t, g in zip(model.inputs[0], once, strict=True))


def test_backward_twice_through_one_graph() -> None:
    assert run_ranks(2, backward_twice) == [True, True]


def two_buffers(rank: int, size: int, group: dist.ProcessGroup) -> bool:
    """Buffers of one group and of a subgroup do not disturb each other, nor does the group's own use by the caller."""
    pair = dist.new_group([0, size - 1])
    whole, other = dt.Buffer(group, timeout=20), dt.Buffer(group, timeout=20)
    part = dt.Buffer(pair, timeout=20) if rank in (0, size - 1) else None
    idx = torch.arange(size).view(-1, 1)
    x = torch.full((size, 3), float(rank))
    first = dt.dispatch(x, idx, buffer=whole, num_experts=size)
    second = dt.dispatch(x + 10, idx.flip(0), buffer=other, num_experts=size)
    total = torch.ones(1)
    dist.all_reduce(total, group=group)
    ok = total.item() == size
    if part is not None:
        out = dt.dispatch(x[:2], torch.tensor([[0], [1]]), buffer=part, num_experts=2)
        ok &= torch.equal(dt.combine(out.x, out.handle), x[:2])
    ok &= torch.equal(first.x[:, 0], torch.arange(float(size)))
    ok &= torch.equal(dt.combine(second.x, second.handle), x + 10)
    return ok and torch.equal(dt.combine(first.x * 2, first.handle), x * 2)


def test_several_buffers_and_groups() -> None:
    assert run_ranks(3, two_buffers) == [True] * 3
