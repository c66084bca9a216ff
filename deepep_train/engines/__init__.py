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


def choose(requested: str) -> Choice:
    """The engine a Buffer takes for `engine=requested`. Raises `DeepEPError` with the reason if it cannot be had."""
    if requested not in ENGINES:
        raise ArgumentError(f"engine must be one of {', '.join(map(repr, ENGINES))}, got {requested!r}", "engine")
    if requested in ("auto", "collective"):
        reason = "asked for by engine='collective'" if requested == "collective" else "the CUDA engines are not in this build"
        return Choice("collective", [f"collective: {reason}"])
    raise DeepEPError(f"engine={requested!r} is not in this build of deepep_train; engine='collective' is")


def create(name: str, group: dist.ProcessGroup | None, timeout: float, local_ranks: int) -> Engine:
    """Build the engine that `choose` named."""
    assert name == "collective", name
    return CollectiveEngine(group, timeout, local_ranks)
