"""What this machine's files and settings tell of the network between nodes (docs/network.md); nothing here asks a driver."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

_SYSTEM = Path("/")


def devices(root: Path = _SYSTEM) -> list[dict[str, Any]]:
    """RDMA cards and their ports."""
    folder = root / "sys/class/infiniband"
    if not folder.is_dir():
        return []
    found = []
    for device in sorted(folder.iterdir()):
        ports = [
            {"port": port.name} | {name: _read(port / name) for name in ("state", "rate", "link_layer")}
            for port in sorted(device.glob("ports/*"))
        ]
        found.append({"name": device.name, "ports": ports})
    return found


def driver(root: Path = _SYSTEM) -> dict[str, str]:
    """What lets a GPU ring a card's doorbell, and a card reach a GPU's memory."""
    parameters = _read(root / "proc/driver/nvidia/params")
    modules = ("gdrdrv", "nvidia_peermem")
    loaded = {name: "loaded" if (root / "sys/module" / name).is_dir() else "not loaded" for name in modules}
    return {"PeerMappingOverride": "set" if "PeerMappingOverride=1" in parameters else "not set"} | loaded


def obstacle(root: Path = _SYSTEM) -> str:
    """Why GPUs here could not put over the network themselves, as far as can be told without trying; "" if they may."""
    if os.environ.get("NVSHMEM_IB_ENABLE_IBGDA", "0").lower() not in ("1", "true", "yes", "on"):
        return "NVSHMEM_IB_ENABLE_IBGDA=1 is not set, so a CPU thread would issue what GPUs put"
    cards = [d for d in devices(root) if d["name"].startswith("mlx5")]
    if not any("ACTIVE" in port["state"] for card in cards for port in card["ports"]):
        return "no mlx5 card under /sys/class/infiniband has an active port"
    found, handler = driver(root), os.environ.get("NVSHMEM_IBGDA_NIC_HANDLER", "auto").lower()
    by_gpu, by_cpu = found["PeerMappingOverride"] == "set", found["gdrdrv"] == "loaded"
    if handler.startswith("cpu") or (handler == "auto" and (by_gpu or by_cpu)) or (handler == "gpu" and by_gpu):
        return ""
    return "nobody could ring a card's doorbell: PeerMappingOverride is not set, and gdrdrv is not loaded or not to be used"


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return "?"
