"""What the low-latency engine does on the CPU side of its kernels, which are not run here: slots, hooks, refusals."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("deepep_train._C") is None:
    pytest.skip("the package was built without nvcc, so it has no kernels", allow_module_level=True)

from low_latency_stand_ins import BUFFER, IDX, WEIGHTS, Kernels, Memory, X, combine, dispatch

from deepep_train import ArgumentError, DeepEPError
from deepep_train.engines import low_latency
from deepep_train.engines.low_latency import LowLatency


def test_what_comes_back_and_what_is_launched(engine: LowLatency, kernels: Kernels) -> None:
    (data, scales), count, handle, hook = dispatch(engine)
    assert hook is None and data.dtype == torch.float8_e4m3fn and data.shape == (5, 4, 512)
    assert scales.shape == (5, 4, 4) and scales.stride(1) == 1 and count.shape == (5,)
    assert [t.shape if isinstance(t, Tensor) else t for t in handle] == [(5, 4), (5, 1), 4, 512, 5]
    assert combine(engine, handle)[0].shape == (3, 512)
    packed = dispatch(engine, use_ue8m0=True, round_scale=True)[0][1]
    assert packed.dtype == torch.int32 and packed.shape == (5, 4, 1)
    assert kernels.launched == [
        ("dispatch_send", 0), ("dispatch_receive", 0), ("combine_send", 0), ("combine_receive", 0),
        ("dispatch_send", 1), ("dispatch_receive", 1),
    ]  # fmt: skip


def test_hooks_receive_once(engine: LowLatency, kernels: Kernels) -> None:
    *_, handle, hook = dispatch(engine, with_hook=True)
    assert kernels.launched == [("dispatch_send", 0)]
    with pytest.raises(DeepEPError, match="hook of an earlier low_latency_dispatch"):
        combine(engine, handle)
    hook()
    with pytest.raises(DeepEPError, match="called once"):
        hook()
    _, hook = combine(engine, handle, engine.combine_buffer(BUFFER, handle), with_hook=True, zero_copy=True)
    hook()
    assert kernels.launched[1:] == [("dispatch_receive", 0), ("combine_send", 0), ("combine_receive", 0)]
    dropped = dispatch(engine, with_hook=True)
    del dropped
    dispatch(engine)
    with pytest.raises(DeepEPError, match="hook of an earlier low_latency_dispatch"):
        dispatch(engine)


def test_an_earlier_hook_does_not_take_a_later_ones_turn(engine: LowLatency, kernels: Kernels) -> None:
    *_, handle, sent = dispatch(engine, with_hook=True)
    sent()
    _, first = combine(engine, handle, with_hook=True)
    with pytest.raises(DeepEPError, match="hook of a low_latency_dispatch may be called once"):
        sent()
    first()
    _, second = combine(engine, handle, with_hook=True)
    with pytest.raises(DeepEPError, match="hook of a low_latency_combine may be called once"):
        first()
    second()
    assert [name for name, _ in kernels.launched] == ["dispatch_send", "dispatch_receive"] + 2 * [
        "combine_send",
        "combine_receive",
    ]


def test_kernels_get_rows_that_are_aligned(engine: LowLatency, monkeypatch: pytest.MonkeyPatch) -> None:
    launch, given = engine._launch, []
    monkeypatch.setattr(engine, "_launch", lambda name, p, *how: (given.append(p), launch(name, p, *how))[1])
    *_, handle, _ = dispatch(engine, x=torch.zeros(3 * 512 + 1, dtype=torch.bfloat16)[1:].view(3, 512))
    combine(engine, handle, torch.zeros(5 * 4 * 512 + 1, dtype=torch.bfloat16)[1:].view(5, 4, 512))
    assert (given[0].x % 16, given[1].y % 16) == (0, 0)


def test_what_peers_read_lives_until_their_next_dispatch(engine: LowLatency) -> None:
    *_, handle, _ = dispatch(engine)
    y = engine._arena.empty((5, 4, 512), torch.bfloat16)
    combine(engine, handle, y, zero_copy=True)
    space, slots = handle.space, handle.set
    assert space.shown[slots] is y
    dispatch(engine)
    assert space.shown[slots] is y
    *_, hook = dispatch(engine, with_hook=True)
    assert space.shown[slots] is y
    hook()
    assert space.shown[slots] is None


def test_two_results_may_be_alive(engine: LowLatency) -> None:
    one, two = dispatch(engine), dispatch(engine)
    with pytest.raises(DeepEPError, match="the result of the dispatch before the last is alive"):
        dispatch(engine)
    combine(engine, one[2])
    three = dispatch(engine)
    with pytest.raises(ArgumentError, match="a later low_latency_dispatch has taken"):
        combine(engine, one[2])
    del two
    dispatch(engine)
    combine(engine, three[2])
    combine(engine, three[2])  # as often as one likes


def test_a_result_that_is_alive_alone_keeps_its_slots(engine: LowLatency) -> None:
    """Sets take turns on every rank, whatever lives there."""
    one = dispatch(engine)
    combine(engine, dispatch(engine)[2])
    with pytest.raises(DeepEPError, match="the result of the dispatch before the last is alive"):
        dispatch(engine)
    del one
    dispatch(engine)


def test_a_handle_may_be_dropped_before_its_combine_has_run(engine: LowLatency, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[tuple[set[int], int]] = []
    monkeypatch.setattr(
        low_latency,
        "used_here",
        lambda tensors, made_on: used.append(({t.data_ptr() for t in tensors if t is not None}, made_on)),
    )
    monkeypatch.setattr(engine, "_ordered", lambda: nullcontext(7))
    *_, handle, hook = dispatch(engine, with_hook=True)
    hook()
    monkeypatch.setattr(engine, "_ordered", lambda: nullcontext(8))  # as with async_finish: another stream
    z, hook = combine(engine, handle, with_hook=True)
    hook()
    picks = handle.pick_index.data_ptr()
    assert [made_on for _, made_on in used] == [7, 7, 8] and used[1][0] == {picks}
    assert {picks, handle[0].data_ptr()} <= used[0][0]
    assert {picks, z.data_ptr(), WEIGHTS.data_ptr(), IDX.data_ptr()} <= used[2][0]


def test_timeouts_that_do_not_fit_into_64_bits(engine: LowLatency, kernels: Kernels) -> None:
    engine._peers.timeout = 1e300
    combine(engine, dispatch(engine)[2])
    assert kernels.launched


def visible(engine: LowLatency) -> Tensor:
    return engine._arena.empty((5, 4, 512), torch.bfloat16)


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda e: dispatch(e, x=torch.cat([X, X]), idx=torch.cat([IDX, IDX])), "6 tokens"),
        (lambda e: dispatch(e, x=X[:, :100]), "multiple of 128, got 100"),
        (lambda e: dispatch(e, x=X[:, :128], use_ue8m0=True, round_scale=True), "multiple of 512, got 128"),
        (lambda e: dispatch(e, x=torch.zeros(3, 16512, dtype=torch.bfloat16)), "hidden size up to 16384, got 16512"),
        (lambda e: dispatch(e, idx=torch.zeros(3, 17, dtype=torch.int64)), "top-k up to 16, got 17"),
        (lambda e: dispatch(e, num_experts=1025), "num_experts up to 1024, got 1025"),
        (lambda e: dispatch(e, use_ue8m0=True), "use_ue8m0=True needs"),
        (lambda e: dispatch(e, use_fp8=1), "use_fp8 must be True or False, got 1"),
        (lambda e: dispatch(e, with_hook=True, async_finish=True), "return_recv_hook=True cannot be had"),
        (lambda e: dispatch(e, wait_stats=torch.zeros(1)), "dispatch_wait_recv_cost_stats must be a int64"),
        (lambda e: combine(e, (1, 2, 3)), "handle must be"),
        (lambda e: combine(e, dispatch(e)[2], zero_copy=True), "get_next_low_latency_combine_buffer"),
        (lambda e: combine(e, dispatch(e)[2], out=torch.cat([X, X], 1)[:, ::2]), "out must be contiguous"),
        (lambda e: combine(e, dispatch(e)[2], y := visible(e), zero_copy=True, out=y[0, :3]), "out must not overlap x"),
        (lambda e: e.update_mask(1, True), "rank_to_mask"),
    ],
)  # fmt: skip
def test_refusals(engine: LowLatency, call: Callable[[LowLatency], Any], text: str) -> None:
    for _ in range(2):  # before and after the first call of the shape
        with pytest.raises(ArgumentError, match=text):
            call(engine)
        dispatch(engine)


def test_bad_indices_are_told_once(engine: LowLatency) -> None:
    engine.check()
    engine._bad_index.fill_(1)
    with pytest.raises(ArgumentError, match="outside"):
        engine.check()
    engine.check()


def test_starting_anew_forgets(engine: LowLatency) -> None:
    kept = dispatch(engine), dispatch(engine, with_hook=True)
    engine.clean(4, 512, 5)
    dispatch(engine), dispatch(engine, with_hook=True)
    for *_, handle, _ in kept:
        with pytest.raises(ArgumentError, match="has taken"):
            combine(engine, handle)
    with pytest.raises(DeepEPError, match="may be called once"):
        kept[1][3]()


def test_a_capture_counts_as_a_call_and_its_set_may_be_taken_outside(
    engine: LowLatency, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What docs/low_latency.md says of CUDA graphs, as far as the CPU knows."""
    with pytest.MonkeyPatch.context() as capturing:
        capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(DeepEPError, match="first low_latency_dispatch of a shape cannot be captured"):
            dispatch(engine)
    before = dispatch(engine)[2]
    combine(engine, before)
    with pytest.MonkeyPatch.context() as capturing:
        capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        capturing.setattr(Memory, "keep", lambda *_: None, raising=False)
        captured = dispatch(engine)[2]
        combine(engine, captured)
    assert captured.set != before.set and captured.space.was_captured
    one, two = dispatch(engine)[2], dispatch(engine)[2]
    assert (one.set, two.set) == (before.set, captured.set)  # so a replay would end `two`, unseen
    with pytest.raises(DeepEPError, match="the result of the dispatch before the last is alive"):
        dispatch(engine)
    with pytest.raises(ArgumentError, match="has taken"):
        combine(engine, captured)
    combine(engine, two)
