"""Fresh dispatches of the rdma engine, num_worst_tokens and not, on CPUs: tests/rail_on_cpu.py says what of it is real."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from draws import Exchange
from harness import assert_same_bits, run_ranks
from needs import ROOT
from reference import Given, Picture
from torch import Tensor

import deepep_train as dt
from deepep_train.engines.base import CombineRequest, DispatchRequest, Payload, Prepared, Received
from deepep_train.engines.collective import CollectiveEngine
from deepep_train.engines.rail_rows import words_bytes
from deepep_train.engines.rail_tables import Counts, slots
from deepep_train.routing import RankLayout

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepep_train._C") is None, reason="the package was built without nvcc, so it has no kernels"
)
MESHES = pytest.mark.parametrize("mesh", [(4, 2), (4, 1), (6, 3), (6, 2)], ids=str)
TOKENS = (7, 0, 70, 11, 3, 8)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    from rail_on_cpu import compile_kernels

    made = compile_kernels(tmp_path_factory.mktemp("kernels"))
    if made is None:
        pytest.skip("there is no g++")
    return made


def request_of(case: Exchange, given: Given, bound: int = 0, **other: Any) -> DispatchRequest:
    how: dict[str, Any] = {
        "payload": Payload(given.x),
        "layout": None,
        "topk_idx": given.topk_idx,
        "topk_weights": given.topk_weights,
        "num_experts": case.num_experts,
        "arrangement": case.layout,
        "alignment": case.alignment,
        "num_worst_tokens": bound,
    }
    return DispatchRequest(**how | other)


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


def gone_wrong(
    rank: int, size: int, group: dist.ProcessGroup, library: str, case: Exchange, given: list[Given], how: str
) -> tuple[str, list[int], bool]:
    """What the failed call gave, if anything, and what the next says."""
    from rail_on_cpu import engine_on_cpu

    engine = engine_on_cpu(group, 2, library, 64 << 10 if how != "room" else 160 << 10)
    # The tables do not know of one another, so a failed dispatch must leave none that leads anywhere.
    mine, one = given[rank], rank == 1
    bound, other = 4096, {}
    if how == "overflow":
        bound = 1 if one else 4096
    elif how == "mixed":
        bound = 0 if one else 4096
    elif how == "index" and one:
        other = {"topk_idx": mine.topk_idx + case.num_experts}
    elif how == "alignment" and one:
        other = {"alignment": 4}
    elif how == "huge" and one:
        other = {"alignment": 1 << 30}
    elif how == "room":
        wide = torch.zeros(mine.x.size(0), 1024)
        other = {"payload": Payload(wide)}

    def make() -> DispatchRequest:
        if how == "arguments" and one:
            raise dt.ArgumentError("x must be better", "x")
        return request_of(case, mine, bound, **other)

    nothing = True
    try:
        out = engine.dispatch(Prepared(make))
        nothing = not out.plan.tokens_per_expert.any() and (out.topk_idx is None or bool((out.topk_idx == -1).all()))
        if out.topk_weights is not None and out.topk_weights.numel():
            nothing &= bool(out.topk_weights.isnan().all())
    except dt.ArgumentError as error:
        assert how in ("mixed", "arguments", "huge")
        assert one, "no CPU may have waited"
        if how == "arguments":
            assert "x must be better" in str(error)
        elif how == "huge":
            assert "alignments up to 65536, got alignment=1073741824" in str(error)
    with pytest.raises(dt.ArgumentError) as caught:
        engine.check()
    return str(caught.value), list(caught.value.ranks), nothing


@pytest.mark.parametrize("layout", ["rank", "expert"])
@pytest.mark.parametrize(
    ("how", "text", "ranks"),
    [
        ("overflow", "rank 1: num_worst_tokens=1 but", [1]),
        ("mixed", "are wrong or differ", None),
        ("index", "topk_idx of rank 1 has an index outside", [1]),
        ("alignment", "are wrong or differ", None),
        ("arguments", "are wrong or differ", None),
        ("huge", "are wrong or differ", None),
        ("room", "pass num_rdma_bytes=", []),
    ],
)
def test_what_is_wrong_with_num_worst_tokens_fails_every_rank(
    how: str, text: str, ranks: list[int] | None, layout: str, library: str
) -> None:
    case = Exchange((7, 3, 70, 11), 8, 2, 3, "uniform", torch.float32, layout)
    given = case.given()
    told = run_ranks(4, gone_wrong, library, case, given, how, timeout=150)
    for rank, (said, at_fault, nothing) in enumerate(told):
        assert text in said
        assert nothing, "a failed dispatch gives rows to nobody"
        if ranks is not None:
            assert at_fault == ranks
        else:
            assert at_fault == ([0, 2, 3] if rank == 1 and how not in ("arguments", "huge") else at_fault)
            assert at_fault == [1] or rank == 1
    if how == "room":
        most = max(n for r in range(4) for n in Picture(given, case.num_experts).num_tokens_per_node(r, 2))
        assert f"num_rdma_bytes={4 * (most * (4096 + words_bytes(2, True, 2)) + 128)}" in told[0][0]


def grows(
    rank: int, size: int, group: dist.ProcessGroup, library: str, local: int, cases: list[Exchange], given: Any, stages: int
) -> list[Tensor]:
    """Of segments in which only the first and the last dispatch fit; the others' rows cross once there is room."""
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
        Exchange(tuple(factor * n for n in TOKENS[:size]), 256, 2, 3, "uniform", torch.float32, layout, seed=seed)
        for seed, (factor, layout) in enumerate([(0, "rank"), (2, "rank"), (6, "expert"), (1, "rank")])
    ]
    pictures = [Picture(case.given(), case.num_experts) for case in cases]
    got = run_ranks(size, grows, library, local, cases, [p.given for p in pictures], stages, timeout=100)
    for rank, results in enumerate(got):
        for case, picture, x in zip(cases, pictures, results, strict=True):
            assert_same_bits(x, picture.arrive(rank, case.layout, 1).x)


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


def raises_behind_the_rows(
    rank: int, size: int, group: dist.ProcessGroup, library: str, case: Exchange, given: list[Given]
) -> list[list[list[str]]]:
    """What a rank still tells the others that fails once its rows are on their way; all do, so the engine goes on."""
    from rail_on_cpu import engine_on_cpu

    engine, found = engine_on_cpu(group, 2, library, 64 << 10), []
    fine = engine.dispatch(Prepared(lambda: request_of(case, given[rank])))
    rails: Any = engine.rails

    def fails(*_: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    by_rank = replace(case, layout="rank")
    for owner, name, asked in (
        (engine._fresh, "_room_for_words", case),
        (rails.comm, "place_picks", case),
        (rails.end, "move_weights", case),
        (rails.arena, "land", by_rank),
    ):
        real = getattr(owner, name)
        setattr(owner, name, fails)
        rails.refused.clear()
        with pytest.raises(torch.OutOfMemoryError):
            engine.dispatch(Prepared(lambda a=asked: request_of(a, given[rank])))
        found.append([steps for steps in rails.refused if steps])
        setattr(owner, name, real)
        assert_same_bits(engine.dispatch(Prepared(lambda: request_of(case, given[rank]))).payload.data, fine.payload.data)
    return found


def test_who_raises_behind_the_rows_tells_its_node_and_its_rail(library: str) -> None:
    case = Exchange((7, 3, 70, 11), 8, 2, 3, "uniform", torch.float32, "expert", 4)
    for found in run_ranks(4, raises_behind_the_rows, library, case, case.given()):
        assert found == [[["rail", "dispatch"]], *[[["dispatch", "rail"]]] * 3]


def after_a_failed_stream(rank: int, size: int, group: dist.ProcessGroup, library: str, case: Exchange, given: Any) -> None:
    """What the rail has failed to bring is not looked at."""
    from rail_on_cpu import engine_on_cpu

    engine = engine_on_cpu(group, 2, library, 64 << 10)
    engine.rails.end.fail()
    out = engine.dispatch(Prepared(lambda: request_of(case, given[rank], 4096)))
    assert not out.plan.tokens_per_expert.any()
    assert int(out.plan.route.received) == 0  # type: ignore[attr-defined]


def test_nothing_is_read_after_a_failed_stream(library: str) -> None:
    case = Exchange((7, 3, 70, 11), 8, 2, 3, "uniform", torch.float32)
    run_ranks(4, after_a_failed_stream, library, case, case.given())


def told_to_all(rank: int, size: int, group: dist.ProcessGroup, library: str, case: Exchange, given: list[Given]) -> None:
    """Without num_worst_tokens what is wrong on one rank raises the same on all, and the engine goes on."""
    from rail_on_cpu import engine_on_cpu

    engine, mine, one = engine_on_cpu(group, 2, library, 64 << 10), given[rank], rank == 1

    def told(text: str, **other: Any) -> None:
        with pytest.raises(dt.ArgumentError, match=text):
            engine.dispatch(Prepared(lambda: request_of(case, mine, **(other if one else {}))))

    def fails() -> DispatchRequest:
        raise dt.ArgumentError("x must be better", "x") if rank == 3 else AssertionError

    with pytest.raises(dt.ArgumentError, match="dispatch: rank 3: x must be better"):
        engine.dispatch(Prepared(fails if rank == 3 else lambda: request_of(case, mine)))
    layout = engine.layout(mine.topk_idx, case.num_experts)
    assert torch.equal(layout.num_tokens_per_rank, layout.is_token_in_rank.sum(0))
    told("disagree on alignment: 1 on rank 0, 2, 3; 4 on rank 1", alignment=4)
    told("rank 1: the rdma engine serves up to 4096 experts", num_experts=8192)
    told("rank 1: topk_idx must lie in", topk_idx=torch.full_like(mine.topk_idx, case.num_experts))
    per_node = layout.num_tokens_per_rdma_rank
    assert per_node is not None
    for name, wrong in (
        ("num_tokens_per_rank", layout.num_tokens_per_rank + 1),
        ("num_tokens_per_rdma_rank", per_node + 1),
        ("num_tokens_per_expert", layout.num_tokens_per_expert + 1),
    ):
        told(f"rank 1: {name}=", layout=RankLayout(*layout)._replace(**{name: wrong}))
    out = engine.dispatch(Prepared(lambda: request_of(case, mine, layout=layout)))
    assert_same_bits(out.payload.data, engine.dispatch(Prepared(lambda: request_of(case, mine))).payload.data)


def test_what_is_wrong_on_one_rank_is_told_to_all(library: str) -> None:
    case = Exchange((7, 3, 70, 11), 8, 2, 3, "uniform", torch.float32)
    run_ranks(4, told_to_all, library, case, case.given())


def random_places(token_in_node: Tensor, g: torch.Generator) -> Tensor:
    """int32 [T, nodes]: every node's tokens in an order of its own; -1: not there."""
    places = torch.full(token_in_node.shape, -1, dtype=torch.int32)
    for node, there in enumerate(token_in_node.unbind(1)):
        places[there, node] = torch.randperm(int(there.sum()), generator=g).to(torch.int32)
    return places


@pytest.mark.parametrize("has_weights", [True, False])
@pytest.mark.parametrize(("nodes", "local"), [(1, 3), (9, 4), (2, 32), (3, 33), (2, 64)])
def test_words_of_rows(nodes: int, local: int, has_weights: bool, library: str) -> None:
    """The kernels against torch's twins, without ranks that run: bits of one node alone, in one word or two."""
    from rail_on_cpu import End, params
    from rail_twins import mask_words

    g, end = torch.Generator().manual_seed(local), End(library, 0)
    in_rank = torch.rand(90, nodes * local, generator=g) < 0.8 / local
    weights, idx = torch.rand(90, 3, generator=g), torch.randint(-1, 999, (90, 3), generator=g)
    token_in_node = in_rank.view(90, nodes, local).any(2)
    places = random_places(token_in_node, g)
    send_at = F.pad(token_in_node.sum(0).cumsum(0), (1, 0)).to(torch.int32)
    num_rows, mask_at, row_words = int(send_at[-1]), 7 if has_weights else 4, words_bytes(3, has_weights, local) // 4
    words = torch.full((num_rows + 5, row_words), 77, dtype=torch.int32)  # room for more than there are
    token = torch.full((num_rows + 5,), 77, dtype=torch.int32)
    p = params()["PackParams"]()
    p.is_token_in_rank, p.topk_idx, p.topk_weights = in_rank.data_ptr(), idx.data_ptr(), weights.data_ptr() * has_weights
    p.place, p.send_at, p.words, p.token = (t.data_ptr() for t in (places, send_at, words, token))
    p.num_tokens, p.top_k, p.num_ranks, p.num_nodes, p.row_words = 90, 3, nodes * local, nodes, row_words
    end.pack_words(p, 0)

    node, leaves = token_in_node.t().nonzero().unbind(1)
    row = (send_at[node] + places[leaves, node]).long()
    assert row.sort().values.tolist() == list(range(num_rows))
    masks = in_rank.view(90, nodes, local)[leaves, node][row.argsort()]
    leaves = leaves[row.argsort()]
    assert torch.equal(token[:num_rows].long(), leaves)
    assert (token[num_rows:] == 77).all()
    assert (words[num_rows:] == 77).all()
    expected = torch.zeros(num_rows, row_words, dtype=torch.int32)
    expected[:, 0], expected[:, 1:4] = leaves, idx[leaves]
    if has_weights:
        expected[:, 4:7] = weights[leaves].view(torch.int32)
    bits = mask_words(masks)
    expected[:, mask_at : mask_at + bits.size(1)] = bits
    assert torch.equal(words[:num_rows], expected)

    # These rows as what has come: from each node some, the last of them beyond what was counted.
    cuts = torch.randint(0, num_rows + 1, (nodes - 1,), generator=g).sort().values
    recv_at = torch.tensor([0, *cuts.tolist(), num_rows], dtype=torch.int32)
    theirs = torch.stack([part.sum(0) for part in masks.split(recv_at.diff().tolist())]).to(torch.int32)
    theirs[-1] = (theirs[-1] - 1).clamp(min=0)
    begin = torch.randint(0, 1000, (nodes, local), generator=g).to(torch.int32)
    wanted = slots(Counts([], [], theirs.to(torch.int64), begin.to(torch.int64), 0), recv_at, masks)
    slot, number = (torch.full((num_rows + 7, local), 77, dtype=torch.int32) for _ in range(2))
    addresses = words.data_ptr() + torch.arange(num_rows) * 4 * row_words
    s = params()["SlotParams"]()
    s.addresses, s.recv_at, s.theirs, s.begin = (t.data_ptr() for t in (addresses, recv_at, theirs, begin))
    s.slot, s.number, s.capacity, s.mask_at = slot.data_ptr(), number.data_ptr(), num_rows + 7, mask_at
    s.num_nodes, s.num_local_ranks = nodes, local
    end.find_slots(s, 0)
    assert torch.equal(slot[:num_rows], wanted)
    assert (slot[num_rows:] == -1).all()
    assert (number[num_rows:] == -1).all()
    for r in range(local):
        assert number[:num_rows, r][wanted[:, r] >= 0].tolist() == list(range(int(theirs[:, r].sum())))


def test_the_head_of_a_row_of_counts_is_the_kernels() -> None:
    from deepep_train.engines.rail_rows import _HEAD

    assert f"constexpr int kHead = {_HEAD};" in (ROOT / "csrc/rdma/fresh.hpp").read_text()


@pytest.mark.parametrize("layout", ["rank", "expert"])
@pytest.mark.parametrize(("num_ranks", "local", "rank"), [(70, 10, 33), (96, 3, 95), (40, 40, 7)])
def test_counts_of_many_ranks(num_ranks: int, local: int, rank: int, layout: str, library: str) -> None:
    """The digest of random counts, against sums in torch."""
    from rail_on_cpu import End, params

    g, nodes, num_experts = torch.Generator().manual_seed(num_ranks), num_ranks // local, 3 * num_ranks
    node, rail, end = rank // local, rank % local, End(library, 0)
    widths = [5, num_ranks, nodes, num_experts]
    table = torch.randint(0, 50, (num_ranks, sum(widths)), generator=g).to(torch.int32)
    head, to_rank, to_node, picks = table.split_with_sizes(widths, 1)
    head.copy_(torch.tensor([0, 7, 8, 0, 0]))
    parts = {"found": 8, "send_at": nodes + 1, "recv_at": nodes + 1, "received_upto": num_ranks}
    parts |= {"theirs": nodes * local, "begin": nodes * local, "expert_base": 3}
    block = torch.full((6 + sum(parts.values()),), 77, dtype=torch.int32)
    per_expert, *others = block.split_with_sizes([6, *parts.values()])
    p, rows, report = (
        params()["DigestParams"](),
        torch.full((num_ranks,), 77, dtype=torch.int32),
        torch.zeros(3 + 3 * num_ranks),
    )
    p.table, p.rows, p.report, p.tokens_per_expert = (t.data_ptr() for t in (table, rows, report, per_expert))
    for name, part in zip(parts, others, strict=True):
        setattr(p, name, part.data_ptr())
    p.result_words, p.room, p.widest, p.rank, p.num_ranks, p.num_local_ranks = block.numel(), 99, 1, rank, num_ranks, local
    p.num_experts, p.alignment, p.expert_layout, p.row_words = num_experts, 4, int(layout == "expert"), table.size(1)
    end.digest(p, 0)

    found, send_at, recv_at, upto, theirs, begin, base = others
    here = to_rank[:, node * local : (node + 1) * local].long()
    padded = (picks.long().sum(0) + 3) // 4 * 4
    per_rank = padded.view(num_ranks, 3).sum(1) if layout == "expert" else to_rank.sum(0)
    assert torch.equal(rows.long(), per_rank)
    assert found[:5].tolist() == [0, 0, int(here[:, rail].sum()), int(per_rank[rank]), int(to_node.max())]
    mine = padded[3 * rank : 3 * rank + 3]
    assert per_expert.view(torch.int64).tolist() == mine.tolist()
    assert base.tolist() == [0, *mine.cumsum(0)[:2].tolist()]
    assert send_at.tolist() == [0, *to_node[rank].cumsum(0).tolist()]
    assert recv_at.tolist() == [0, *to_node[rail::local, node].cumsum(0).tolist()]
    assert torch.equal(upto.long(), here[:, rail].cumsum(0))
    assert torch.equal(theirs.view(nodes, local).long(), here[rail::local])
    assert torch.equal(begin.view(nodes, local).long(), (here.cumsum(0) - here)[rail::local])


def libasan() -> Path | None:
    if shutil.which("g++") is None:
        return None
    told = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout.strip()
    return Path(told) if Path(told).is_absolute() and "LD_PRELOAD" not in os.environ else None


@pytest.mark.skipif(libasan() is None, reason="there is no g++ with libasan, or this is the run under it")
def test_the_kernels_touch_only_what_is_theirs() -> None:
    """Under g++'s sanitizers: what memcheck would look for, which over rdma cannot run (docs/rdma.md)."""
    which = "words_of_rows or counts_of_many_ranks or (every_row and rank and 4)"
    command = [sys.executable, "-m", "pytest", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", __file__, "-k", which]
    environment = os.environ | {"LD_PRELOAD": str(libasan()), "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "passed" in done.stdout and "failed" not in done.stdout
