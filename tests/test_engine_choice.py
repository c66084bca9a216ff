"""How `Buffer` and `doctor` choose an engine where the first choice cannot be had; GPUs are made up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import run_ranks

from deepep_train import Buffer, DeepEPError, buffer, engines
from deepep_train.cli import doctor
from deepep_train.errors import ArgumentError


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """nvlink looks usable, and then its memory cannot be opened."""
    create = engines.create

    def refuses(name: str, *how: Any) -> Any:
        if name == "nvlink":
            raise engines.NoPeerAccess("rank 0: cudaIpcOpenMemHandle failed")
        return create(name, *how)

    monkeypatch.setattr(engines, "create", refuses)
    monkeypatch.setattr(engines, "choose", lambda name: engines.Choice("nvlink", [f"{name} takes it"]))


def test_auto_takes_collective_where_memory_cannot_be_opened(closed: None) -> None:
    made = Buffer(engine="auto")
    assert made.engine == "collective"
    assert made.engine_reasons == ["nvlink: rank 0: cudaIpcOpenMemHandle failed"]


def test_nvlink_asked_for_by_name_is_an_error_there(closed: None) -> None:
    with pytest.raises(DeepEPError, match="cudaIpcOpenMemHandle failed"):
        Buffer(engine="nvlink")


def across_nodes(rank: int, size: int, group: Any, has_nvshmem: bool, refused: bool) -> tuple[str, list[str]]:
    """The engine of low-latency calls between two nodes of one rank, as far as it is chosen: no GPU is needed for that."""
    create, asked = engines.create, []

    def noted(name: str, *how: Any) -> Any:
        asked.append(name)
        if name == "rdma" and refused:
            raise DeepEPError("rank 1: NVSHMEM has no 7 bytes more")
        return create("collective", *how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "create", noted)
        found = engines.Surveyed("rdma", has_nvshmem or rank == 0, "there is no NVSHMEM")
        patch.setattr(engines, "_survey_rdma", lambda _: found)
        made = Buffer(group, low_latency_mode=True, num_local_ranks=1, timeout=20)
    return f"{made.engine}, asked for {', '.join(asked)}", made.engine_reasons


def test_low_latency_calls_across_nodes_want_nvshmem_on_every_rank() -> None:
    for chosen, _ in run_ranks(2, across_nodes, True, False):
        assert chosen == "rdma, asked for rdma"
    for chosen, reasons in run_ranks(2, across_nodes, False, False):
        assert chosen == "collective, asked for collective"
        assert reasons[-1] == "rdma on rank 1: there is no NVSHMEM"
    for chosen, reasons in run_ranks(2, across_nodes, True, True):
        assert (chosen, reasons) == ("collective, asked for rdma, collective", ["rdma: rank 1: NVSHMEM has no 7 bytes more"])


@pytest.mark.parametrize(
    ("backend", "caching", "why"),
    [
        ("native", "0", ""),
        ("cudaMallocAsync", "", "'cudaMallocAsync' (PYTORCH_CUDA_ALLOC_CONF)"),
        ("native", "1", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"),
    ],
)
def test_allocators_without_pools_are_obstacles(backend: str, caching: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: backend)
    monkeypatch.setattr(engines, "_kernels_obstacle", lambda: "")
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda _: True)
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", caching)
    found = engines._survey_nvlink()
    assert found.usable == (not why)
    assert why in found.reason


def test_doctor_looks_at_the_pairs_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "choose", lambda _: engines.Choice("nvlink", []))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: (a, b) != (1, 0))
    monkeypatch.setattr(doctor, "_gpus", list)
    report = doctor.examine()
    assert report["peer access"] == {"complete": False, "missing": [(1, 0)]}
    assert report["auto"]["engine"] == "collective"
    assert "no peer access from GPU 1 to 0" in doctor.as_text(report)


def test_v1s_default_configuration_leaves_the_sms_to_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Buffer, "_sms_are_set", False)
    assert buffer._sms_of(Buffer.get_dispatch_config(8)) == 0
    assert Buffer.get_combine_config(8).num_sms == 20  # as V1's reads
    monkeypatch.setattr(Buffer, "num_sms", Buffer.num_sms)
    Buffer.set_num_sms(6)
    assert buffer._sms_of(Buffer.get_dispatch_config(8)) == 6


# Between hosts --------------------------------------------------------------------------------------------------------------


def here(host: int, across: str = "") -> dict[str, str]:
    return {"host": f"node{host}", "gpu": "GPU-0", "obstacle": "", "no rdma": "", "no puts": across}


def test_rdma_needs_nodes_whose_gpus_may_put(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "obstacle", lambda node, first: f"{len(node)} from {first}")
    everyone = [here(r // 2) for r in range(4)]
    assert engines.obstacle_across(everyone, 3, 2, None) == "2 from 2"
    assert engines.obstacle_across(everyone, 0, 2, True) == "2 from 0"
    assert "two_level=False" in engines.obstacle_across(everyone, 0, 2, False)
    assert "rank 0 on host 'node0' and rank 2 on host 'node1'" in engines.obstacle_across(everyone, 0, 4, None)
    assert "of one node" in engines.obstacle_across([here(0)] * 4, 0, 4, None)
    everyone[2]["no puts"] = "no card"
    assert engines.obstacle_across(everyone, 0, 2, None) == "rank 2: no card"


def between_hosts(rank: int, size: int, group: Any, across: str, fails: bool) -> tuple[str, list[str]]:
    """A Buffer whose ranks seem to be on machines of their own; `across`: what rank 1 lacks for rdma."""
    create, tried = engines.create, []

    def made(name: str, *how: Any) -> Any:
        tried.append(name)
        if name == "rdma" and fails:
            raise DeepEPError("Buffer: rank 0: no bytes left")
        return create("collective", *how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "choose", lambda name: engines.Choice("nvlink", []))
        patch.setattr(engines, "whereabouts", lambda: here(rank, across if rank == 1 else ""))
        patch.setattr(engines, "obstacle", lambda node, first=0: "" if len(node) == 1 else "the ranks are on several hosts")
        patch.setattr(engines, "create", made)
        found = Buffer(group, timeout=20)
    assert found.engine == tried[-1]
    return found.engine, found.engine_reasons


@pytest.mark.parametrize(
    ("across", "fails", "name", "reason"),
    [
        ("", False, "rdma", "nvlink on rank 0: the ranks are on several hosts"),
        ("no card", False, "collective", "rdma on rank 0: rank 1: no card"),
        ("", True, "collective", "rdma: Buffer: rank 0: no bytes left"),
    ],
)
def test_auto_between_hosts(across: str, fails: bool, name: str, reason: str) -> None:
    for engine, reasons in run_ranks(2, between_hosts, across, fails):
        assert engine == name
        assert reason in reasons


@pytest.mark.parametrize(
    ("hosts", "local", "told"),
    [
        ("aaab", 2, "rank 2 on host 'a' and rank 3 on host 'b'"),
        ("aaab", 4, "rank 0 on host 'a' and rank 3 on host 'b'"),
        ("abab", 2, "rank 0 on host 'a' and rank 1 on host 'b'"),
        ("abb", 1, ""),
        ("aabb", 2, ""),
        ("aaaa", 2, ""),  # nodes that one host plays
        ("abba", 1, ""),
        ("a" * 130, 65, "nodes of 65 ranks, above the rdma engine's limit of 64"),
        ("a" * 514, 2, "257 nodes of 2 ranks, above the rdma engine's limit of 256 nodes"),
        ("a" * 512, 2, ""),
    ],
)
def test_a_node_is_of_one_host(hosts: str, local: int, told: str) -> None:
    found = engines.mesh_obstacle(list(hosts), local)
    assert told in found and bool(told) == bool(found)
    if hosts == "aaab":
        assert "3 x 'a', 1 x 'b'" in found
        assert engines.num_local_ranks(list(hosts)) == 4


def on_hosts(rank: int, size: int, group: Any, hosts: str, engine: str, local: int) -> tuple[str, str]:
    """The engine taken, or the error; and why."""
    with pytest.MonkeyPatch.context() as patch:
        create = engines.create
        patch.setattr(engines, "choose", lambda name: engines.Choice("rdma" if name == "rdma" else "nvlink", []))
        patch.setattr(engines, "whereabouts", lambda: here(0) | {"host": hosts[rank]})
        patch.setattr(engines, "obstacle", lambda node, first=0: "several hosts" if len(node) == size else "")
        patch.setattr(engines, "create", lambda name, *how: create("collective", *how))
        try:
            found = Buffer(group, engine=engine, num_local_ranks=local, timeout=20)
        except ArgumentError as error:
            return "refused", str(error)
    return found.engine, "; ".join(found.engine_reasons)


@pytest.mark.parametrize(("engine", "taken"), [("rdma", "refused"), ("auto", "collective")])
def test_a_node_of_two_hosts_is_refused_on_every_rank(engine: str, taken: str) -> None:
    for found, why in run_ranks(2, on_hosts, "ab", engine, 2):
        assert found == taken
        assert "rank 0 on host 'a' and rank 1 on host 'b' would be of one node" in why
