"""What `doctor` says of NVSHMEM and network cards: what the rdma engine would find here (docs/network.md)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from deepep_train.engines import nvshmem_present as nvshmem

_SYSTEM = Path("/")


def examine(root: Path = _SYSTEM) -> dict[str, Any]:
    """JSON-able; `root` is where /sys and /proc are looked for."""
    found = nvshmem.find()
    return {
        "found": str(found) if found else None,
        "obstacle": nvshmem.obstacle(found),
        "devices": _devices(root / "sys/class/infiniband"),
        "driver": _driver(root),
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith("NVSHMEM_")},
    }


def as_lines(report: dict[str, Any]) -> list[str]:
    lines = [f"NVSHMEM       {report['obstacle'] or report['found']}"]
    for device in report["devices"]:
        ports = (f"port {p['port']} {p['state']}, {p['rate']}, {p['link_layer']}" for p in device["ports"])
        lines.append(f"RDMA card     {device['name']}: {'; '.join(ports) or 'no ports'}")
    if not report["devices"]:
        lines.append("RDMA cards    none under /sys/class/infiniband")
    lines.append(f"for IBGDA     {', '.join(f'{name} {value}' for name, value in report['driver'].items())}")
    lines += [f"              {name}={value}" for name, value in report["variables"].items()]
    return lines


def _devices(folder: Path) -> list[dict[str, Any]]:
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


def _driver(root: Path) -> dict[str, str]:
    """What lets a GPU ring a card's doorbell, and a card reach a GPU's memory."""
    parameters = _read(root / "proc/driver/nvidia/params")
    modules = ("gdrdrv", "nvidia_peermem")
    loaded = {name: "loaded" if (root / "sys/module" / name).is_dir() else "not loaded" for name in modules}
    return {"PeerMappingOverride": "set" if "PeerMappingOverride=1" in parameters else "not set"} | loaded


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return "?"
