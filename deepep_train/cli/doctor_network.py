"""What `doctor` says of NVSHMEM and network cards: what the rdma engine would find here (docs/network.md)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from deepep_train.engines import fabric
from deepep_train.engines import nvshmem_present as nvshmem

_SYSTEM = Path("/")


def examine(root: Path = _SYSTEM) -> dict[str, Any]:
    """JSON-able; `root` is where /sys and /proc are looked for."""
    found = nvshmem.find()
    return {
        "found": str(found) if found else None,
        "obstacle": nvshmem.obstacle(found),
        "devices": fabric.devices(root),
        "driver": fabric.driver(root),
        "puts by GPUs": fabric.obstacle(root),
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
    lines.append(f"              {report['puts by GPUs'] or 'GPUs may put over the network themselves'}")
    lines += [f"              {name}={value}" for name, value in report["variables"].items()]
    return lines
