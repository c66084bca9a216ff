"""What goes wrong in fresh dispatches of the rdma engine, on CPUs, and who hears of it: tests/rail_on_cpu.py says what of it is
real."""

from __future__ import annotations

from dataclasses import replace
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
from deepep_train.engines import rail_fresh
from deepep_train.engines.base import DispatchRequest, Payload, Prepared
from deepep_train.engines.rail_rows import words_bytes
from deepep_train.routing import RankLayout

pytestmark = NEEDS_KERNELS


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


def raises_before_the_rows(
    rank: int, size: int, group: dist.ProcessGroup, library: str, case: Exchange, given: list[Given]
) -> None:
    """On all ranks at once: all owe the same, whatever their arguments are, and go on."""
    from rail_on_cpu import engine_on_cpu

    engine = engine_on_cpu(group, 2, library, 20 << 10)
    rails: Any = engine.rails
    big = replace(case, tokens=tuple(4 * n for n in case.tokens))
    fine, many = request_of(case, given[rank]), request_of(big, big.given()[rank])
    wrong = request_of(case, given[rank], topk_idx=torch.full_like(given[rank].topk_idx, case.num_experts))

    def fails(*_: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    before = engine.dispatch(Prepared(lambda: fine)).payload.data
    for owner, name, request, told, owed in (
        (engine._fresh, "_room_for_found", wrong if rank == 1 else fine, "no room", [["rail", "dispatch", "rail"]]),
        (engine._fresh, "make_ready", fine, "no room", []),
        (rails.end, "resize", many, "rank 0: rows of .* bytes need", []),
        (rails.end, "pack_words", fine, "no room", [["rail"]]),
    ):
        real = getattr(owner, name)
        setattr(owner, name, fails)
        rails.refused.clear()
        with pytest.raises((torch.OutOfMemoryError, dt.DeepEPError), match=told):
            engine.dispatch(Prepared(lambda r=request: r))
        assert [steps for steps in rails.refused if steps] == owed, name
        setattr(owner, name, real)
        assert_same_bits(engine.dispatch(Prepared(lambda: fine)).payload.data, before)
    # Once there is room: the third time that addresses are asked for; the counts have some.
    real, asked = rails.addresses, []

    def fails_late(*how: Any) -> Tensor:
        asked.append(how)
        return fails() if len(asked) == 3 else real(*how)  # type: ignore[return-value, func-returns-value]

    rails.addresses = fails_late
    rails.refused.clear()
    with pytest.raises(torch.OutOfMemoryError):
        engine.dispatch(Prepared(lambda: many))
    assert [steps for steps in rails.refused if steps] == [["rail", "dispatch"]]
    rails.addresses = real
    engine.dispatch(Prepared(lambda: many))
    # Of one rank alone, while nobody waits yet: told to all.
    ready = engine._fresh.make_ready
    engine._fresh.make_ready = fails if rank == 2 else ready  # type: ignore[method-assign, assignment]
    kind, told = (
        (torch.OutOfMemoryError, "no room") if rank == 2 else (dt.DeepEPError, "dispatch: rank 2: OutOfMemoryError: no room")
    )
    with pytest.raises(kind, match=told):
        engine.dispatch(Prepared(lambda: fine))
    engine._fresh.make_ready = ready  # type: ignore[method-assign]
    # CUDA's failures show where the CPU waits; whose they are is found out by the operation around it.
    wait, rail_fresh._ToCpu.wait = rail_fresh._ToCpu.wait, fails  # type: ignore[method-assign, assignment]
    rails.refused.clear()
    with pytest.raises(torch.OutOfMemoryError):
        engine.dispatch(Prepared(lambda: fine))
    assert rails.refused == [[]]
    rail_fresh._ToCpu.wait = wait  # type: ignore[method-assign]
    assert_same_bits(engine.dispatch(Prepared(lambda: fine)).payload.data, before)


def test_whoever_raises_before_the_rows_owes_what_the_others_do(library: str) -> None:
    case = Exchange((7, 3, 70, 11), 128, 2, 3, "uniform", torch.float32)
    run_ranks(4, raises_before_the_rows, library, case, case.given())


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

    rails: Any = engine.rails
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
    assert rails.stayed == 7 - (rank in (1, 3)), "nobody's rows cross; of who has no arguments none would"
    out = engine.dispatch(Prepared(lambda: request_of(case, mine, layout=layout)))
    assert_same_bits(out.payload.data, engine.dispatch(Prepared(lambda: request_of(case, mine))).payload.data)


def test_what_is_wrong_on_one_rank_is_told_to_all(library: str) -> None:
    case = Exchange((7, 3, 70, 11), 8, 2, 3, "uniform", torch.float32)
    run_ranks(4, told_to_all, library, case, case.given())
