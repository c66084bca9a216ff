"""torch's own machinery around dispatch and combine changes no bit: checkpointing, compile, autocast, hooks, grad modes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.distributed as dist
from draws import Exchange
from harness import run_ranks, same_bits, torch_release
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, set_checkpoint_early_stop

import deepep_train as dt

LAYOUTS = ("rank", "expert")
Block = Callable[[Tensor, Tensor, Tensor], Tensor]


class Experts(torch.nn.Module):
    """dispatch, a matrix and a nonlinearity per local expert, combine."""

    def __init__(self, rank: int, buffer: dt.Buffer, case: Exchange) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(rank)
        self.matrices = torch.nn.Parameter(torch.randn(case.num_local_experts, case.hidden, case.hidden, generator=g))
        self.buffer, self.case = buffer, case

    def forward(self, x: Tensor, idx: Tensor, w: Tensor) -> Tensor:
        case = self.case
        how = {"num_experts": case.num_experts, "layout": case.layout, "alignment": case.alignment}
        out = dt.dispatch(x, idx, w, buffer=self.buffer, **how)
        if case.layout == "expert":
            parts = [rows @ m for rows, m in zip(out.x.split(out.tokens_per_expert.tolist()), self.matrices, strict=True)]
            y = torch.sin(torch.cat(parts)) * out.topk_weights.unsqueeze(1)
        else:
            y = torch.zeros_like(out.x)
            for e in range(case.num_local_experts):
                weight = (out.topk_weights * (out.topk_idx == e)).sum(1, keepdim=True)
                y = y + weight * torch.sin(out.x @ self.matrices[e])
        return x + dt.combine(y.to(x.dtype), out.handle)


@dataclass
class Step:
    """What a training step left behind."""

    z: Tensor
    grads: list[Tensor]


class Problem:
    """Two layers in one layout over random routings."""

    def __init__(self, rank: int, group: dist.ProcessGroup, layout: str, seed: int = 0) -> None:
        case = Exchange((5, 3, 0)[: group.size()], 8, 3, 2, "mixed", torch.float32, layout, 4, seed=seed)
        given = case.given()[rank]
        self.x = torch.randn(given.x.shape, generator=case.generator())
        self.idx, self.w = given.topk_idx, given.topk_weights
        self.how = {"num_experts": case.num_experts, "layout": layout}
        self.layers = [Experts(rank + 7 * n, dt.Buffer(group, timeout=20), case) for n in range(2)]

    def step(self, wrap: Callable[[Block], Block] = lambda block: block) -> Step:
        x, w = self.x.clone().requires_grad_(), self.w.clone().requires_grad_()
        h = x
        for layer in self.layers:
            layer.zero_grad()
            h = wrap(layer)(h, self.idx, w)
        (h**2).sum().backward()
        return Step(h.detach(), [x.grad, w.grad, *(layer.matrices.grad for layer in self.layers)])


def agree(a: Step, b: Step) -> bool:
    return same_bits(a.z, b.z) and all(same_bits(g, h) for g, h in zip(a.grads, b.grads, strict=True))


# What can be wrapped around a block -------------------------------------------------------------------------------------


def _selective() -> tuple:
    return create_selective_checkpoint_contexts([torch.ops.aten.mm.default, torch.ops.aten.sin.default])


def _checkpointed(block: Block, **how: object) -> Block:
    return lambda *args: checkpoint(block, *args, **how)


def _without_early_stop(block: Block) -> Block:
    def run(*args: Tensor) -> Tensor:
        with set_checkpoint_early_stop(False):
            return checkpoint(block, *args, use_reentrant=False)

    return run


def _nested(block: Block) -> Block:
    return _checkpointed(_checkpointed(block, use_reentrant=False), use_reentrant=False)


WRAPS: dict[str, Callable[[Block], Block]] = {
    "reentrant checkpoint": partial(_checkpointed, use_reentrant=True),
    "checkpoint": partial(_checkpointed, use_reentrant=False),
    "checkpoint without early stop": _without_early_stop,
    "selective checkpoint": partial(_checkpointed, use_reentrant=False, context_fn=_selective),
    "nested checkpoints": _nested,
}


@contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def _double_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def _offload() -> torch.autograd.graph.saved_tensors_hooks:
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone().numpy(), torch.from_numpy)


CONTEXTS: dict[str, Callable] = {
    "saved-tensor hooks": _offload,
    "save on CPU": torch.autograd.graph.save_on_cpu,
    "deterministic algorithms": _deterministic,
    "anomaly detection": torch.autograd.detect_anomaly,
    "default dtype float64": _double_by_default,
}


def wrapped_step(rank: int, size: int, group: dist.ProcessGroup, layout: str, name: str) -> bool:
    problem = Problem(rank, group, layout)
    return agree(problem.step(), problem.step(WRAPS[name]))


def step_within(rank: int, size: int, group: dist.ProcessGroup, layout: str, name: str) -> bool:
    problem = Problem(rank, group, layout)
    plain = problem.step()
    with CONTEXTS[name]():
        return agree(plain, problem.step())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", WRAPS)
def test_recomputing_changes_no_bit(name: str, layout: str) -> None:
    assert all(run_ranks(3, wrapped_step, layout, name))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONTEXTS)
@pytest.mark.filterwarnings("ignore")
def test_contexts_change_no_bit(name: str, layout: str) -> None:
    assert all(run_ranks(3, step_within, layout, name))


# torch.compile ----------------------------------------------------------------------------------------------------------


def compiled_steps(rank: int, size: int, group: dist.ProcessGroup, layout: str, backend: str) -> bool:
    """Compiled layers over several routings, so that shapes change under the compiler."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    ok = True
    for seed in range(3):
        problem = Problem(rank, group, layout, seed)
        ok &= agree(problem.step(), problem.step(partial(torch.compile, backend=backend)))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    # The experts and the sum after combine; aot_eager of torch 2.9 and before leaves code with .tolist() to Python.
    return ok and (graphs >= 2 or (backend == "aot_eager" and torch_release() < (2, 11)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiling_the_model_changes_no_bit(backend: str, layout: str) -> None:
    assert all(run_ranks(2, compiled_steps, layout, backend, timeout=120))


# Autocast ---------------------------------------------------------------------------------------------------------------


def autocast_step(rank: int, size: int, group: dist.ProcessGroup, layout: str) -> list[object]:
    """Dispatch and combine keep their payload's dtype under autocast, and a recomputed pass agrees with the first."""
    problem = Problem(rank, group, layout)
    with torch.autocast("cpu", torch.bfloat16):
        dtypes = []
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = problem.x.to(dtype).requires_grad_()
            out = dt.dispatch(x, problem.idx, problem.w, buffer=problem.layers[0].buffer, **problem.how)
            z = dt.combine(out.x, out.handle)
            (g,) = torch.autograd.grad(z.sum(), x)
            dtypes.append((out.x.dtype, out.topk_weights.dtype, z.dtype, g.dtype))
        first = problem.step()
        again = problem.step(WRAPS["checkpoint"])
    return [dtypes, agree(first, again), agree(first, problem.step())]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_autocast_casts_no_payload(layout: str) -> None:
    kinds = [(d, torch.float32, d, d) for d in (torch.float32, torch.bfloat16, torch.float16)]
    results = run_ranks(3, autocast_step, layout)
    assert [r[:2] for r in results] == [[kinds, True]] * 3
    assert not results[0][2]  # autocast did something


# Grad modes -------------------------------------------------------------------------------------------------------------


def without_grad(rank: int, size: int, group: dist.ProcessGroup, layout: str) -> list[bool]:
    problem = Problem(rank, group, layout)
    layer = problem.layers[0]
    x = problem.x.clone().requires_grad_()
    expected = layer(x, problem.idx, problem.w)
    checks = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            z = layer(x, problem.idx, problem.w)
        checks += [same_bits(z, expected), not z.requires_grad]
    # A routing found while evaluating serves a training step.
    with torch.inference_mode():
        handle = dt.dispatch(x, problem.idx, buffer=layer.buffer, **problem.how).handle
    fresh = dt.dispatch(x, problem.idx, buffer=layer.buffer, **problem.how).handle
    grads = []
    for h in (handle, fresh):
        z = dt.combine(dt.dispatch(x, buffer=layer.buffer, handle=h).x.sin(), h)
        grads += torch.autograd.grad((z**2).sum(), x)
    return [*checks, same_bits(*grads)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_grad_and_inference_mode(layout: str) -> None:
    assert run_ranks(3, without_grad, layout) == [[True] * 5] * 3


# Second derivatives -----------------------------------------------------------------------------------------------------


def second_derivative(rank: int, size: int, group: dist.ProcessGroup, layout: str, of: str) -> list[object]:
    """(whether first derivatives survive create_graph, the error of the second)."""
    problem = Problem(rank, group, layout)
    x, w = problem.x.clone().requires_grad_(), problem.w.clone().requires_grad_()
    buffer = problem.layers[0].buffer

    def loss() -> Tensor:
        out = dt.dispatch(x, problem.idx, w, buffer=buffer, **problem.how)
        if of == "dispatch":
            return (out.x**2).sum() + (out.topk_weights**2).sum()
        return (dt.combine(out.x.sin() * out.topk_weights.sum(), out.handle) ** 2).sum()

    plain = torch.autograd.grad(loss(), (x, w))
    grads = torch.autograd.grad(loss(), (x, w), create_graph=True)
    kept = all(map(same_bits, plain, grads))
    try:
        sum((g**2).sum() for g in grads).backward()
    except dt.DeepEPError as error:
        return [kept, str(error)]
    return [kept, None]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("of", ["dispatch", "combine"])
def test_second_derivatives_raise(of: str, layout: str) -> None:
    for kept, error in run_ranks(2, second_derivative, layout, of):
        assert kept
        assert "second derivatives" in error
