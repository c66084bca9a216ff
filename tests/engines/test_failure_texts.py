"""The texts of failures on the device, from made-up codes: no GPU is needed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deepep_train import ArgumentError, DeepEPError, PeerTimeoutError
from deepep_train.engines import processes
from deepep_train.engines.base import DispatchRequest, Payload
from deepep_train.engines.nvlink_failures import cuda_failed, device_error, layout_error, who_ended
from deepep_train.engines.rail_failures import counts_error, rail_error
from deepep_train.routing import rank_layout

HERE = processes.identity()
GONE = [*HERE[:3], "1"]  # this process's number, started at another time

needs_proc = pytest.mark.skipif(not HERE, reason="there is no /proc")


def failure(cause: str, **more: Any) -> Any:
    given = {"operation": "dispatch", "epoch": 7, "meeting": "their readiness", "ranks": [2], "bytes": 0}
    return SimpleNamespace(cause=cause, rows=[1, 2, 30], bounds=[9, 9, 9], **(given | more))


@pytest.mark.parametrize(
    ("cause", "kind", "text"),
    [
        ("missing", PeerTimeoutError, "dispatch (number 7) on rank 0: waited 5 s in vain for their readiness of rank 2; this"),
        ("blamed", PeerTimeoutError, "other ranks gave up on rank 2; this buffer can no longer be used"),
        ("astray", DeepEPError, "other ranks found rank 2 in another call, or with another handle or shapes"),
        ("mismatched", DeepEPError, "rank 2 is in another call, or its handle or shapes differ"),
        ("overflow", ArgumentError, "rank 2: num_worst_tokens=9 but 30 rows arrive"),
        ("refused", DeepEPError, "rank 2 refused to take part: see the exception raised there; results are NaN"),
        ("bad counts", ArgumentError, "on rank 0: the arguments of rank 2 are wrong or differ from this rank's; this"),
    ],
)
def test_every_cause_has_its_text(cause: str, kind: type, text: str) -> None:
    error = device_error(failure(cause), 0, 5.0, [])
    assert type(error) is kind
    assert text in str(error)
    assert getattr(error, "ranks", [2]) in ([2], (2,))


def test_whose_topk_idx_is_wrong_is_told() -> None:
    """Bit 63 is the sign."""
    error = device_error(failure("bad counts", ranks=[1, 2, 63], bytes=-(1 << 63) | 1 << 1), 0, 5.0, [])
    assert "topk_idx of rank 1, 63 has an index outside [-1, num_experts), or counts beside it that are not its own" in str(
        error
    )
    assert "and the arguments of rank 2 are wrong or differ" in str(error)
    assert isinstance(error, ArgumentError) and error.argument == "topk_idx" and list(error.ranks) == [1, 2, 63]


def test_whose_topk_idx_is_wrong_is_told_between_nodes() -> None:
    report = [1, 0, 0, 0, 2, 1, 0, *[4096] * 4, *[0] * 4]  # of four ranks: the second miscounted, the third differs
    error = counts_error(report, 9, 0, lambda rows, row_bytes: rows * row_bytes)
    assert "topk_idx of rank 1 has an index outside" in str(error) and "and the arguments of rank 2 are wrong" in str(error)
    assert isinstance(error, ArgumentError) and error.argument == "topk_idx" and list(error.ranks) == [1, 2]


def test_a_refusal_says_why() -> None:
    assert "exchange with other nodes" in str(device_error(failure("refused", bytes=-1), 0, 5.0, []))
    assert "no room for 4096 bytes" in str(device_error(failure("refused", bytes=4096), 0, 5.0, []))


@pytest.mark.parametrize(
    ("cause", "kind", "text"),
    [
        (
            "their readiness",
            PeerTimeoutError,
            "exchange 7 between nodes on rank 0: waited 5 s in vain for their readiness of rank 2",
        ),
        ("their rows", PeerTimeoutError, "in vain for their rows of rank 2; this buffer can no longer be used"),
        ("mismatched", DeepEPError, "rank 2 is in another call, or its handle or shapes differ"),
        ("refused", DeepEPError, "rank 2 refused to take part: see the exception raised there; results are NaN"),
        ("gave up", DeepEPError, "rank 2 has failed: see the exception raised there"),
    ],
)
def test_every_cause_between_nodes_has_its_text(cause: str, kind: type, text: str) -> None:
    error = rail_error(SimpleNamespace(number=7, cause=cause, ranks=[2]), 0, 5.0)
    assert type(error) is kind
    assert text in str(error)


@needs_proc
def test_those_who_ended_are_named() -> None:
    assert who_ended([HERE, HERE]) == ""
    assert who_ended([HERE, GONE]) == "; the process of rank 1 has ended"
    assert who_ended([GONE, HERE, GONE]) == "; ended: ranks 0, 2"
    assert "in vain for their readiness of rank 2; the process of rank 2 has ended; this" in str(
        device_error(failure("missing"), 0, 5.0, [HERE, HERE, GONE])
    )
    assert str(cuda_failed("broken", 1, [GONE])) == "CUDA has failed on rank 1: broken; the process of rank 0 has ended"


def test_a_flagged_layout_is_explained() -> None:
    idx = torch.tensor([[0], [5]])
    layout = rank_layout(idx.clamp(max=1), 2, 2)
    request = DispatchRequest(Payload(torch.zeros(2, 8)), layout, idx, None, 2, "rank", 1)
    assert "got values from 0 to 5" in str(layout_error(request))
    wrong = layout._replace(num_tokens_per_rank=layout.num_tokens_per_rank + 1)
    assert "does not count is_token_in_rank" in str(
        layout_error(DispatchRequest(request.payload, wrong, idx, None, 2, "rank", 1))
    )
