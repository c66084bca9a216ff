"""Low-latency calls with ranks on other nodes, as far as the CPU knows: what is put, and NVSHMEM's memory; no kernel runs."""

from __future__ import annotations

import importlib.util
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("deepep_train._C") is None:
    pytest.skip("the package was built without nvcc, so it has no kernels", allow_module_level=True)

from low_latency_stand_ins import Event, Kernels, Memory, combine, dispatch, low_latency_c, ordered

from deepep_train import DeepEPError, PeerTimeoutError
from deepep_train.engines.low_latency import LowLatency
from deepep_train.engines.low_latency_far import OtherNodes
from deepep_train.engines.peers import Peers


class Nvshmem:
    """Stands for `deepep_train._rdma`, of a group of one rank; remembers what came behind the kernels."""

    def __init__(self) -> None:
        self.taken: dict[int, Tensor] = {}
        self.put: list[tuple[str, int]] = []

    def allocate(self, num_bytes: int) -> int:
        memory = torch.full((num_bytes,), 255, dtype=torch.uint8)
        self.taken[memory.data_ptr()] = memory
        return memory.data_ptr()

    def of_peer(self, address: int, rank: int) -> int:
        return address

    def put_dispatch(self, p: Any, stream: int) -> None:
        self.put.append(("dispatch", p.put_bytes))

    def put_combine(self, p: Any, stream: int) -> None:
        self.put.append(("combine", p.put_bytes))

    def answer(self, p: Any, is_combine: bool, stream: int) -> None:
        self.put.append(("pulled" if is_combine else "taken", p.put_bytes))


def across(nvshmem: Nvshmem, peers: Peers | None = None) -> LowLatency:
    device, arena = torch.device("cpu"), Memory()
    far = OtherNodes(nvshmem, nvshmem, 0, 1, 1, device)
    return LowLatency(peers or Peers(None, 5.0), arena, [0], 4, True, ordered, device, far)  # type: ignore[arg-type]


def test_what_is_put_is_counted_by_the_kernels_in_one_place(kernels: Kernels) -> None:
    nvshmem = Nvshmem()
    engine = across(nvshmem)
    assert engine.put_bytes() == 0
    handle = dispatch(engine)[2]
    combine(engine, handle)
    (counter,) = {where for _, where in nvshmem.put}
    assert [name for name, _ in nvshmem.put] == ["dispatch", "taken", "combine", "pulled"]
    assert counter != 0
    assert engine._far is not None
    engine._far.put_bytes += 7 << 40
    assert engine._far.put_bytes.data_ptr() == counter and engine.put_bytes() == 7 << 40


def test_a_later_buffer_uses_the_memory_of_a_destroyed_one(kernels: Kernels) -> None:
    nvshmem = Nvshmem()
    first = across(nvshmem)
    *_, hook = dispatch(first, with_hook=True)
    dispatch(first, max_tokens=9)
    assert len(nvshmem.taken) == 2
    first.close()
    with pytest.raises(DeepEPError, match="has been destroyed"):
        hook()
    second = across(nvshmem)
    dispatch(second, max_tokens=3)  # fits the smaller one
    dispatch(second, max_tokens=9)
    assert len(nvshmem.taken) == 2
    control = low_latency_c.control_bytes()
    assert all(not memory[:control].any() for memory in nvshmem.taken.values())
    dispatch(second, max_tokens=8)  # both are taken
    assert len(nvshmem.taken) == 3


def test_memory_that_is_in_use_or_in_a_graph_stays(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    nvshmem = Nvshmem()
    first = across(nvshmem)
    handle = dispatch(first)[2]
    monkeypatch.setattr(Event, "is_over", False)
    first.close()
    monkeypatch.setattr(Memory, "keep", lambda *_: None, raising=False)
    second = across(nvshmem)
    handle = dispatch(second)[2]
    assert len(nvshmem.taken) == 2  # the GPU has not come to the end of the first's calls
    monkeypatch.setattr(Event, "is_over", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    combine(second, handle)
    with pytest.raises(DeepEPError, match="capture"):
        second.put_bytes()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    second.close()
    third = across(nvshmem)
    dispatch(third)
    assert len(nvshmem.taken) == 2  # the first's
    fourth = across(nvshmem)
    dispatch(fourth)
    assert len(nvshmem.taken) == 3  # the second's may be replayed


class BrokenPeers(Peers):
    """Of which one does not come: then there is no next round."""

    def gather_objects(self, mine: Any, operation: str) -> list[Any]:
        self.check()
        return [mine]


def test_memory_that_a_rank_does_not_come_for_is_not_waited_for_for_ever(kernels: Kernels) -> None:
    nvshmem, may_return = Nvshmem(), threading.Event()
    allocate = nvshmem.allocate
    nvshmem.allocate = lambda num_bytes: (may_return.wait(20), allocate(num_bytes))[1]  # type: ignore[method-assign]
    engine = across(nvshmem, BrokenPeers(None, 0.1))
    try:
        with pytest.raises(PeerTimeoutError, match=r"collective call within 0\.1 s"):
            dispatch(engine)
        assert not engine._spaces
    finally:
        may_return.set()


class OddPeers(Peers):
    """In the second round of a first call another rank has an error, if `is_odd`."""

    def __init__(self) -> None:
        super().__init__(None, 5.0)
        self.is_odd = True

    def gather_objects(self, mine: Any, operation: str) -> list[Any]:
        return [mine | {"error": "no memory"} if self.is_odd and "offset" in mine else mine]


def test_memory_of_a_space_that_was_not_made_is_used_again(kernels: Kernels) -> None:
    nvshmem, peers = Nvshmem(), OddPeers()
    engine = across(nvshmem, peers)
    for _ in range(3):  # new memory, and then memory that is used again
        with pytest.raises(DeepEPError, match="no memory"):
            dispatch(engine)
        assert len(nvshmem.taken) == 1
    peers.is_odd = False
    combine(engine, dispatch(engine)[2])
    assert len(nvshmem.taken) == 1
    dispatch(across(nvshmem))  # while the first is in use
    assert len(nvshmem.taken) == 2
