"""What `doctor` says of NVSHMEM and cards, on a machine made of files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deepep_train.cli import doctor_network


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def test_a_machine_with_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = "sys/class/infiniband/mlx5_0/ports/1"
    files = {f"{port}/state": "4: ACTIVE", f"{port}/rate": "400 Gb/sec (4X NDR)", f"{port}/link_layer": "InfiniBand"}
    files |= {"proc/driver/nvidia/params": 'EnableStreamMemOPs: 1\nRegistryDwords: "PeerMappingOverride=1;"'}
    write(tmp_path, files | {"sys/module/gdrdrv/version": "2.5"})
    (tmp_path / "sys/class/infiniband/mlx5_1").mkdir()
    monkeypatch.setenv("NVSHMEM_DIR", str(tmp_path / "gone"))
    monkeypatch.setenv("NVSHMEM_IB_SL", "3")
    report = json.loads(json.dumps(doctor_network.examine(tmp_path)))
    assert [device["name"] for device in report["devices"]] == ["mlx5_0", "mlx5_1"]
    text = "\n".join(doctor_network.as_lines(report))
    for part in (
        f"NVSHMEM_DIR={tmp_path / 'gone'} is not a folder; the rdma engine needs NVSHMEM 3.8",
        "mlx5_0: port 1 4: ACTIVE, 400 Gb/sec (4X NDR), InfiniBand",
        "mlx5_1: no ports",
        "PeerMappingOverride set, gdrdrv loaded, nvidia_peermem not loaded",
        "NVSHMEM_IB_SL=3",
    ):
        assert part in text


def test_a_machine_with_nothing(tmp_path: Path) -> None:
    text = "\n".join(doctor_network.as_lines(doctor_network.examine(tmp_path)))
    assert "none under /sys/class/infiniband" in text
    assert "PeerMappingOverride not set, gdrdrv not loaded, nvidia_peermem not loaded" in text


def test_what_can_be_used_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = doctor_network.nvshmem.Found(Path("/n"), "NVSHMEM_DIR", (3, 8, 0))
    monkeypatch.setattr(doctor_network.nvshmem, "find", lambda: found)
    monkeypatch.setattr(doctor_network.nvshmem, "obstacle", lambda given: "")
    assert doctor_network.as_lines(doctor_network.examine())[0] == "NVSHMEM       NVSHMEM 3.8.0 in /n (NVSHMEM_DIR)"
