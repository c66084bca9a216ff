"""Ranks that do not come, die or leave: the others raise in time, name them, and nobody hangs."""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from draws import Exchange
from harness import run_ranks

import deepep_train as dt

TIMEOUT = 2.0
SLACK = 5.0  # for the roll call and a busy machine
_kept: list[Any] = []


def call(buffer: dt.Buffer, rank: int) -> tuple[dt.Dispatched, torch.Tensor]:
    case = Exchange((3, 2, 4)[: buffer.group_size], 4, 2, 2, "holes", torch.float32)
    given = case.given()[rank]
    x = torch.ones(given.x.shape, requires_grad=True)
    out = dt.dispatch(x, given.topk_idx, buffer=buffer, num_experts=case.num_experts)
    return out, x


def seen_by(action: Callable[[], Any]) -> dict[str, Any]:
    """The exception that `action` raises and how long it took."""
    started = time.monotonic()
    try:
        action()
    except dt.DeepEPError as error:
        kind, text = type(error).__name__, str(error)
        known = {name: getattr(error, name, None) for name in ("ranks", "operation")}
        return {"kind": kind, "text": text, "seconds": time.monotonic() - started, **known}
    return {"kind": None}


def wait_for(key: str, numbers: list[int]) -> None:
    dist.distributed_c10d._get_default_store().wait([f"{key}/{n}" for n in numbers], timedelta(seconds=60))


def tell(key: str, number: int) -> None:
    dist.distributed_c10d._get_default_store().set(f"{key}/{number}", "done")


# A rank that never comes ------------------------------------------------------------------------------------------------

OPERATIONS: dict[str, Callable[[dt.Buffer, dt.Dispatched, torch.Tensor, torch.Tensor], Any]] = {
    "dispatch": lambda b, out, x, z: call(b, b.rank),
    "cached dispatch": lambda b, out, x, z: dt.dispatch(x, buffer=b, handle=out.handle),
    "combine": lambda b, out, x, z: dt.combine(out.x, out.handle),
    "backward": lambda b, out, x, z: z.sum().backward(),
    "buffer": lambda b, out, x, z: dt.Buffer(b.group, timeout=TIMEOUT),
}


def one_stays_away(rank: int, size: int, group: dist.ProcessGroup, absent: int) -> dict[str, list[dict]]:
    """Every operation in a group of its own, because a group that timed out is of no use any more."""
    groups = {name: dist.new_group() for name in OPERATIONS}
    ready = {}
    for name, own in groups.items():
        buffer = dt.Buffer(own, timeout=TIMEOUT)
        out, x = call(buffer, rank)
        ready[name] = (buffer, out, x, dt.combine(out.x, out.handle))
    tell("ready", rank)
    wait_for("ready", list(range(size)))
    if rank == absent:
        wait_for("finished", [r for r in range(size) if r != absent])
        return {}

    def watch(name: str) -> list[dict]:
        buffer, *rest = ready[name]
        seen = [seen_by(lambda: OPERATIONS[name](buffer, *rest))]
        if name == "buffer":  # there is none, then
            return seen
        out = rest[0]
        later = [buffer.check, lambda: dt.combine(out.x, out.handle), lambda: call(buffer, rank), buffer.destroy]
        return seen + [seen_by(again) for again in later]

    with ThreadPoolExecutor(len(OPERATIONS)) as threads:  # they only wait
        results = dict(zip(OPERATIONS, threads.map(watch, OPERATIONS), strict=True))
    tell("finished", rank)
    return results


def test_a_rank_that_never_comes() -> None:
    everyone = run_ranks(3, one_stays_away, 1, fresh=True, timeout=120)
    for rank in (0, 2):
        for name in OPERATIONS:
            first, *later = everyone[rank][name]
            assert first["kind"] == "PeerTimeoutError", (name, first)
            assert first["ranks"] == (1,), (name, first)
            assert TIMEOUT - 0.5 < first["seconds"] < TIMEOUT + SLACK, (name, first)
            assert f"rank {rank}" in first["text"]
            assert "rank 1 did not take part within 2 s" in first["text"]
            assert first["operation"]
            for again in later:  # sticky, and at once
                assert (again["kind"], again["text"]) == ("PeerTimeoutError", first["text"]), (name, again)
                assert again["seconds"] < 0.5


def one_is_late(rank: int, size: int, group: dist.ProcessGroup, timeout: float) -> bool:
    buffer = dt.Buffer(group, timeout=timeout)
    time.sleep(0.7 if rank == 0 else 0)
    out, x = call(buffer, rank)
    time.sleep(0.7 if rank == 1 else 0)
    dt.combine(out.x, out.handle).sum().backward()
    buffer.check()
    buffer.destroy()
    return x.grad is not None


@pytest.mark.parametrize("timeout", [20, 1e10, 1e11])
def test_being_late_is_fine(timeout: float) -> None:
    """Also with timeouts that do not fit into 64 bits as nanoseconds."""
    assert run_ranks(2, one_is_late, timeout) == [True, True]


# A rank that dies -------------------------------------------------------------------------------------------------------


def one_dies(rank: int, size: int, group: dist.ProcessGroup, victim: int) -> list[dict]:
    buffer = dt.Buffer(group, timeout=30)
    out, _ = call(buffer, rank)
    if rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    return [seen_by(lambda: dt.combine(out.x, out.handle)), seen_by(buffer.check), seen_by(lambda: call(buffer, rank))]


@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_that_is_killed_is_noticed_at_once(victim: int) -> None:
    everyone = run_ranks(3, one_dies, victim, fresh=True, dead=(victim,))
    for rank, seen in enumerate(everyone):
        if rank != victim:
            for error in seen:
                assert error["kind"] == "PeerTimeoutError", error
                assert error["ranks"] == (victim,), error
                assert f"rank {victim}" in error["text"]
            assert seen[0]["seconds"] < 10


# Leaving ----------------------------------------------------------------------------------------------------------------


def leave_without_goodbye(rank: int, size: int, group: dist.ProcessGroup) -> None:
    """Buffers, handles and a graph stay alive to the end of the process; rank 1 stays a little longer."""
    buffer = dt.Buffer(group)
    out, x = call(buffer, rank)
    z = dt.combine(out.x, out.handle)
    _kept.extend([buffer, out, x, z])
    second = dt.Buffer(group)
    call(second, rank)
    del second  # collected here on every rank, without a collective
    if rank == 1:
        time.sleep(1.0)


def test_leaving_without_destroy_hangs_nobody() -> None:
    run_ranks(2, leave_without_goodbye, fresh=True)  # which checks that every process ends by itself with status 0


# Exceptions -------------------------------------------------------------------------------------------------------------


def test_exceptions_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(dt.PeerTimeoutError("rank 1 is gone", [1], "combine")))
    assert (str(error), error.ranks, error.operation) == ("rank 1 is gone", (1,), "combine")
    wrong = pickle.loads(pickle.dumps(dt.ArgumentError("x is wrong", "x", [0, 2])))
    assert (str(wrong), wrong.argument, wrong.ranks) == ("x is wrong", "x", (0, 2))
