"""What a rank tells its node when its exchange between nodes has failed, and what is left of a domain that is closed. The
kernels' side is made up."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks

from deepep_train import DeepEPError, PeerTimeoutError
from deepep_train.engines import rail_domain
from deepep_train.engines.nvlink import NvlinkEngine
from deepep_train.engines.peers import Peers
from deepep_train.engines.rail_domain import RailDomain


def failed(cause: str, silent: list[int], said: list[object], monkeypatch: pytest.MonkeyPatch) -> RailDomain:
    """The domain of rank 0, whose exchange with rank 2 has failed; `said`: to whom it says what."""
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
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
    return domain


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
    said: list[object] = []
    error = failed(cause, silent, said, monkeypatch).failure()
    assert type(error) is kind
    assert getattr(error, "ranks", None) == (tuple(silent) if silent else None)
    assert said == [("rail", True), ("dispatch", told), *([] if told else ["here"])]


def test_nothing_is_launched_in_the_node_once_it_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for an event of a buffer that is gone still learns what has failed; the arena may be gone, too."""
    said: list[object] = []
    domain = failed("their rows", [3], said, monkeypatch)
    domain._is_closed = True
    assert isinstance(domain.failure(), PeerTimeoutError)
    assert said == [("rail", True)]
    with pytest.raises(DeepEPError, match="destroyed"), domain.operation(None, "dispatch"):
        pass
    for call in (domain.stats, lambda: domain.empty((1,), torch.uint8)):
        with pytest.raises(DeepEPError, match="destroyed"):
            call()


def test_low_latency_spaces_are_closed_before_the_domain_is(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[object] = []
    domain = failed("their rows", [], said, monkeypatch)
    domain.arena = SimpleNamespace(was_captured=True, begin_operation=lambda: None)  # type: ignore[assignment]
    domain.comm = SimpleNamespace(enter=lambda _: None, leave=lambda _: None, close=lambda keep: said.append(("closed", keep)))

    def close_spaces() -> None:
        with domain._ordered():
            said.append("spaces")

    domain.low_latency = SimpleNamespace(close=close_spaces)  # type: ignore[assignment]
    domain.close()
    assert said == ["spaces", ("closed", True)]


def test_an_event_may_be_waited_for_when_the_buffer_is_gone() -> None:
    domain = object.__new__(NvlinkEngine)
    domain.peers, domain.rank, domain._processes = SimpleNamespace(check=lambda: None), 0, []  # type: ignore[assignment]
    domain._comm = SimpleNamespace(is_well=lambda: True, cuda_error=lambda _: "")
    domain._stream = lambda: 0  # type: ignore[method-assign]
    domain.check()
    domain._lock, domain.device, domain._is_destroyed = threading.RLock(), torch.device("cuda"), True
    domain._here = nullcontext  # type: ignore[method-assign]
    for call in (domain.memory_stats, lambda: domain.empty((1,), torch.uint8, None), domain._ordered().__enter__):
        with pytest.raises(DeepEPError, match="destroyed"):
            call()
    with pytest.raises(DeepEPError, match="destroyed"), domain._operation():
        pass
    assert domain._lock.acquire(blocking=False)


@pytest.mark.parametrize("kind", ["rail", "node", "node, ordered"])
@pytest.mark.parametrize("sees", ["the operation", "its end"])
def test_cuda_that_has_failed_is_what_is_told(kind: str, sees: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever sees it first, and not what else then goes wrong."""
    text = "an earlier kernel failed: cudaErrorLaunchFailure"

    def leave(_: int) -> None:
        raise RuntimeError("cudaEventRecord failed")

    domain = failed("their rows", [], [], monkeypatch) if kind == "rail" else object.__new__(NvlinkEngine)
    domain.comm = domain._comm = SimpleNamespace(enter=lambda _: False, leave=leave, cuda_error=lambda _: text)
    domain.arena = domain._arena = SimpleNamespace(begin_operation=lambda: None)
    if kind != "rail":
        domain._lock, domain._processes, domain.rank = threading.RLock(), [], 0
        domain._here, domain._stream = nullcontext, lambda: 0
    domain._need_open = lambda: None  # type: ignore[method-assign]
    begin = {"rail": "_ordered", "node": "_operation", "node, ordered": "_ordered"}[kind]
    with pytest.raises(DeepEPError, match="CUDA has failed on rank 0: an earlier kernel"), getattr(domain, begin)():
        if sees == "the operation":
            raise RuntimeError("cudaLaunchKernel failed")


def of_other_sizes(rank: int, size: int, group: dist.ProcessGroup) -> str:
    memory = SimpleNamespace(comm=None, arena=None, processes=[], max_sms=1, default_sms={}, gpus=[0] * size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(rail_domain.nvshmem, "start", lambda *_: None)
        patch.setattr(rail_domain, "map_memory", lambda *_: memory)
        with pytest.raises(DeepEPError) as caught:
            RailDomain(Peers(group, 20), 1, 1 << 20, (rank + 1) << 20, 8, lambda: 0)
    return str(caught.value)


def test_memory_between_nodes_must_be_the_same_on_all_ranks() -> None:
    """Nothing is taken before: that is a collective call, which wants it so."""
    for text in run_ranks(2, of_other_sizes):
        assert "bytes between two nodes (num_rdma_bytes): 262144 on rank 0; 524288 on rank 1" in text
