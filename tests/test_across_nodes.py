"""Several nodes: rows cross the network once a node, sums are by node, wherever the ranks really run."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from typing import Any

import pytest
import test_misuse
import torch
import torch.distributed as dist
from comparing import Mesh, check, check_worst
from draws import FLOATS, FP8, STYLES, Exchange, exchanges, row_values, values
from harness import assert_same_bits, run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from misuses import Misuse, Scene, outcomes
from reference import Given, Picture
from torch import Tensor

import deepep_train as dt
from deepep_train.engines.peers import Peers

TWO_BY_TWO = Mesh(num_local_ranks=2, sums_of=2)
MESHES = {
    "2 x 2": TWO_BY_TWO,
    "2 x 2, not forwarded": Mesh(num_local_ranks=2, two_level=False),
    "4 x 1": Mesh(num_local_ranks=1),
    "4 x 1, forwarded": Mesh(num_local_ranks=1, two_level=True),
    "1 x 4": Mesh(num_local_ranks=4),
}


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
@settings(max_examples=20)
@given(case=exchanges(4), num_biases=st.integers(0, 2))
def test_random_routings(mesh: Mesh, case: Exchange, num_biases: int) -> None:
    check(case, num_biases, mesh=mesh)


@settings(max_examples=20)
@given(case=exchanges(4, FP8), dtype=st.sampled_from(FLOATS))
def test_fp8_pairs_arrive_to_the_bit(case: Exchange, dtype: torch.dtype) -> None:
    check(case, dtype=dtype, mesh=TWO_BY_TWO)


@pytest.mark.parametrize("layout", ["rank", "expert"])
@pytest.mark.parametrize("style", STYLES)
def test_routing_styles_with_uneven_tokens(style: str, layout: str) -> None:
    check(Exchange((9, 0, 4, 1), 16, 4, 2, style, torch.bfloat16, layout, 4), mesh=TWO_BY_TWO)


@pytest.mark.parametrize("layout", ["rank", "expert"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_floating_dtype(dtype: torch.dtype, layout: str) -> None:
    check(Exchange((40, 33, 20, 11), 24, 6, 3, "uniform", dtype, layout), num_biases=2, mesh=TWO_BY_TWO)


@pytest.mark.parametrize("spare", [0, 1, 9])
@settings(max_examples=10)
@given(case=exchanges(4, (*FLOATS, torch.float8_e4m3fn)))
def test_num_worst_tokens_pads_to_exactly_so_many_rows(spare: int, case: Exchange) -> None:
    check_worst(case, spare, TWO_BY_TWO)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_two_roundings_show_in_the_cases(dtype: torch.dtype) -> None:
    """Guards the tests above: sums that are not by node, by other nodes or in another order would give other bits."""
    case = Exchange((40, 33, 20, 11), 24, 6, 3, "uniform", dtype, "expert")
    picture = Picture(case.given(), case.num_experts)
    origins = [picture.arrive(r, "expert").rows for r in range(4)]
    ys = row_values(case.generator(), origins, case.hidden, dtype)
    bias = [values(case.generator(), 40, case.hidden, dtype)]
    right = picture.combine(0, ys, origins, bias, 2)
    swapped = [[2, 3, 0, 1], [1, 0, 3, 2], [0, 2, 1, 3]]
    others = [picture.combine(0, [ys[r] for r in order], [origins[r] for r in order], bias, 2) for order in swapped]
    # Ranks of a node commute where both meet only each other, so their order shows in wider nodes alone.
    for name, wrong in zip(("nodes", "ranks", "mesh"), others, strict=True):
        assert torch.equal(right, wrong) == (name == "ranks"), name
    assert not torch.equal(right, picture.combine(0, ys, origins, bias))


@pytest.mark.parametrize("local", [3, 2])
def test_nodes_and_their_ranks_are_not_mixed_up(local: int) -> None:
    """Which 2 x 2 cannot tell; and in a node of three the order shows."""
    for layout in ("rank", "expert"):
        case = Exchange((7, 5, 6, 3, 2, 8), 8, 9, 2, "uniform", torch.bfloat16, layout, 4)
        check(case, num_biases=1, mesh=Mesh(num_local_ranks=local, sums_of=local))


# What crosses -----------------------------------------------------------------------------------------------------------


def count_rows(
    rank: int, size: int, group: dist.ProcessGroup, case: Exchange, given: list[Given], mesh: Mesh
) -> dict[str, list[list[int]]]:
    """Rows of x and of y that this rank gives to each rank, exchange by exchange; they alone are `hidden` wide."""
    seen: list[list[int]] = []
    exchange = Peers.all_to_all_rows

    def watched(self: Peers, rows: Tensor, give: list[int], *rest: Any, **how: Any) -> Tensor:
        if rows.dim() == 2 and rows.size(1) == case.hidden:
            seen.append(list(give))
        return exchange(self, rows, give, *rest, **how)

    buffer = mesh.buffer(group)
    Peers.all_to_all_rows = watched  # type: ignore[method-assign]
    try:
        out = dt.dispatch(
            given[rank].x, given[rank].topk_idx, given[rank].topk_weights, buffer=buffer, num_experts=case.num_experts
        )
        dispatched, seen[:] = list(seen), []
        dt.combine(out.x, out.handle)
        return {"dispatch": dispatched, "combine": list(seen)}
    finally:
        Peers.all_to_all_rows = exchange  # type: ignore[method-assign]


def test_a_token_crosses_once_for_each_node_over_the_senders_rail() -> None:
    case = Exchange((30, 0, 17, 25), 37, 6, 2, "uniform", torch.float32)
    given = case.given()
    picture = Picture(given, case.num_experts)
    everyone = run_ranks(4, count_rows, case, given, TWO_BY_TWO)
    for rank, seen in enumerate(everyone):
        node, rail = divmod(rank, 2)
        over_rail, within = seen["dispatch"]
        per_node = picture.num_tokens_per_node(rank, 2)
        assert over_rail == [per_node[r // 2] if r % 2 == rail else 0 for r in range(4)]
        # Tokens that both of its rail have for this node, once for each other rank of the node.
        forwarded = [sum(picture.num_tokens_per_rank(source)[r] for source in (rail, 2 + rail)) for r in range(4)]
        assert within == [forwarded[r] if r // 2 == node and r != rank else 0 for r in range(4)]
        # Back: what came from each forwarder, then one sum for each token of the other node's rank on the rail.
        arrived, sums = seen["combine"]
        assert arrived == [forwarded[rank] if r == rank else everyone[r]["dispatch"][1][rank] for r in range(4)]
        assert sums == [everyone[r]["dispatch"][0][rank] for r in range(4)]
    rows = sum(sum(seen["dispatch"][0]) for seen in everyone)
    one_by_one = sum(sum(picture.num_tokens_per_rank(r)) for r in range(4))
    assert rows < 0.65 * one_by_one, "the case would not tell"


# When rows are forwarded ------------------------------------------------------------------------------------------------


def choose(rank: int, size: int, group: dist.ProcessGroup, hosts: list[str], two_level: bool | None) -> tuple[int, bool]:
    os.environ["DEEPEP_TRAIN_HOST"] = hosts[rank]
    try:
        buffer = dt.Buffer(group, timeout=20, two_level=two_level)
    finally:
        del os.environ["DEEPEP_TRAIN_HOST"]
    return buffer.num_nodes, buffer.two_level


@pytest.mark.parametrize(
    "hosts,two_level,expected",
    [
        ("aabb", None, (2, True)),
        ("aabb", False, (2, False)),
        ("abcd", None, (4, False)),
        ("abcd", True, (4, True)),
        ("aaaa", None, (1, False)),
        ("abab", None, (1, False)),  # ranks are not placed node by node
        ("aaab", None, (1, False)),  # uneven
    ],
)
def test_hosts_decide_and_the_caller_may_overrule(hosts: str, two_level: bool | None, expected: tuple[int, bool]) -> None:
    assert run_ranks(4, choose, list(hosts), two_level) == [expected] * 4


# Misuse and failures ----------------------------------------------------------------------------------------------------


def _rebuilt(s: Scene, place: int, value: Any) -> dict[str, Any]:
    """The handle as a plain tuple with one tensor replaced."""
    handle = list(s.out.handle)
    handle[place] = value(handle[place])
    return {"handle": tuple(handle)}


_BORROWED = (
    "x is int64", "x is wrong on two ranks", "topk_idx has -2", "topk_weights lack a token", "num_experts=9", "layout=3",
    "num_worst_tokens is too small on one rank", "handle of another buffer", "handle is a short tuple",
    "handle for another number of tokens", "y lacks a row", "bias is a triple", "ranks disagree: hidden",
    "ranks disagree: combine: other handles with the same counts", "ranks disagree: combine instead of dispatch",
)  # fmt: skip
_PER_NODE = "num_tokens_per_rdma_rank"
_OWN = {
    "wrong num_tokens_per_rdma_rank": Misuse("v1 dispatch", _PER_NODE, lambda s: {_PER_NODE: s.layout[_PER_NODE] + 1}),
    "a handle whose send_nvl_head lost a row": Misuse(
        "v1 cached", "handle", lambda s: _rebuilt(s, 9, lambda t: t[1:])
    ),
    "a handle whose recv_rdma_rank_prefix_sum is of another mesh": Misuse(
        "v1 cached", "handle", lambda s: _rebuilt(s, 4, lambda t: t[:1])
    ),
    "two_level is a number": Misuse("buffer", "two_level", lambda s: {"two_level": 1}),
    "ranks disagree on two_level": Misuse("buffer", "two_level", lambda s: {"two_level": False}),
}  # fmt: skip
MISUSES = {name: replace(test_misuse.MISUSES[name], size=4, nodes=2) for name in _BORROWED}
MISUSES |= {name: replace(misuse, size=4, nodes=2) for name, misuse in _OWN.items()}


@pytest.mark.parametrize("name", MISUSES)
def test_an_error_on_one_rank_is_an_error_on_all(name: str) -> None:
    misuse, seen = outcomes(__name__, name)
    assert [outcome.kind for outcome in seen] == ["ArgumentError"] * 4, seen
    for outcome in seen:
        assert outcome.argument == misuse.argument
        assert outcome.ranks == misuse.ranks


def test_two_level_needs_two_nodes() -> None:
    with pytest.raises(dt.ArgumentError, match="at least 2 nodes") as caught:
        dt.Buffer(two_level=True)
    assert caught.value.argument == "two_level"


def one_dies(rank: int, size: int, group: dist.ProcessGroup, victim: int) -> list[tuple[str, Any]]:
    """Between the two hops of a combine: the victim has sent its rows to the forwarders and sums nothing more."""
    case = Exchange((3, 2, 4, 1), 4, 2, 2, "uniform", torch.float32)
    mine = case.given()[rank]
    buffer = TWO_BY_TWO.buffer(group)
    out = dt.dispatch(torch.ones(mine.x.shape), mine.topk_idx, buffer=buffer, num_experts=case.num_experts)
    if rank == victim:
        exchange, calls = Peers.all_to_all_rows, []

        def last(self: Peers, *args: Any, **how: Any) -> Tensor:
            if calls:
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(1)
            return exchange(self, *args, **how)

        Peers.all_to_all_rows = last  # type: ignore[method-assign]
    seen = []
    for action in (lambda: dt.combine(out.x, out.handle), buffer.check):
        try:
            action()
            seen.append(("nothing", ()))
        except dt.DeepEPError as error:
            seen.append((type(error).__name__, getattr(error, "ranks", ())))
    return seen


def test_a_rank_that_dies_between_the_hops_is_named() -> None:
    victim = 3
    everyone = run_ranks(4, one_dies, victim, fresh=True, dead=(victim,))
    for rank, seen in enumerate(everyone):
        if rank != victim:
            assert seen == [("PeerTimeoutError", (victim,))] * 2


def test_the_sums_of_one_buffer_are_of_one_kind() -> None:
    """The same ranks as one node and as two: equal rows, different sums."""
    case = Exchange((40, 33, 20, 11), 24, 6, 3, "uniform", torch.bfloat16)
    given, picture = case.given(), Picture(case.given(), case.num_experts)
    origins = [picture.arrive(r, "rank").rows for r in range(4)]
    ys = row_values(case.generator(), origins, case.hidden, torch.bfloat16)
    flat, by_node = ([picture.combine(r, ys, origins, (), n) for r in range(4)] for n in (1, 2))
    assert not any(torch.equal(a, b) for a, b in zip(flat, by_node, strict=True))
    for rank, (one, two) in enumerate(run_ranks(4, as_one_and_as_two, case, given, ys)):
        assert_same_bits(one, flat[rank])
        assert_same_bits(two, by_node[rank])


def as_one_and_as_two(
    rank: int, size: int, group: dist.ProcessGroup, case: Exchange, given: list[Given], ys: list[Tensor]
) -> list[Tensor]:
    results = []
    for local in (4, 2):
        buffer = dt.Buffer(group, timeout=20, num_local_ranks=local)
        out = dt.dispatch(given[rank].x, given[rank].topk_idx, buffer=buffer, num_experts=case.num_experts)
        results.append(dt.combine(ys[rank], out.handle))
    return results
