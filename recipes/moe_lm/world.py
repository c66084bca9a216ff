"""The ranks: devices, process groups, and doing things together."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from options import BrokenInput, environment

from deepep_train import DeepEPError

T = TypeVar("T")


class World(NamedTuple):
    """Attributes:
    rank, size: of all data-parallel ranks.
    device: this rank's.
    everyone: all ranks.
    experts: the ranks, this one among them, that together hold every expert once.
    replicas: the ranks that hold the same experts as this one; None if no other does.
    """

    rank: int
    size: int
    device: torch.device
    everyone: dist.ProcessGroup
    experts: dist.ProcessGroup
    replicas: dist.ProcessGroup | None


def join(options: argparse.Namespace) -> World:
    """Meet the other ranks that torchrun started; without torchrun, be a world of one. Raises `BrokenInput`."""
    device, backend = _device_and_backend(options.device)
    timeout = timedelta(minutes=30)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    rank, size, width = dist.get_rank(), dist.get_world_size(), options.expert_parallel
    everyone = dist.group.WORLD
    assert everyone is not None
    if width == size:
        return World(rank, size, device, everyone, everyone, None)
    rows = [list(range(start, start + width)) for start in range(0, size, width)]
    experts, _ = dist.new_subgroups_by_enumeration(rows)
    replicas, _ = dist.new_subgroups_by_enumeration([list(column) for column in zip(*rows, strict=True)])
    assert experts is not None
    return World(rank, size, device, everyone, experts, replicas)


def alone(world: World) -> World | None:
    """Rank 0 as a world of its own, None on the others; a collective call of all ranks."""
    group = dist.new_group([0])
    return world._replace(size=1, everyone=group, experts=group, replicas=None) if world.rank == 0 else None


def together(work: Callable[[], T]) -> T:
    """The result of `work` on every rank, or `BrokenInput` on every rank if it fails on any: files may be there for some
    ranks only, and a rank that ended alone would leave the others waiting for it."""
    result: Any = None
    problem = None
    try:
        result = work()
    except (BrokenInput, DeepEPError, OSError) as error:
        problem = str(error)
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    broken = {rank: text for rank, text in enumerate(problems) if text is not None}
    if broken:
        rank, text = next(iter(broken.items()))
        raise BrokenInput(text if len(broken) == len(problems) else f"rank {rank}: {text}")
    return result


def _device_and_backend(wanted: str) -> tuple[torch.device, str]:
    gpus = torch.cuda.device_count()
    if wanted == "cuda" and gpus == 0:
        raise BrokenInput(f"--device cuda: torch sees no GPU on {socket.gethostname()}", one_machine=True)
    if wanted == "cpu" or gpus == 0:
        return torch.device("cpu"), "gloo"
    # A resumed run repeats the first one's bits; read when cuBLAS starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.enable_cudnn_sdp(False)  # the one attention whose gradient changes from run to run
    device = torch.device("cuda", environment("LOCAL_RANK", 0) % gpus)
    torch.cuda.set_device(device)
    # NCCL refuses two ranks on one GPU; gloo does not.
    shared = environment("LOCAL_WORLD_SIZE", 1) > gpus
    return device, "gloo" if shared else "cpu:gloo,cuda:nccl"
