"""How `Buffer` and `doctor` choose an engine where the first choice cannot be had; GPUs are made up."""

from __future__ import annotations

from typing import Any

import pytest
import torch

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
