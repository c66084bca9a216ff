"""One exchange on every rank, compared bit for bit with the picture of all ranks at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from draws import Exchange, row_values, spread, values
from harness import assert_same_bits, run_ranks
from reference import Arrived, Given, Picture, Rows
from torch import Tensor

import deepep_train as dt


@dataclass(frozen=True)
class Got:
    """What one rank's calls returned."""

    x: Rows
    topk_idx: Tensor | None
    topk_weights: Tensor | None
    tokens_per_expert: Tensor
    z: Tensor
    again: Rows
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Mesh:
    """What a Buffer is told of nodes; `sums_of` ranks are added up before their sum crosses the network."""

    num_local_ranks: int | None = None
    two_level: bool | None = None
    sums_of: int = 1

    def buffer(self, group: dist.ProcessGroup) -> dt.Buffer:
        return dt.Buffer(group, timeout=20, num_local_ranks=self.num_local_ranks, two_level=self.two_level)


ONE_NODE = Mesh()


def exchange(
    rank: int,
    size: int,
    group: dist.ProcessGroup,
    case: Exchange,
    given: list[Given],
    ys: list[Tensor],
    biases: list,
    mesh: Mesh = ONE_NODE,
) -> Got:
    return exchange_twice(mesh.buffer(group), case, given[rank], ys[rank], biases[rank])


def exchange_twice(buffer: dt.Buffer, case: Exchange, mine: Given, y: Tensor, bias: Any) -> Got:
    """Dispatch, combine and dispatch again along the handle, all of it twice with the same bits."""

    def once() -> Got:
        how = {"num_experts": case.num_experts, "layout": case.layout, "alignment": case.alignment}
        out = dt.dispatch(mine.x, mine.topk_idx, mine.topk_weights, buffer=buffer, **how)
        z = dt.combine(y, out.handle, bias=bias)
        again = dt.dispatch(mine.x, buffer=buffer, handle=out.handle)
        assert again.topk_idx is None
        assert again.topk_weights is None
        return Got(out.x, out.topk_idx, out.topk_weights, out.tokens_per_expert, z, again.x)

    first, second = once(), once()
    same_rows(first.x, second.x)
    same_rows(first.again, second.again)
    assert_same_bits(first.z, second.z)
    assert_same_bits(first.topk_weights, second.topk_weights)
    return first


def same_rows(got: Rows, expected: Rows, what: str = "rows") -> None:
    assert isinstance(got, tuple) == isinstance(expected, tuple), what
    for a, b in zip(*(v if isinstance(v, tuple) else (v,) for v in (got, expected)), strict=True):
        assert_same_bits(a, b, what)
        assert a.is_contiguous(), what


def check_arrived(got: Got, expected: Arrived, rank: int) -> None:
    same_rows(got.x, expected.x, f"x on rank {rank}")
    assert_same_bits(got.topk_idx, expected.topk_idx, f"topk_idx on rank {rank}")
    assert_same_bits(got.topk_weights, expected.topk_weights, f"topk_weights on rank {rank}")
    assert got.tokens_per_expert.dtype == torch.int64
    assert got.tokens_per_expert.device.type == "cpu"
    assert got.tokens_per_expert.tolist() == expected.tokens_per_expert


@dataclass(frozen=True)
class Drawn:
    """What all ranks give in one exchange, and what they must get."""

    given: list[Given]
    picture: Picture
    arrived: list[Arrived]
    ys: list[Tensor]
    biases: list[tuple[Tensor, ...]]

    @classmethod
    def of(cls, case: Exchange, num_biases: int = 0, dtype: torch.dtype | None = None) -> Drawn:
        """The combine is in `dtype` if the payload is FP8."""
        given, g = case.given(), case.generator()
        picture = Picture(given, case.num_experts)
        arrived = [picture.arrive(r, case.layout, case.alignment) for r in range(case.size)]
        dtype = dtype or case.dtype
        ys = row_values(g, [a.rows for a in arrived], case.hidden, dtype)
        biases = [tuple(values(g, n, case.hidden, dtype) for _ in range(num_biases)) for n in case.tokens]
        if case.strided:
            ys, biases = [spread(y) for y in ys], [tuple(map(spread, b)) for b in biases]
        return cls(given, picture, arrived, ys, biases)

    def bias(self, rank: int) -> Any:
        """As combine takes it."""
        b = self.biases[rank]
        return None if not b else b[0] if len(b) == 1 else b

    def check(self, got: Got, rank: int, sums_of: int) -> None:
        check_arrived(got, self.arrived[rank], rank)
        same_rows(got.again, self.arrived[rank].x, "rows dispatched again")
        z = self.picture.combine(rank, self.ys, [a.rows for a in self.arrived], self.biases[rank], sums_of)
        assert_same_bits(got.z, z, f"z on rank {rank}")


def check(case: Exchange, num_biases: int = 0, dtype: torch.dtype | None = None, mesh: Mesh = ONE_NODE) -> None:
    """One exchange on every rank against the reference."""
    drawn = Drawn.of(case, num_biases, dtype)
    biases = [drawn.bias(rank) for rank in range(case.size)]
    for rank, got in enumerate(run_ranks(case.size, exchange, case, drawn.given, drawn.ys, biases, mesh)):
        drawn.check(got, rank, mesh.sums_of)


def exchange_worst(
    rank: int,
    size: int,
    group: dist.ProcessGroup,
    case: Exchange,
    given: list[Given],
    worst: list[int],
    ys: list[Tensor],
    mesh: Mesh,
) -> Got:
    mine = given[rank]
    buffer = mesh.buffer(group)
    how = {"num_experts": case.num_experts, "layout": case.layout, "alignment": case.alignment}
    out = dt.dispatch(mine.x, mine.topk_idx, mine.topk_weights, buffer=buffer, num_worst_tokens=worst[rank], **how)
    z = dt.combine(ys[rank], out.handle)
    again = dt.dispatch(mine.x, buffer=buffer, handle=out.handle)
    return Got(out.x, out.topk_idx, out.topk_weights, out.tokens_per_expert, z, again.x)


def check_worst(case: Exchange, spare: int, mesh: Mesh = ONE_NODE) -> None:
    """The same with `num_worst_tokens`, `spare` rows more than are needed."""
    given = case.given()
    picture = Picture(given, case.num_experts)
    needed = [len(picture.arrive(r, case.layout, case.alignment).rows) for r in range(case.size)]
    worst = [max(1, n + spare) for n in needed]
    arrived = [picture.arrive(r, case.layout, case.alignment, worst[r]) for r in range(case.size)]
    origins = [a.rows for a in arrived]
    ys = row_values(case.generator(), origins, 5, torch.bfloat16)
    for rank, got in enumerate(run_ranks(case.size, exchange_worst, case, given, worst, ys, mesh)):
        check_arrived(got, arrived[rank], rank)
        same_rows(got.again, arrived[rank].x)
        assert_same_bits(got.z, picture.combine(rank, ys, origins, (), mesh.sums_of), f"z on rank {rank}")
