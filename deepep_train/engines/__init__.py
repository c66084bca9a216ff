"""Engines and the choice among them."""

from __future__ import annotations

import os
import socket
from typing import NamedTuple

import torch.distributed as dist

from deepep_train.engines.base import Engine
from deepep_train.engines.collective import CollectiveEngine
from deepep_train.errors import ArgumentError, DeepEPError

ENGINES = ("auto", "collective", "nvlink", "rdma", "low_latency")


class Choice(NamedTuple):
    """An engine's name and why it was taken, a sentence a line."""

    name: str
    reasons: list[str]


def host_name() -> str:
    """Names the machine. DEEPEP_TRAIN_HOST overrides it, for containers that share a host name."""
    return os.environ.get("DEEPEP_TRAIN_HOST") or socket.gethostname()


def num_local_ranks(hosts: list[str]) -> int:
    """Ranks per node if they lie in equal, consecutive blocks; else all of them count as one node."""
    size = len(hosts)
    per_node = hosts.count(hosts[0])
    blocks = [hosts[i : i + per_node] for i in range(0, size, per_node)]
    even = size % per_node == 0 and all(len(set(b)) == 1 for b in blocks) and len({b[0] for b in blocks}) == len(blocks)
    return per_node if even else size


class Surveyed(NamedTuple):
    """Whether an engine can be used in this process, and why or why not."""

    name: str
    usable: bool
    reason: str


def survey() -> list[Surveyed]:
    """Every engine, best first, as far as one process alone can tell."""
    has_distributed = dist.is_available()
    reason = (
        "any process group: gloo on CPUs, NCCL or gloo on GPUs" if has_distributed else "torch was built without distributed"
    )
    absent = "its kernels are not part of this release"
    return [
        Surveyed("nvlink", False, absent),
        Surveyed("rdma", False, absent),
        Surveyed("low_latency", False, absent),
        Surveyed("collective", has_distributed, reason),
    ]


def choose(requested: str) -> Choice:
    """The engine a Buffer takes for `engine=requested`. Raises `DeepEPError` with the reason if it cannot be had."""
    if requested not in ENGINES:
        raise ArgumentError(f"engine must be one of {', '.join(map(repr, ENGINES))}, got {requested!r}", "engine")
    found = {engine.name: engine for engine in survey()}
    if requested != "auto":
        if not found[requested].usable:
            raise DeepEPError(f"engine={requested!r} cannot be used: {found[requested].reason}")
        return Choice(requested, [f"{requested}: asked for"])
    reasons = [f"{e.name}: {e.reason}" for e in found.values()]
    return Choice("collective", reasons)


def create(name: str, group: dist.ProcessGroup | None, timeout: float, local_ranks: int) -> Engine:
    """Build the engine that `choose` named."""
    assert name == "collective", name
    return CollectiveEngine(group, timeout, local_ranks)
