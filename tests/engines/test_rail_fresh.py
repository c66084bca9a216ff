"""Fresh dispatches of the rdma engine, num_worst_tokens and not, on CPUs: tests/rail_on_cpu.py says what of it is real."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist
from draws import Exchange
from harness import assert_same_bits, run_ranks
from rail_requests import NEEDS_KERNELS, request_of
from reference import Given, Picture
from torch import Tensor

import deepep_train as dt
from deepep_train.engines.base import CombineRequest, Payload, Prepared, Received
from deepep_train.engines.collective import CollectiveEngine
from deepep_train.engines.rail_rows import words_bytes

pytestmark = NEEDS_KERNELS
MESHES = pytest.mark.parametrize("mesh", [(4, 2), (4, 1), (6, 3), (6, 2)], ids=str)
TOKENS = (7, 0, 70, 11, 3, 8)


def combine_of(got: Received, case: Exchange) -> CombineRequest:
    """Of rows that differ from each other in all their bits."""
    g = torch.Generator().manual_seed(5)
    rows = torch.randn(got.payload.data.size(0), case.hidden, generator=g).to(case.dtype)
    return CombineRequest(rows, got.plan)


def exchange(
    rank: int,
    size: int,
    group: dist.ProcessGroup,
    library: str,
    local: int,
    cases: list[Exchange],
    given: Any,
    worst: Any,
    most_stages: int,
) -> list[Any]:
    from rail_on_cpu import engine_on_cpu

    engine = engine_on_cpu(group, local, library, 64 << 10, most_stages)
    collective = CollectiveEngine(group, 20, local, True, 9)
    found = []
    for case, all_given, bound in zip(cases, given, worst, strict=True):
        mine = all_given[rank]
        got = engine.dispatch(Prepared(lambda m=mine, b=bound, c=case: request_of(c, m, b[rank])))
        layout = collective.layout(mine.topk_idx, case.num_experts)
        others = request_of(case, mine, bound[rank], layout=layout)
        theirs = collective.dispatch(Prepared(lambda r=others: r))
        again = engine._move(request_of(case, mine), got.plan).data
        n, f = theirs.tensors[7].size(0), theirs.tensors[9].size(0)
        for i, (a, b) in enumerate(zip(got.tensors, theirs.tensors, strict=True)):
            assert a.dtype == b.dtype, i
            cut = {7: n, 9: f}.get(i, a.size(0))
            assert torch.equal(a[:cut], b), i
            assert a.shape[1:] == b.shape[1:]
            assert (a[cut:] == {7: 0}.get(i, -1)).all(), "room that is not used"
        assert got.plan.num_rows == theirs.plan.num_rows
        sums = [e.combine(Prepared(lambda g=g, c=case: combine_of(g, c)))[0] for e, g in ((engine, got), (collective, theirs))]
        assert_same_bits(*sums)
        found.append((got.payload.data, got.topk_idx, got.topk_weights, got.plan.tokens_per_expert.tolist(), again))
    return found


@MESHES
@pytest.mark.parametrize("layout", ["rank", "expert"])
@pytest.mark.parametrize(("spare", "most_stages"), [(None, 1), (0, 9), (9, 2)])
def test_every_row_and_what_is_beside_it(
    mesh: tuple[int, int], layout: str, spare: int | None, most_stages: int, library: str
) -> None:
    """Bit for bit the picture's, and the handle's tensors and the combine's sums those of the collective engine."""
    size, local = mesh
    cases = [
        Exchange(TOKENS[:size], hidden, top_k, 3, style, dtype, layout, alignment, seed=seed)
        for seed, (hidden, top_k, style, dtype, alignment) in enumerate(
            [(8, 2, "uniform", torch.float32, 1), (5, 4, "mixed", torch.bfloat16, 4), (16, 1, "mixed", torch.float16, 3)]
        )
    ]
    pictures = [Picture(case.given(), case.num_experts) for case in cases]
    worst = []
    for case, picture in zip(cases, pictures, strict=True):
        needed = [len(picture.arrive(r, layout, case.alignment).rows) for r in range(size)]
        worst.append([0 if spare is None else max(1, n + spare) for n in needed])
    got = run_ranks(size, exchange, library, local, cases, [p.given for p in pictures], worst, most_stages, timeout=150)
    for rank, results in enumerate(got):
        for case, picture, bound, (x, idx, weights, counts, again) in zip(cases, pictures, worst, results, strict=True):
            expected = picture.arrive(rank, layout, case.alignment, bound[rank])
            assert_same_bits(x, expected.x)
            assert_same_bits(again, expected.x)
            assert_same_bits(idx, expected.topk_idx)
            assert_same_bits(weights, expected.topk_weights)
            assert counts == expected.tokens_per_expert


def grows(
    rank: int, size: int, group: dist.ProcessGroup, library: str, local: int, cases: list[Exchange], given: Any, stages: int
) -> list[Tensor]:
    """Of segments in which only the first and the last dispatch fit; the others' rows cross once there is room. Rows of 255
    numbers are padded."""
    from rail_on_cpu import engine_on_cpu

    engine, found, stayed = engine_on_cpu(group, local, library, 20 << 10, stages), [], []
    for case, mine in zip(cases, given, strict=True):
        found.append(engine.dispatch(Prepared(lambda m=mine, c=case: request_of(c, m[rank]))).payload.data)
        stayed.append(engine.rails.stayed)  # type: ignore[attr-defined]
    assert stayed == ([0] * 4 if stages > 1 else [0, 1, 2, 2])
    return found


@pytest.mark.parametrize(("mesh", "stages"), [((4, 2), 1), ((6, 2), 1), ((6, 2), 2)], ids=str)
def test_rows_for_which_there_is_no_room_yet(mesh: tuple[int, int], stages: int, library: str) -> None:
    size, local = mesh
    cases = [
        Exchange(tuple(factor * n for n in TOKENS[:size]), 255, 2, 3, "uniform", torch.float32, layout, seed=seed)
        for seed, (factor, layout) in enumerate([(0, "rank"), (2, "rank"), (6, "expert"), (1, "rank")])
    ]
    pictures = [Picture(case.given(), case.num_experts) for case in cases]
    got = run_ranks(size, grows, library, local, cases, [p.given for p in pictures], stages, timeout=100)
    for rank, results in enumerate(got):
        for case, picture, x in zip(cases, pictures, results, strict=True):
            assert_same_bits(x, picture.arrive(rank, case.layout, 1).x)


def just_fits(
    rank: int, size: int, group: dist.ProcessGroup, library: str, case: Exchange, given: list[Given], room: int
) -> tuple[Tensor, int]:
    """Scales travel, too; and how many exchanges did not take place."""
    from rail_on_cpu import engine_on_cpu

    engine, mine = engine_on_cpu(group, 2, library, room), given[rank]
    payload = Payload(mine.x, torch.ones(mine.x.size(0), 4))
    got = engine.dispatch(Prepared(lambda: request_of(case, mine, payload=payload))).payload
    assert got.scales is not None and bool((got.scales == 1).all())
    return got.data, engine.rails.stayed  # type: ignore[attr-defined]


@pytest.mark.parametrize("missing", [0, 1])
def test_rows_cross_behind_the_counts_if_they_just_fit(missing: int, library: str) -> None:
    case = Exchange((70, 30, 7, 11), 512, 2, 3, "uniform", torch.float32)
    given = case.given()
    picture = Picture(given, case.num_experts)
    most = max(n for r in range(4) for n in picture.num_tokens_per_node(r, 2))
    room = most * (2048 + 16 + words_bytes(2, True, 2)) - missing
    for rank, (rows, stayed) in enumerate(run_ranks(4, just_fits, library, case, given, room)):
        assert_same_bits(rows, picture.arrive(rank, "rank", 1).x)
        assert stayed == missing


def in_threads(
    rank: int, size: int, group: dist.ProcessGroup, library: str, case: Exchange, given: list[Given]
) -> list[Tensor]:
    """Two threads' dispatches, the same, so that it does not matter whose is whose on other ranks; the first makes room."""
    from rail_on_cpu import engine_on_cpu

    engine, found = engine_on_cpu(group, 2, library, 20 << 10), []

    def call() -> None:
        for _ in range(3):
            found.append(engine.dispatch(Prepared(lambda: request_of(case, given[rank]))).payload.data)

    threads = [threading.Thread(target=call, daemon=True) for _ in range(2)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(60)
    return found


def test_no_other_threads_exchange_comes_between(library: str) -> None:
    case = Exchange((70, 30, 7, 11), 255, 2, 3, "uniform", torch.float32, "expert")
    given = case.given()
    picture = Picture(given, case.num_experts)
    for rank, found in enumerate(run_ranks(4, in_threads, library, case, given, timeout=100)):
        assert len(found) == 6
        for rows in found:
            assert_same_bits(rows, picture.arrive(rank, "expert", 1).x)


def with_scales(
    rank: int, size: int, group: dist.ProcessGroup, library: str, local: int, case: Exchange, given: list[Given]
) -> None:
    """FP8 rows and their scales, with words behind both."""
    from rail_on_cpu import engine_on_cpu

    engine, collective = engine_on_cpu(group, local, library, 64 << 10), CollectiveEngine(group, 20, local, True, 9)
    mine = given[rank]
    data = mine.x.to(torch.float8_e4m3fn)
    payload = Payload(data, torch.rand(data.size(0), 3, generator=torch.Generator().manual_seed(rank)))
    layout = collective.layout(mine.topk_idx, case.num_experts)
    theirs = collective.dispatch(Prepared(lambda: request_of(case, mine, payload=payload, layout=layout))).payload
    for bound in (4096, 0):
        got = engine.dispatch(Prepared(lambda b=bound: request_of(case, mine, b, payload=payload)))
        engine.check()
        again = engine._move(request_of(case, mine, payload=payload), got.plan)
        n = theirs.data.size(0)
        assert theirs.scales is not None
        for rows, scales, _ in (got.payload, again):
            assert scales is not None
            assert_same_bits(rows[:n].view(torch.uint8), theirs.data.view(torch.uint8))
            assert_same_bits(scales[:n], theirs.scales)


@pytest.mark.parametrize("mesh", [(4, 2), (4, 1), (6, 2)], ids=str)
def test_scales_travel_with_their_rows(mesh: tuple[int, int], library: str) -> None:
    size, local = mesh
    case = Exchange(TOKENS[:size], 16, 2, 3, "uniform", torch.float32)
    run_ranks(size, with_scales, library, local, case, case.given())


def in_a_segment(
    rank: int, size: int, group: dist.ProcessGroup, library: str, case: Exchange, given: list[Given], room: int
) -> tuple[Tensor, str]:
    """With num_worst_tokens, for which no memory is made; and what the engine says then."""
    from rail_on_cpu import engine_on_cpu

    engine = engine_on_cpu(group, 2, library, room)
    got = engine.dispatch(Prepared(lambda: request_of(case, given[rank], 4096)))
    try:
        engine.check()
    except dt.ArgumentError as error:
        return got.payload.data, str(error)
    return got.payload.data, ""


def test_rows_and_words_fill_a_segment(library: str) -> None:
    case = Exchange(TOKENS[:4], 256, 2, 3, "uniform", torch.float32)
    given = case.given()
    picture = Picture(given, case.num_experts)
    most = max(n for r in range(4) for n in picture.num_tokens_per_node(r, 2))
    room = most * (1024 + words_bytes(2, True, 2))
    for rank, (rows, said) in enumerate(run_ranks(4, in_a_segment, library, case, given, room)):
        expected = picture.arrive(rank, "rank", 1, 4096).x
        assert_same_bits(rows, expected)
        assert not said
    for _, said in run_ranks(4, in_a_segment, library, case, given, room - 1):
        assert f"{most} rows of {1024 + words_bytes(2, True, 2)} bytes between two nodes do not fit" in said
