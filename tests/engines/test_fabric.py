"""Whether GPUs may put over the network, as files and settings tell."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepep_train.engines import fabric

CARD = {"sys/class/infiniband/mlx5_0/ports/1/state": "4: ACTIVE"}
DOORBELL = {"proc/driver/nvidia/params": 'RegistryDwords: "PeerMappingOverride=1;"'}
GDRCOPY = {"sys/module/gdrdrv/version": "2.5"}


@pytest.mark.parametrize(
    ("files", "settings", "text"),
    [
        (CARD | DOORBELL, {}, "NVSHMEM_IB_ENABLE_IBGDA=1 is not set"),
        (DOORBELL, {"IB_ENABLE_IBGDA": "1"}, "no mlx5 card"),
        ({"sys/class/infiniband/mlx5_0/ports/1/state": "1: DOWN"} | DOORBELL, {"IB_ENABLE_IBGDA": "1"}, "no mlx5 card"),
        ({"sys/class/infiniband/efa_0/ports/1/state": "4: ACTIVE"} | DOORBELL, {"IB_ENABLE_IBGDA": "1"}, "no mlx5 card"),
        (CARD, {"IB_ENABLE_IBGDA": "1"}, "doorbell"),
        (CARD | GDRCOPY, {"IB_ENABLE_IBGDA": "1", "IBGDA_NIC_HANDLER": "gpu"}, "doorbell"),
        (CARD | GDRCOPY, {"IB_ENABLE_IBGDA": "1"}, ""),
        (CARD | DOORBELL, {"IB_ENABLE_IBGDA": "1"}, ""),
        (CARD, {"IB_ENABLE_IBGDA": "1", "IBGDA_NIC_HANDLER": "cpu_host_memory"}, ""),
    ],
)
def test_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], settings: dict[str, str], text: str
) -> None:
    for name in ("IB_ENABLE_IBGDA", "IBGDA_NIC_HANDLER"):
        monkeypatch.delenv(f"NVSHMEM_{name}", raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(f"NVSHMEM_{name}", value)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    found = fabric.obstacle(tmp_path)
    assert (text in found) if text else not found
