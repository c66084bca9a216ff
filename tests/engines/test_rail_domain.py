"""What a rank whose exchange between nodes has failed tells its node; the kernels' side is made up."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from deepep_train import DeepEPError, PeerTimeoutError
from deepep_train.engines.rail_domain import RailDomain


@pytest.mark.parametrize(
    ("cause", "told", "silent", "kind"),
    [
        ("their rows", -1, [3], PeerTimeoutError),  # the node's ranks must not take this one for the culprit
        ("gave up", -1, [3], PeerTimeoutError),
        ("gave up", -1, [], DeepEPError),
        ("mismatched", 0, [], DeepEPError),
        ("refused", 0, [], DeepEPError),
    ],
)
def test_a_failure_between_nodes_is_told_in_the_node(
    cause: str, told: int, silent: list[int], kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    said = []
    domain = object.__new__(RailDomain)
    domain._lock, domain.device, domain._processes = threading.RLock(), torch.device("cuda"), []
    domain.stream = lambda: 0  # type: ignore[method-assign]
    domain.end = SimpleNamespace(
        failure=lambda: SimpleNamespace(number=7, cause=cause, ranks=[2]),
        refuse=lambda gone, _: said.append(("rail", gone)),
    )
    domain.comm = SimpleNamespace(is_well=lambda: True, refuse=lambda what, num_bytes, _: said.append((what, num_bytes)))
    domain.peers = SimpleNamespace(  # type: ignore[assignment]
        rank=0, timeout=5.0, say_here=lambda: said.append("here"), roll_call=lambda: silent
    )
    error = domain.failure()
    assert type(error) is kind
    assert getattr(error, "ranks", None) == (tuple(silent) if silent else None)
    assert said == [("rail", True), ("dispatch", told), *([] if told else ["here"])]
