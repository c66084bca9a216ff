"""DeepEP V1's normal calls: arguments, return tuples and meaning."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from draws import FLOATS, Exchange, exchanges, row_values, values
from harness import assert_same_bits, run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Given, Picture, Rows
from torch import Tensor

import deepep_train as dt
from deepep_train import ArgumentError, Buffer, Config, DeepEPError, EventHandle, EventOverlap, Handle

CASE = Exchange((5, 0, 6, 2), 16, 3, 2, "mixed", torch.bfloat16)


def laid_out(buffer: Buffer, given: Given, num_experts: int) -> dict[str, Tensor | None]:
    """The counts that dispatch wants, by the names of its arguments."""
    *layout, event = buffer.get_dispatch_layout(given.topk_idx, num_experts)
    assert isinstance(event, EventOverlap)
    names = ("num_tokens_per_rank", "num_tokens_per_rdma_rank", "num_tokens_per_expert", "is_token_in_rank")
    return dict(zip(names, layout, strict=True))


@dataclass(frozen=True)
class Returned:
    """Everything V1 returns, from one rank."""

    layout: dict[str, Tensor | None]
    first: tuple  # of dispatch, without handle and event
    handle: tuple
    cached: tuple  # of dispatch with the handle, without the event
    combined: tuple  # of combine, without the event
    rebuilt: tuple  # the cached dispatch and the combine again, along a handle that is only a tuple


def everything(
    rank: int,
    size: int,
    group: dist.ProcessGroup,
    case: Exchange,
    given: list[Given],
    local: int,
    ys: list,
    ws: list,
    bias: list,
) -> Returned:
    buffer = Buffer(group, num_local_ranks=local, timeout=20)
    across = local < size
    dispatch = buffer.internode_dispatch if across else buffer.dispatch
    combine = buffer.internode_combine if across else buffer.combine
    mine = given[rank]
    layout = laid_out(buffer, mine, case.num_experts)
    *first, handle, event = dispatch(
        mine.x, **layout, topk_idx=mine.topk_idx, topk_weights=mine.topk_weights, expert_alignment=case.alignment
    )
    assert isinstance(first[3], list)
    assert isinstance(handle, Handle)
    *cached, cached_event = dispatch(mine.x, handle=handle)
    *combined, combined_event = combine(ys[rank], handle, topk_weights=ws[rank], bias=bias[rank])
    plain = tuple(t.clone() for t in handle)
    *rebuilt, _ = dispatch(mine.x, handle=plain)
    rebuilt += [*combine(ys[rank], plain, ws[rank], bias[rank])[:2]]
    for e in (event, cached_event, combined_event):
        assert isinstance(e, EventOverlap)
        e.current_stream_wait()
    return Returned(layout, tuple(first), tuple(handle), tuple(cached), tuple(combined), tuple(rebuilt))


def _same(got: Rows, expected: Rows, what: str) -> None:
    for a, b in zip(*(v if isinstance(v, tuple) else (v,) for v in (got, expected)), strict=True):
        assert_same_bits(a, b, what)


def check(case: Exchange, local: int, num_biases: int) -> None:
    given, g, size = case.given(), case.generator(), case.size
    picture = Picture(given, case.num_experts)
    arrived = [picture.arrive(r, "rank", case.alignment) for r in range(size)]
    origins = [a.rows for a in arrived]
    dtype = torch.bfloat16 if case.scales else case.dtype
    ys = row_values(g, origins, case.hidden, dtype)
    ws = [torch.randn(len(rows), case.top_k, generator=g) for rows in origins]
    biases = [tuple(values(g, n, case.hidden, dtype) for _ in range(num_biases)) for n in case.tokens]
    passed = [None if not b else b[0] if len(b) == 1 else b for b in biases]
    per_node = local if local < size else 1
    for rank, got in enumerate(run_ranks(size, everything, case, given, local, ys, ws, passed)):
        x, idx, weights, counts = got.first
        _same(x, arrived[rank].x, "recv_x")
        assert_same_bits(idx, arrived[rank].topk_idx, "recv_topk_idx")
        assert_same_bits(weights, arrived[rank].topk_weights, "recv_topk_weights")
        assert counts == arrived[rank].tokens_per_expert
        _same(got.cached[0], arrived[rank].x, "recv_x with a handle")
        assert got.cached[1:] == (None, None, None, None)
        assert_same_bits(got.combined[0], picture.combine(rank, ys, origins, biases[rank], per_node), "combined_x")
        assert_same_bits(got.combined[1], picture.combine_weights(rank, ws, origins, per_node), "combined_topk_weights")
        again, *nothing, combined, combined_weights = got.rebuilt
        _same(again, arrived[rank].x, "recv_x with a plain tuple")
        assert nothing == [None] * 4
        assert_same_bits(combined, got.combined[0], "combined_x with a plain tuple")
        assert_same_bits(combined_weights, got.combined[1], "combined_topk_weights with a plain tuple")
        check_layout(got.layout, picture, rank, local)
        check_handle(got.handle, picture, rank, local)


def check_layout(layout: dict[str, Tensor | None], picture: Picture, rank: int, local: int) -> None:
    def count(numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32)

    per_node = layout["num_tokens_per_rdma_rank"]
    assert_same_bits(layout["num_tokens_per_rank"], count(picture.num_tokens_per_rank(rank)))
    assert_same_bits(layout["num_tokens_per_expert"], count(picture.num_tokens_per_expert(rank)))
    assert_same_bits(layout["is_token_in_rank"], picture.is_token_in_rank(rank))
    assert_same_bits(per_node, None if local == picture.size else count(picture.num_tokens_per_node(rank, local)))


def check_handle(handle: tuple, picture: Picture, rank: int, local: int) -> None:
    """V1's tests and users read these places."""
    assert all(isinstance(t, Tensor) for t in handle)
    prefix = picture.prefix_matrix()
    received = picture.arrive(rank, "rank").rows
    tokens = torch.tensor([row.token for row in received], dtype=torch.int32)
    if local == picture.size:
        assert len(handle) == 6
        assert_same_bits(handle[0], prefix, "rank_prefix_matrix")
        assert_same_bits(handle[3], tokens, "recv_src_idx")
        assert_same_bits(handle[4], picture.is_token_in_rank(rank), "is_token_in_rank")
    else:
        assert len(handle) == 10
        assert_same_bits(handle[0], picture.is_token_in_rank(rank), "is_token_in_rank")
        assert_same_bits(handle[-4], prefix[:, rank].contiguous(), "recv_gbl_rank_prefix_sum")
        assert handle[-4][-1].item() == len(received)
        if local == 1:
            by_node = prefix[:, rank].contiguous()  # nothing is forwarded
        else:  # what this rank forwards: the tokens that ranks of its rail have for its node
            rail = range(rank % local, picture.size, local)
            counts = [picture.num_tokens_per_node(source, local)[rank // local] for source in rail]
            by_node = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)
            assert handle[9].shape == (by_node[-1], local)
        assert_same_bits(handle[4], by_node, "recv_rdma_rank_prefix_sum")


@pytest.mark.parametrize("size,local", [(2, 2), (2, 1), (3, 3), (4, 4), (4, 2), (4, 1)])
@settings(max_examples=15)
@given(data=st.data(), num_biases=st.integers(0, 2))
def test_dispatch_and_combine_by_v1s_rules(size: int, local: int, data: st.DataObject, num_biases: int) -> None:
    check(replace(data.draw(exchanges(size, (*FLOATS, torch.float8_e4m3fn))), layout="rank"), local, num_biases)


# Variations -------------------------------------------------------------------------------------------------------------


def worst_and_bare(rank: int, size: int, group: dist.ProcessGroup, given: list[Given], num_experts: int, ys: list) -> list:
    """Dispatch with num_worst_tokens, its combine, and a dispatch without top-k."""
    buffer = Buffer(group, timeout=20)
    mine = given[rank]
    layout = laid_out(buffer, mine, num_experts)
    *worst, handle, _ = buffer.dispatch(
        mine.x, **layout, topk_idx=mine.topk_idx, topk_weights=mine.topk_weights, num_worst_tokens=20, expert_alignment=4
    )
    *again, _ = buffer.dispatch(mine.x, handle=handle)
    z, no_weights, _ = buffer.combine(ys[rank], handle)
    assert no_weights is None
    *bare, _, _ = buffer.dispatch(mine.x, **layout)
    *without_weights, _, _ = buffer.dispatch(mine.x, **layout, topk_idx=mine.topk_idx)
    return [worst, again, z, bare, without_weights]


def test_num_worst_tokens_and_dispatch_without_topk() -> None:
    given = CASE.given()
    picture = Picture(given, CASE.num_experts)
    padded = [picture.arrive(r, "rank", 4, worst=20) for r in range(4)]
    ys = row_values(CASE.generator(), [p.rows for p in padded], 3, torch.float32)
    for rank, (worst, again, z, bare, without_weights) in enumerate(run_ranks(4, worst_and_bare, given, CASE.num_experts, ys)):
        exact = picture.arrive(rank, "rank")
        assert worst[3] == []
        assert_same_bits(worst[0], padded[rank].x)
        assert_same_bits(worst[1], padded[rank].topk_idx)
        assert_same_bits(worst[2], padded[rank].topk_weights)
        assert_same_bits(again[0], padded[rank].x)
        assert_same_bits(z, picture.combine(rank, ys, [p.rows for p in padded]))
        assert_same_bits(bare[0], exact.x)
        assert bare[1:3] == [None, None]
        assert bare[3] == exact.tokens_per_expert
        assert_same_bits(without_weights[1], exact.topk_idx)
        assert without_weights[2] is None


def streams_and_events(rank: int, size: int, group: dist.ProcessGroup, given: list[Given], num_experts: int) -> list[bool]:
    """The arguments that order streams change no result; events work as context managers."""
    buffer = Buffer(group, timeout=20)
    mine = given[rank]
    layout = laid_out(buffer, mine, num_experts)
    plain = buffer.dispatch(mine.x, **layout, topk_idx=mine.topk_idx, topk_weights=mine.topk_weights)
    how: dict[str, Any] = {"async_finish": True, "allocate_on_comm_stream": True, "config": Config(24, 8, 256)}
    *_, event = buffer.get_dispatch_layout(
        mine.topk_idx, num_experts, previous_event=buffer.capture(), async_finish=True, allocate_on_comm_stream=True
    )
    got = buffer.dispatch(mine.x, **layout, topk_idx=mine.topk_idx, topk_weights=mine.topk_weights, previous_event=event, **how)
    with got[5] as entered:
        pass
    z, _, done = buffer.combine(got[0], got[4], previous_event=EventOverlap(EventHandle()), **how)
    done.current_stream_wait()
    z2, _, _ = buffer.combine(plain[0], plain[4], None, None, Config(), None, False, False)
    return [torch.equal(got[0], plain[0]), got[3] == plain[3], torch.equal(z, z2), entered is got[5]]


def test_streams_and_events() -> None:
    case = replace(CASE, dtype=torch.float32, tokens=(4, 3))
    given = [replace(g, x=values(case.generator(), g.num_tokens, 16, torch.float32)) for g in case.given()]
    assert run_ranks(2, streams_and_events, given, case.num_experts) == [[True] * 4] * 2


def test_previous_event_is_waited_for() -> None:
    """… by calls that take one; its check speaks up then, too."""

    def fail() -> None:
        raise DeepEPError("an earlier call failed")

    with pytest.raises(DeepEPError, match="an earlier call failed"):
        Buffer().get_dispatch_layout(torch.zeros(1, 1, dtype=torch.int64), 2, previous_event=EventOverlap(check=fail))
    with pytest.raises(DeepEPError, match="an earlier call failed"), EventOverlap(check=fail):
        pass


def by_expert(rank: int, size: int, group: dist.ProcessGroup, local: int) -> list[Any]:
    """As many rows as tokens arrive, in another order: each token has one expert here, and nothing is padded."""
    buffer, num_experts = Buffer(group, num_local_ranks=local, timeout=20), 4 * size
    g = torch.Generator().manual_seed(rank)
    x, idx = torch.randn(12, 4, generator=g), torch.randint(num_experts, (12, 1), generator=g)
    out = dt.dispatch(x, idx, torch.rand(12, 1, generator=g), buffer=buffer, num_experts=num_experts, layout="expert")
    flat = dt.dispatch(x, idx, buffer=buffer, num_experts=num_experts)
    assert out.x.shape == flat.x.shape
    assert not torch.equal(out.x, flat.x)
    z, plain = dt.combine(out.x, out.handle), tuple(out.handle)
    seen: list[Any] = [torch.equal(buffer.combine(out.x, plain)[0], z), torch.equal(buffer.dispatch(x, handle=plain)[0], out.x)]
    copies = tuple(t.clone() for t in plain)
    for call in (lambda: buffer.combine(out.x, copies), lambda: buffer.dispatch(x, handle=copies)):
        with pytest.raises(
            ArgumentError, match=rf"handle: recv_\w+ \[{size}, 0\] is that of a dispatch to expert layout"
        ) as caught:
            call()
        seen.append(caught.value.argument)
    return [*seen, torch.equal(dt.combine(out.x, out.handle), z)]


@pytest.mark.parametrize("size,local", [(2, 2), (2, 1), (4, 2)])
def test_copies_of_an_expert_layout_are_not_taken_for_a_rank_layout(size: int, local: int) -> None:
    assert run_ranks(size, by_expert, local) == [[True, True, "handle", "handle", True]] * size


# The object itself ------------------------------------------------------------------------------------------------------


def attributes(rank: int, size: int, group: dist.ProcessGroup) -> dict[str, Any]:
    buffer = Buffer(group, 1 << 10, 1 << 12, True, 12, False, True, explicitly_destroy=True, enable_shrink=False)
    by_default = Buffer()
    raw = buffer.get_local_buffer_tensor(torch.int32, torch.Size([4, 2]), offset=16)
    raw.fill_(7)
    same_memory = buffer.get_local_buffer_tensor(torch.int32)
    return {
        "rank": (buffer.rank, buffer.group_size, buffer.group is group, by_default.group is dist.group.WORLD),
        "bytes": (buffer.num_nvl_bytes, buffer.num_rdma_bytes),
        "mode": (buffer.low_latency_mode, buffer.explicitly_destroy, buffer.num_nodes, buffer.engine),
        "reasons": bool(buffer.engine_reasons),
        "raw": (same_memory.numel(), int(same_memory.sum()), same_memory[4:12].tolist()),
        "rdma": buffer.get_local_buffer_tensor(torch.uint8, use_rdma_buffer=True).numel(),
        "repr": repr(buffer),
    }


def test_attributes_read_back() -> None:
    for rank, got in enumerate(run_ranks(2, attributes)):
        assert got["rank"] == (rank, 2, True, True)
        assert got["bytes"] == (1024, 4096)
        assert got["mode"] == (True, True, 1, "collective")
        assert got["reasons"]
        assert got["raw"] == (256, 56, [7] * 8)
        assert got["rdma"] == 4096
        assert f"rank {rank} of 2" in got["repr"]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5, 8, 16, 24, 160, 4096])
def test_configs_for_any_number_of_ranks(num_ranks: int) -> None:
    for config in (Buffer.get_dispatch_config(num_ranks), Buffer.get_combine_config(num_ranks)):
        assert config.num_sms == Buffer.num_sms == 20
        assert config.get_nvl_buffer_size_hint(7168 * 2, num_ranks) >= 0
        assert config.get_rdma_buffer_size_hint(7168 * 2, num_ranks) >= 0


def test_num_sms_may_be_assigned(monkeypatch: pytest.MonkeyPatch) -> None:
    """As V1's class attribute; what nobody has assigned leaves the choice to the engine."""
    assert Buffer._chosen_sms() == 0
    monkeypatch.setattr(Buffer, "num_sms", 8)
    assert Buffer._chosen_sms() == Buffer.get_dispatch_config(8).num_sms == 8
    assert not Buffer.get_combine_config(8).is_default


def test_set_num_sms() -> None:
    before = Buffer.num_sms
    try:
        Buffer.set_num_sms(24)
        assert Buffer.num_sms == Buffer.get_dispatch_config(8).num_sms == 24
    finally:
        Buffer.set_num_sms(before)
    assert Buffer.is_sm90_compiled()


def test_a_process_alone_needs_no_process_group() -> None:
    buffer = Buffer()
    given = Exchange((6,), 8, 3, 4, "holes", torch.float32).given()[0]
    layout = laid_out(buffer, given, 4)
    recv, idx, weights, counts, handle, _ = buffer.dispatch(
        given.x, **layout, topk_idx=given.topk_idx, topk_weights=given.topk_weights
    )
    arrived = Picture([given], 4).arrive(0, "rank")
    assert_same_bits(recv, arrived.x)
    assert_same_bits(idx, arrived.topk_idx)
    assert_same_bits(weights, arrived.topk_weights)
    assert counts == arrived.tokens_per_expert
    ones = torch.ones(len(arrived.rows), 2)
    combined, _, _ = buffer.combine(ones, handle)
    assert torch.equal(combined[:, 0], layout["is_token_in_rank"][:, 0].float())


CALLS = {
    "dispatch": lambda b: b.dispatch(torch.ones(1, 1)),
    "combine": lambda b: b.combine(torch.ones(1, 1), ()),
    "layout": lambda b: b.get_dispatch_layout(torch.zeros(1, 1, dtype=torch.int64), 1),
    "check": lambda b: b.check(),
    "memory": lambda b: b.memory_stats(),
    "raw": lambda b: b.get_local_buffer_tensor(torch.uint8),
    "empty": lambda b: b.empty((1, 1), torch.float32),
}


@pytest.mark.parametrize("name", CALLS)
def test_use_after_destroy_raises(name: str) -> None:
    buffer = Buffer(explicitly_destroy=True)
    buffer.destroy()
    buffer.destroy()
    assert buffer.destroyed
    with pytest.raises(DeepEPError, match="destroyed"):
        CALLS[name](buffer)


def mixed_up(rank: int, size: int, group: dist.ProcessGroup, nodes: int, copied: bool) -> list[tuple[str, list[int] | None]]:
    """Handles rebuilt from their tensors: rank 0's is of another dispatch than the others'. Copies tell so by counts alone."""
    text = "handle expects" if copied else "handles of different dispatches"
    buffer = Buffer(group, num_local_ranks=size // nodes)
    call = buffer.dispatch if nodes == 1 else buffer.internode_dispatch
    handles = []
    for tokens in (3, 5):
        x, idx = torch.ones(tokens, 8), torch.arange(tokens * 2).view(tokens, 2) % (2 * size)
        layout = dict(zip(LAYOUT, buffer.get_dispatch_layout(idx, 2 * size), strict=False))
        recv, *_, handle, _ = call(x, topk_idx=idx, topk_weights=torch.ones(tokens, 2), **layout)
        handles.append((x, recv, tuple(t.clone() for t in handle) if copied else tuple(handle)))
    x, recv, handle = handles[rank > 0]
    raised = []
    for misuse in (lambda: call(x, handle=handle), lambda: buffer.combine(recv, handle)):
        with pytest.raises(ArgumentError, match=text) as caught:
            misuse()
        raised.append((caught.value.argument, caught.value.ranks))
    call(handles[1][0], handle=handles[1][2])  # the buffer goes on
    return raised


LAYOUT = ("num_tokens_per_rank", "num_tokens_per_rdma_rank", "num_tokens_per_expert", "is_token_in_rank")


@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("nodes", [1, 2])
def test_rebuilt_handles_of_different_dispatches_are_refused_on_every_rank(nodes: int, copied: bool) -> None:
    results = run_ranks(4, mixed_up, nodes, copied)
    assert all(raised == results[0] for raised in results)
    assert [argument for argument, _ in results[0]] == ["handle"] * 2
