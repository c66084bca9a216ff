"""Backward passes: against dense arithmetic in float64, to the bit against the reference, and with many of them in flight."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from draws import FLOATS, Exchange, exchanges, row_values, values
from harness import assert_same_bits, run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from in_place import check_writes
from reference import Given, Picture
from torch import Tensor

import deepep_train as dt

LAYOUTS = ("rank", "expert")
UNEVEN = Exchange((5, 0, 3), 4, 3, 2, "mixed", torch.float64)


def send(buffer: dt.Buffer, case: Exchange, x: Tensor, idx: Tensor, weights: Tensor | None) -> dt.Dispatched:
    return dt.dispatch(
        x, idx, weights, buffer=buffer, num_experts=case.num_experts, layout=case.layout, alignment=case.alignment
    )


# Dense arithmetic -------------------------------------------------------------------------------------------------------


@dataclass
class Problem:
    """z[t] = bias[t] + Σ_k weight[t, k] · tanh(x[t] @ A[expert] + 1), and the loss Σ z · c."""

    case: Exchange
    given: list[Given]
    matrices: Tensor  # [E, H, H]
    biases: list[Tensor]
    coefficients: list[Tensor]

    @staticmethod
    def of(case: Exchange) -> Problem:
        g = case.generator()

        def rows() -> list[Tensor]:
            return [torch.randn(n, case.hidden, generator=g, dtype=torch.float64) for n in case.tokens]

        given = [Given(x, old.topk_idx, old.topk_weights) for x, old in zip(rows(), case.given(), strict=True)]
        matrices = torch.randn(case.num_experts, case.hidden, case.hidden, generator=g, dtype=torch.float64)
        return Problem(case, given, matrices, rows(), rows())

    def dense(self) -> tuple[list[list[Tensor]], Tensor]:
        """Every rank's (z, gradients of x, weights and bias), and the gradient of the matrices."""
        matrices = self.matrices.clone().requires_grad_()
        leaves, losses, zs = [], [], []
        for mine, bias, c in zip(self.given, self.biases, self.coefficients, strict=True):
            x, w, b = (t.clone().requires_grad_() for t in (mine.x, mine.topk_weights, bias))
            rows = []
            for t, picks in enumerate(mine.topk_idx.tolist()):
                row = b[t]
                for k, expert in enumerate(picks):
                    if expert >= 0:
                        row = row + w[t, k] * torch.tanh(x[t] @ matrices[expert] + 1)
                rows.append(row)
            z = torch.stack(rows) if rows else x * 1
            losses.append((z * c).sum())
            zs.append(z.detach())
            leaves.append([x, w, b])
        torch.stack(losses).sum().backward()
        grads = [
            [z, *(torch.zeros_like(t) if t.grad is None else t.grad for t in of)] for z, of in zip(zs, leaves, strict=True)
        ]
        return grads, torch.zeros_like(matrices) if matrices.grad is None else matrices.grad


def experts(out: dt.Dispatched, matrices: Tensor) -> Tensor:
    """The local experts' weighted outputs, in the layout of `out`; padding rows become tanh(1), which must not count."""
    if out.topk_idx is None:
        parts = [
            torch.tanh(rows @ m + 1) for rows, m in zip(out.x.split(out.tokens_per_expert.tolist()), matrices, strict=True)
        ]
        return torch.cat(parts) * out.topk_weights.unsqueeze(1)
    total = torch.zeros_like(out.x)
    for expert, m in enumerate(matrices):
        weight = (out.topk_weights.double() * (out.topk_idx == expert)).sum(1, keepdim=True)
        total = total + weight * torch.tanh(out.x @ m + 1)
    return total


def solve(rank: int, size: int, group: dist.ProcessGroup, problem: Problem, local: int | None = None) -> list[Tensor]:
    buffer = dt.Buffer(group, timeout=20, num_local_ranks=local)
    mine = problem.given[rank]
    share = problem.case.num_local_experts
    x, w, b = (t.clone().requires_grad_() for t in (mine.x, mine.topk_weights, problem.biases[rank]))
    matrices = problem.matrices[rank * share : (rank + 1) * share].clone().requires_grad_()
    out = send(buffer, problem.case, x, mine.topk_idx, w)
    z = dt.combine(experts(out, matrices), out.handle, bias=b)
    (z * problem.coefficients[rank]).sum().backward()
    return [z.detach(), x.grad, w.grad, b.grad, matrices.grad]


@pytest.mark.parametrize("size,local", [(2, None), (3, None), (4, 2)])
@settings(max_examples=25)
@given(data=st.data())
def test_gradients_agree_with_dense_arithmetic(size: int, local: int | None, data: st.DataObject) -> None:
    case = replace(data.draw(exchanges(size, (torch.float64,))), strided=False)
    problem = Problem.of(replace(case, hidden=min(case.hidden, 8)))
    dense, matrices = problem.dense()
    for rank, got in enumerate(run_ranks(size, solve, problem, local)):
        share = problem.case.num_local_experts
        expected = [*dense[rank], matrices[rank * share : (rank + 1) * share]]
        names = ("z", "gradient of x", "gradient of the weights", "gradient of the bias", "gradient of the experts")
        for name, a, b in zip(names, got, expected, strict=True):
            # Router weights, and so their gradients, are float32.
            tolerance = 1e-5 if a.dtype == torch.float32 else 1e-9
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=f"{name}, rank {rank}:\n{a}\n{b}")


# To the bit -------------------------------------------------------------------------------------------------------------


def backward_with(
    rank: int,
    size: int,
    group: dist.ProcessGroup,
    case: Exchange,
    given: list[Given],
    gx: list,
    gw: list,
    gz: list,
    local: int | None,
) -> list[Tensor]:
    """The gradients of x and of the weights for gradients of what arrived, and of y for a gradient of z."""
    buffer = dt.Buffer(group, timeout=20, num_local_ranks=local)
    x, w = given[rank].x.clone().requires_grad_(), given[rank].topk_weights.clone().requires_grad_()
    out = send(buffer, case, x, given[rank].topk_idx, w)
    torch.autograd.backward([out.x, out.topk_weights], [gx[rank], gw[rank]])
    y = torch.zeros(out.x.shape, dtype=case.dtype, requires_grad=True)
    dt.combine(y, out.handle).backward(gz[rank])
    return [x.grad, w.grad, y.grad]


def _masked(w: Tensor, idx: Tensor | None) -> Tensor:
    return w if idx is None else torch.where(idx < 0, 0.0, w)


@pytest.mark.parametrize("size,local", [(3, None), (4, 2)])
@settings(max_examples=30)
@given(data=st.data())
def test_each_backward_is_the_other_forward(size: int, local: int | None, data: st.DataObject) -> None:
    """… in the payload's dtype. The recv weights of experts that live elsewhere are constants and get no gradient."""
    case, per_node = replace(data.draw(exchanges(size)), strided=False), local or 1
    given, g = case.given(), case.generator()
    picture = Picture(given, case.num_experts)
    arrived = [picture.arrive(r, case.layout, case.alignment) for r in range(size)]
    origins = [a.rows for a in arrived]
    gx = row_values(g, origins, case.hidden, case.dtype)
    gw = [torch.randn(a.topk_weights.shape, generator=g) for a in arrived]
    gz = [values(g, n, case.hidden, case.dtype) for n in case.tokens]
    masked = [_masked(w, a.topk_idx) for w, a in zip(gw, arrived, strict=True)]
    results = run_ranks(size, backward_with, case, given, gx, gw, gz, local)
    for rank, (x_grad, w_grad, y_grad) in enumerate(results):
        assert_same_bits(x_grad, picture.combine(rank, gx, origins, (), per_node), "gradient of x")
        assert_same_bits(w_grad, picture.combine_weights(rank, masked, origins, per_node), "gradient of the weights")
        assert_same_bits(y_grad, picture.gather(origins[rank], gz), "gradient of y")


# Which gradients exist --------------------------------------------------------------------------------------------------


def partial_uses(rank: int, size: int, group: dist.ProcessGroup, case: Exchange, given: list[Given]) -> dict[str, list]:
    """Gradients of (x, weights) when some need none, or when some outputs are not used."""
    buffer = dt.Buffer(group, timeout=20)
    idx = given[rank].topk_idx

    def grads(x_needs: bool, w_needs: bool, use_x: bool, use_w: bool) -> list[Tensor | None]:
        x, w = given[rank].x.clone().requires_grad_(x_needs), given[rank].topk_weights.clone().requires_grad_(w_needs)
        out = send(buffer, case, x, idx, w)
        loss = (out.x.sum() if use_x else 0.0) + (out.topk_weights.sum() if use_w else 0.0)
        loss.backward()
        return [x.grad, w.grad]

    results = {
        "both": grads(True, True, True, True),
        "x is constant": grads(False, True, True, True),
        "weights are constant": grads(True, False, True, True),
        "x is unused": grads(True, True, False, True),
        "weights are unused": grads(True, True, True, False),
    }
    x = given[rank].x.clone().requires_grad_()
    out = send(buffer, case, x, idx, None)
    out.x.sum().backward()
    results["no weights"] = [x.grad, None]
    y = torch.ones(out.x.shape, dtype=x.dtype)
    b = torch.zeros(idx.size(0), y.size(1), dtype=x.dtype, requires_grad=True)
    dt.combine(y, out.handle, bias=(torch.zeros_like(b), b)).sum().backward()
    results["bias only"] = [b.grad, y.grad]
    constant = send(buffer, case, given[rank].x, idx, given[rank].topk_weights)
    results["requires grad"] = [constant.x.requires_grad, dt.combine(constant.x, constant.handle).requires_grad]
    return results


@pytest.mark.parametrize("layout", LAYOUTS)
def test_constant_inputs_and_unused_outputs(layout: str) -> None:
    case = replace(UNEVEN, layout=layout, alignment=4, style="holes")
    given = case.given()
    routed = [(g.topk_idx >= 0).float() for g in given]
    picture = Picture(given, case.num_experts)
    arrived = [picture.arrive(r, layout, 4) for r in range(3)]
    ones = [torch.ones(len(a.rows), case.hidden, dtype=case.dtype) for a in arrived]
    for rank, got in enumerate(run_ranks(3, partial_uses, case, given)):
        x_grad = picture.combine(rank, ones, [a.rows for a in arrived])
        zeros = (torch.zeros_like(x_grad), torch.zeros_like(routed[rank]))
        expected = {
            "both": (x_grad, routed[rank]),
            "x is constant": (None, routed[rank]),
            "weights are constant": (x_grad, None),
            "x is unused": (zeros[0], routed[rank]),
            "weights are unused": (x_grad, zeros[1]),
            "no weights": (x_grad, None),
            "bias only": (torch.ones_like(x_grad), None),
        }
        for name, pair in expected.items():
            for a, b in zip(got[name], pair, strict=True):
                assert_same_bits(a, b, f"{name}, rank {rank}")
        assert got["requires grad"] == [False, False]


def gradient_kinds(rank: int, size: int, group: dist.ProcessGroup, case: Exchange) -> list[tuple[torch.dtype, bool]]:
    buffer = dt.Buffer(group, timeout=20)
    given = case.given()[rank]
    x, w = given.x.clone().requires_grad_(), given.topk_weights.clone().requires_grad_()
    out = send(buffer, case, x, given.topk_idx, w)
    z = dt.combine(out.x, out.handle)
    z.sum().backward()  # a gradient expanded from one number, without strides
    return [(t.dtype, t.grad.dtype == t.dtype) for t in (x, w)] + [(z.dtype, out.x.dtype == z.dtype)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_have_the_dtype_of_their_tensor(dtype: torch.dtype) -> None:
    for layout in LAYOUTS:
        for kinds in run_ranks(2, gradient_kinds, Exchange((3, 2), 8, 2, 2, "uniform", dtype, layout)):
            assert kinds == [(dtype, True), (torch.float32, True), (dtype, True)]


def edited(rank: int, size: int, group: dist.ProcessGroup, case: Exchange, given: list[Given]) -> None:
    mine = given[rank]
    w = mine.topk_weights.clone().requires_grad_()
    out = send(dt.Buffer(group, timeout=20), case, mine.x, mine.topk_idx, w)
    assert out.topk_idx is not None
    assert out.topk_weights is not None
    out.topk_idx.masked_fill_(out.topk_idx < 0, case.num_experts)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (dt.combine(out.x, out.handle).sum() + out.topk_weights.sum()).backward()


def test_received_indices_that_were_written_to_are_noticed() -> None:
    """Gradients of the weights depend on them."""
    run_ranks(2, edited, case := replace(UNEVEN, tokens=(5, 3)), case.given())


def written_to(rank: int, size: int, group: dist.ProcessGroup, case: Exchange, given: list[Given]) -> None:
    mine = given[rank]
    check_writes(dt.Buffer(group, timeout=20), mine.x, mine.topk_idx, mine.topk_weights, case.num_experts)


def test_results_may_be_written_to() -> None:
    run_ranks(2, written_to, case := replace(UNEVEN, tokens=(5, 3)), case.given())
