"""The harness itself: failures come with their traceback, deadlines hold, and the next test is not harmed."""

from __future__ import annotations

import atexit
import os
import time

import pytest
import torch
import torch.distributed as dist
from harness import RankFailure, run_ranks, same_bits
from needs import need


def add(rank: int, size: int, group: dist.ProcessGroup, number: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(number, group=group)
    return number


def fail(rank: int, size: int, group: dist.ProcessGroup, how: str) -> None:
    if how == "raise":
        raise LookupError("no such luck")
    if how == "die":
        os.write(2, b"it is the store")
        os._exit(7)
    time.sleep(30)


@pytest.mark.parametrize(
    "how,text",
    [
        ("raise", "LookupError: no such luck"),
        ("die", "exit code 7; its last words:\nit is the store"),
        ("hang", "no answer within 1 s"),
    ],
)
def test_failures_are_told_and_the_next_run_works(how: str, text: str) -> None:
    run_ranks(1, add, torch.ones(1))
    started = time.monotonic()
    with pytest.raises(RankFailure, match=text):
        run_ranks(1, fail, how, timeout=1.0)
    assert time.monotonic() - started < 10
    assert run_ranks(1, add, torch.ones(1))[0].item() == 1


def abort_at_the_end(rank: int, size: int, group: dist.ProcessGroup, words: str) -> None:
    def end() -> None:
        os.write(2, words.encode())
        os.abort()

    atexit.register(end)


def test_only_gloos_own_way_of_ending_is_forgiven() -> None:
    run_ranks(1, abort_at_the_end, "terminate called without an active exception\n", fresh=True)
    for words in ("", "an assertion\n", "terminate called after throwing an instance of 'std::runtime_error'\n"):
        with pytest.raises(RankFailure, match="did not exit cleanly"):
            run_ranks(1, abort_at_the_end, words, fresh=True)


def test_results_keep_their_bits_and_strides() -> None:
    column_major = torch.tensor([[float("nan"), -0.0], [1e-45, 1.0]]).t()
    (got,) = run_ranks(1, add, column_major)
    assert same_bits(got, column_major)
    assert got.stride() == column_major.stride()


def test_same_bits_sees_what_equality_does_not() -> None:
    zero = torch.zeros(2)
    assert not same_bits(zero, -zero)
    assert not same_bits(zero, zero.double())
    assert not same_bits(zero, None)
    assert same_bits(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
    assert same_bits(None, None)


def test_what_ci_must_have_is_not_skipped_there(monkeypatch: pytest.MonkeyPatch) -> None:
    need("found", "nothing is missing")
    monkeypatch.setenv("DEEPEP_TRAIN_CI", "1")
    with pytest.raises(pytest.fail.Exception, match="there is no nvcc"):
        need(None, "there is no nvcc")
    monkeypatch.delenv("DEEPEP_TRAIN_CI")
    with pytest.raises(pytest.skip.Exception, match="there is no nvcc"):
        need(None, "there is no nvcc")
