"""How `Buffer` and `doctor` choose an engine where the first choice cannot be had; GPUs are made up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import run_ranks

from deepep_train import Buffer, DeepEPError, buffer, engines
from deepep_train.cli import doctor


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
