"""The low-latency kernels, bit for bit against a loop over experts; the ranks are processes."""

from __future__ import annotations

import random
from dataclasses import replace

import low_latency_masks as masks
import low_latency_ranks as ranks
import pytest
import torch
from low_latency_cases import KINDS, STYLES, Case
from shared import run_ranks

SIZES = (1, 2, 4, 8)


def cases_of(size: int, count: int, seed: int) -> list[Case]:
    """At random: numbers of tokens from 0 to the most, shapes, routings, kinds."""
    r = random.Random(seed)
    cases = []
    for i in range(count):
        most, local = r.choice((1, 7, 33, 128)), r.choice((1, 2, 5))
        tokens = tuple(r.choice((0, most, r.randint(0, most))) for _ in range(size))
        top_k = min(r.choice((1, 2, 3, 8, 16)), local * size)
        hidden = r.choice((128, 384, 1536)) if i % 4 != 3 else r.choice((512, 1024))
        cases.append(
            Case(
                tokens, most, hidden, local * size, top_k, r.choice(STYLES), KINDS[i % 4], r.random() < 0.5, r.random() < 0.5, i
            )
        )
    return cases


def none_wrong(results: list[list[str]]) -> None:
    errors = [error for result in results for error in result]
    assert not errors, f"{len(errors)} errors:\n" + "\n".join(errors[:8])


@pytest.mark.parametrize("size", SIZES)
def test_random_exchanges(size: int) -> None:
    none_wrong(run_ranks(size, ranks.round_trips, cases_of(size, 24, size), timeout=90))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_combines_in_slices(size: int) -> None:
    """From one slice to more than take turns; from no rows, and more than a warp has lanes, to one rank."""
    r = random.Random(size)
    cases = []
    for i in range(18):
        most = r.choice((5, 40, 128))
        tokens = tuple(r.choice((0, most, r.randint(0, most))) for _ in range(size))
        hidden, style = r.choice((512, 1024, 1536, 2048, 3584)), STYLES[(i + i // 6) % len(STYLES)]
        cases.append(Case(tokens, most, hidden, r.choice((1, 3, 8)) * size, r.choice((1, 2, 8)), style, KINDS[i % 4], seed=i))
    cases = [replace(case, top_k=min(case.top_k, case.num_experts)) for case in cases]
    # Of eight ranks with 16 blocks each, 56 rows for each copying warp of the first.
    cases.append(Case((128,) * size, 128, 2048, 8 * size, 8, "one rank", seed=18))
    none_wrong(run_ranks(size, ranks.in_slices, cases, timeout=90))


@pytest.mark.parametrize("size", [2, 4])
def test_logfmt_is_as_near_as_it_may_be(size: int) -> None:
    cases = [replace(case, logfmt=True, zero_copy=False) for case in cases_of(size, 12, 100 + size)]
    none_wrong(run_ranks(size, ranks.round_trips, cases, timeout=90))


@pytest.mark.parametrize("size", [2, 8])
def test_the_models_shapes(size: int) -> None:
    tokens = tuple(128 - r for r in range(size))
    large = [Case(tokens, 128, 7168, 256 // (8 // size), 8, kind=kind, hook=kind == "bf16") for kind in ("fp8", "bf16")]
    limits = [
        Case((3, 2) * (size // 2), 3, 16384, 1024, 16, kind="ue8m0"),
        Case((2,) * size, 2, 7168, 64, 9, "skewed", "round"),
    ]
    none_wrong(run_ranks(size, ranks.round_trips, large[: 1 if size == 2 else 2] + limits, timeout=90))


@pytest.mark.parametrize("size", [2, 4, 8])
def test_the_same_bits_every_time(size: int) -> None:
    case = Case(tuple(32 - r for r in range(size)), 32, 3072, 4 * size, 4, "skewed", "fp8")
    for seen, errors in run_ranks(size, ranks.soak, case, 1000, timeout=90):
        assert len(seen) == 1 and not errors, (len(seen), errors[:3])


@pytest.mark.parametrize("hook", [False, True])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_graphs(size: int, hook: bool) -> None:
    cases = [Case((16,) * size, 20, 2048, 2 * size, 2, style, "ue8m0", hook, seed=i) for i, style in enumerate(STYLES)]
    none_wrong(run_ranks(size, ranks.graphs, cases, timeout=90))


@pytest.mark.parametrize("size", [2, 4, 8])
def test_two_results_in_flight_and_late_hooks(size: int) -> None:
    for seed in range(6):
        cases = [Case((9,) * size, 9, 256, 2 * size, 2, STYLES[seed], kind, True, True, seed) for kind in ("fp8", "bf16")]
        none_wrong(run_ranks(size, ranks.overlapping, cases))


@pytest.mark.parametrize("size", [2, 8])
def test_a_mask_that_is_clean_may_be_cleaned(size: int) -> None:
    none_wrong(run_ranks(size, masks.masks_cleaned, Case((30,) * size, 30, 7168, 2 * size, 2, kind="bf16")))


@pytest.mark.parametrize("size", [2, 4, 8])
def test_a_rank_that_is_masked_and_comes_back(size: int) -> None:
    none_wrong(run_ranks(size, masks.left_out, Case((8,) * size, 8, 2560, 2 * size, 2), fresh=True, timeout=60))


@pytest.mark.parametrize("size", [3, 4])
def test_ranks_whose_masks_differ(size: int) -> None:
    none_wrong(run_ranks(size, masks.masked_apart, Case((8,) * size, 8, 2560, 2 * size, 2), fresh=True, timeout=60))


@pytest.mark.parametrize("size", [3, 4])
@pytest.mark.parametrize("in_slices", [True, False])
def test_a_rank_that_is_late_because_of_another(size: int, in_slices: bool) -> None:
    case = Case((8,) * size, 8, 2560, 2 * size, 2, kind="bf16")
    none_wrong(run_ranks(size, masks.late_for_another, case, in_slices, fresh=True, timeout=60))


@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_that_stops(size: int) -> None:
    none_wrong(run_ranks(size, masks.stopped, Case((8,) * size, 8, 2560, 2 * size, 2, kind="bf16"), fresh=True, timeout=60))


def test_the_layer_uses_them() -> None:
    for fast, normal, engine in run_ranks(4, ranks.layer):
        assert engine == "low_latency"
        torch.testing.assert_close(fast, normal, rtol=2**-5, atol=2**-7)


def test_a_late_rank_is_named() -> None:
    said = run_ranks(4, ranks.live, 2)[0].splitlines()
    assert len(said) == 2 and said[0].startswith("live, dispatch") and said[0].endswith("slow: rank 2"), said


def test_refusals() -> None:
    expected = (
        ("the result of the dispatch before the last is alive",),
        ("slots a later low_latency_dispatch has taken",),
        ("x has 8 tokens", "num_max_dispatch_tokens_per_rank=4"),
        ("multiple of 128, got 100",),
        ("hidden size up to 16384, got 16512",),
        ("top-k up to 16, got 17",),
        ("num_experts up to 1024, got 2050",),
        ("disagree on num_max_dispatch_tokens_per_rank", "6 on rank 0", "5 on rank 1"),
        ("async_finish",),
        ("handle must be",),
        ("get_next_low_latency_combine_buffer",),
        ("use_logfmt=True needs a copy",),
    )
    for rank, said in enumerate(run_ranks(2, ranks.refusals)):
        for text, parts in zip(said, expected, strict=False):
            assert all(part in text for part in parts), (text, parts)
        assert ("outside [-1, num_experts)" in said[len(expected)]) == (rank == 0)
        assert len(said) == len(expected) + 1, said[len(expected) :]
