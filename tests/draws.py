"""Random exchanges, as hypothesis draws them: who holds how many tokens, who they go to, what they carry."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from reference import Given, Row, Rows
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8)
SCALES = (torch.float32, torch.int32, torch.uint8)
STYLES = ("uniform", "distinct", "holes", "twins", "one rank", "nowhere", "mixed")


@dataclass(frozen=True)
class Exchange:
    """One dispatch and combine of a group; everything else follows from the seed."""

    tokens: tuple[int, ...]  # per rank
    hidden: int
    top_k: int
    num_local_experts: int
    style: str
    dtype: torch.dtype
    layout: str = "rank"
    alignment: int = 1
    scales: torch.dtype | None = None  # for FP8
    strided: bool = False
    seed: int = 0

    @property
    def size(self) -> int:
        return len(self.tokens)

    @property
    def num_experts(self) -> int:
        return self.num_local_experts * self.size

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def given(self) -> list[Given]:
        """Every rank's arguments. Payloads are random bits, NaNs and denormals included: dispatch only moves them."""
        g = self.generator()
        result = []
        for rank, tokens in enumerate(self.tokens):
            x: Rows = random_bits(g, tokens, self.hidden, self.dtype, self.strided)
            if self.scales is not None:
                x = (x, random_bits(g, tokens, math.ceil(self.hidden / 128), self.scales, self.strided))
            idx = routing(g, self, rank)
            weights = torch.rand(tokens, self.top_k, generator=g)
            if self.strided:
                idx, weights = spread(idx), weights.t().contiguous().t()
            result.append(Given(x, idx, weights))
        return result


def random_bits(g: torch.Generator, rows: int, columns: int, dtype: torch.dtype, strided: bool = False) -> Tensor:
    raw = torch.randint(0, 256, (rows, columns * dtype.itemsize), dtype=torch.uint8, generator=g)
    t = raw.view(dtype)
    if not strided:
        return t
    # Column-major, as DeepGEMM wants scales, or every other column of something wider.
    return t.t().contiguous().t() if columns % 2 else spread(t)


def spread(t: Tensor) -> Tensor:
    """The same values with holes between them in memory."""
    wide = t.new_zeros(t.size(0), t.size(1), 2)
    wide[..., 0] = t
    return wide[..., 0]


def values(g: torch.Generator, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Finite numbers whose sums show their order in the bits: large ones that cancel swallow small ones; some are -0.0."""
    large, small = {torch.float64: (2.0**60, 1.0), torch.float16: (2.0**11, 2.0**-13)}.get(dtype, (2.0**30, 1.0))
    t = (
        torch.randn(rows, columns, generator=g, dtype=torch.float64)
        * small
        * 10.0 ** torch.randint(-1, 2, (rows, 1), generator=g)
    )
    kind = torch.rand(rows, columns, generator=g)
    t = torch.where(kind < 0.4, t.sign() * large, t)
    return torch.where(kind > 0.9, -0.0, t).to(dtype)


def row_values(g: torch.Generator, origins: list[list[Row | None]], hidden: int, dtype: torch.dtype) -> list[Tensor]:
    """What every rank passes to combine: a value for each of its rows, padding included, where it must not count."""
    return [values(g, len(rows), hidden, dtype) for rows in origins]


def routing(g: torch.Generator, exchange: Exchange, rank: int) -> Tensor:
    tokens, top_k, num_experts = exchange.tokens[rank], exchange.top_k, exchange.num_experts
    rows = [_picks(g, exchange.style, top_k, num_experts, exchange.num_local_experts) for _ in range(tokens)]
    return torch.tensor(rows, dtype=torch.int64).view(tokens, top_k)


def _picks(g: torch.Generator, style: str, top_k: int, num_experts: int, num_local: int) -> list[int]:
    def below(n: int) -> int:
        return int(torch.randint(0, n, (), generator=g))

    if style == "mixed":
        style = STYLES[below(len(STYLES) - 1)]
    if style == "nowhere":
        return [-1] * top_k
    if style == "distinct":
        order = torch.randperm(num_experts, generator=g).tolist()
        return (order + [-1] * top_k)[:top_k]
    if style == "holes":
        return [below(num_experts) if below(2) else -1 for _ in range(top_k)]
    if style == "twins":
        return [below(num_experts)] * top_k
    if style == "one rank":
        return [num_experts - 1 - below(num_local) for _ in range(top_k)]
    return [below(num_experts) for _ in range(top_k)]


@st.composite
def exchanges(draw: st.DrawFn, size: int, dtypes: tuple[torch.dtype, ...] = FLOATS) -> Exchange:
    dtype = draw(st.sampled_from(dtypes))
    return Exchange(
        tokens=tuple(draw(st.lists(st.integers(0, 7), min_size=size, max_size=size))),
        hidden=draw(st.sampled_from([1, 2, 3, 8, 129])),
        top_k=draw(st.integers(1, 9)),
        num_local_experts=draw(st.integers(1, 4)),
        style=draw(st.sampled_from(STYLES)),
        dtype=dtype,
        layout=draw(st.sampled_from(["rank", "expert"])),
        alignment=draw(st.sampled_from([1, 2, 5, 16])),
        scales=draw(st.sampled_from(SCALES)) if dtype in FP8 else None,
        strided=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )
