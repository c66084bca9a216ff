"""The nvlink engine, bit for bit against the picture of all ranks at once; the ranks are processes."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import shared
import torch
from draws import STYLES, Exchange, row_values, spread, values
from harness import assert_same_bits
from reference import Picture, Rows
from shared import run_ranks

SIZES = (1, 2, 3, 4, 8)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def same_rows(got: Rows, expected: Rows, what: str) -> None:
    assert isinstance(got, tuple) == isinstance(expected, tuple), what
    for a, b in zip(*(v if isinstance(v, tuple) else (v,) for v in (got, expected)), strict=True):
        assert_same_bits(a, b, what)


def check(
    cases: list[Exchange],
    num_biases: int = 0,
    spare: int | None = None,
    fresh: bool = False,
    engine: str = "nvlink",
    num_local_ranks: int | None = None,
) -> None:
    """`spare`: extra rows of num_worst_tokens; None: let the CPU wait for the counts. `num_local_ranks`: sums are by node."""
    given, ys, biases, worst, arrived, pictures = [], [], [], [], [], []
    for case in cases:
        picture = Picture(case.given(), case.num_experts)
        needed = [len(picture.arrive(r, case.layout, case.alignment).rows) for r in range(case.size)]
        bound = [0 if spare is None else max(1, n + spare) for n in needed]
        rows = [picture.arrive(r, case.layout, case.alignment, bound[r]) for r in range(case.size)]
        g, dtype = case.generator(), torch.bfloat16 if case.dtype.itemsize == 1 else case.dtype
        y = row_values(g, [a.rows for a in rows], case.hidden, dtype)
        b = [tuple(values(g, n, case.hidden, dtype) for _ in range(num_biases)) for n in case.tokens]
        given.append(picture.given)
        ys.append([spread(t) for t in y] if case.strided else y)
        biases.append(b)
        worst.append(bound)
        arrived.append(rows)
        pictures.append(picture)
    passed = [[None if not b else b[0] if len(b) == 1 else b for b in one] for one in biases]
    how = (engine, num_local_ranks)
    results = run_ranks(cases[0].size, shared.exchange, cases, given, ys, passed, worst, *how, timeout=240, fresh=fresh)
    for rank, got_all in enumerate(results):
        for i, (case, got) in enumerate(zip(cases, got_all, strict=True)):
            what = f"on rank {rank}, {case}"
            expected = arrived[i][rank]
            same_rows(got.x, expected.x, f"x {what}")
            assert_same_bits(got.topk_idx, expected.topk_idx, f"topk_idx {what}")
            assert_same_bits(got.topk_weights, expected.topk_weights, f"topk_weights {what}")
            assert got.tokens_per_expert == expected.tokens_per_expert, what
            same_rows(got.again, expected.x, f"again {what}")
            z = pictures[i].combine(rank, ys[i], [a.rows for a in arrived[i]], biases[i][rank], num_local_ranks or 1)
            assert_same_bits(got.z, z, f"z {what}")
            assert_same_bits(got.z_visible, z, f"z from visible rows {what}")


def some_tokens(size: int, seed: int) -> tuple[int, ...]:
    g = torch.Generator().manual_seed(seed)
    return tuple(int(torch.randint(0, (9, 40, 3)[seed % 3], (), generator=g)) for _ in range(size))


@pytest.mark.parametrize("layout", ["rank", "expert"])
@pytest.mark.parametrize("size", SIZES)
def test_random_exchanges(size: int, layout: str) -> None:
    shapes = itertools.product(STYLES, (8, 1032))
    cases = [
        Exchange(
            some_tokens(size, seed), hidden, 1 + seed % 9, 1 + seed % 5, style, DTYPES[seed % 3], layout, (1, 4, 16)[seed % 3],
            strided=seed % 4 == 3, seed=seed,
        )
        for seed, (style, hidden) in enumerate(shapes)
    ]  # fmt: skip
    check(cases, num_biases=size % 3)


@pytest.mark.parametrize("layout", ["rank", "expert"])
def test_fp8_pairs(layout: str) -> None:
    base = Exchange((17, 0, 30), 1024, 4, 3, "mixed", torch.float8_e4m3fn, layout, 8, torch.float32)
    kinds = itertools.product((torch.float8_e4m3fn, torch.uint8), (torch.float32, torch.int32), (False, True))
    check([replace(base, dtype=d, scales=s, strided=t, seed=i) for i, (d, s, t) in enumerate(kinds)])


@pytest.mark.parametrize("layout", ["rank", "expert"])
@pytest.mark.parametrize("spare", [0, 7])
def test_num_worst_tokens(spare: int, layout: str) -> None:
    base = Exchange((9, 0, 21), 64, 4, 3, "mixed", torch.bfloat16, layout, 4)
    fp8 = replace(base, dtype=torch.float8_e4m3fn, scales=torch.float32, hidden=256)
    check([replace(base, seed=s, style=style) for s, style in enumerate(STYLES)] + [fp8], spare=spare)


@pytest.mark.parametrize("hidden", [8, 16384])
@pytest.mark.parametrize("layout", ["rank", "expert"])
def test_smallest_and_largest_rows(hidden: int, layout: str) -> None:
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    check([Exchange((5, 12), hidden, 3, 4, "uniform", dtype, layout, 4) for dtype in dtypes])


@pytest.mark.parametrize("top_k", [1, 8, 11, 32])
def test_any_top_k(top_k: int) -> None:
    check([Exchange((33, 20), 32, top_k, 40, "distinct", torch.bfloat16, layout, 16) for layout in ("rank", "expert")])


def test_many_experts() -> None:
    check([Exchange((300, 100), 16, 8, 2048, "distinct", torch.bfloat16, layout, 2) for layout in ("rank", "expert")])


def test_no_tokens_anywhere() -> None:
    check([Exchange((0, 0, 0), 8, 2, 2, "uniform", torch.bfloat16, layout, 4) for layout in ("rank", "expert")], num_biases=1)
