"""Runs a function on several ranks: those that torchrun started, or processes spawned here."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(num_processes: int, function: Callable[..., None], *args: Any) -> None:
    """Call `function(*args)` on every rank with torch.distributed initialized; `function` must be importable.

    Under torchrun the ranks are its processes and `num_processes` is ignored. With CUDA, rank i takes GPU i modulo their
    number, and gloo carries the collectives where ranks share a GPU, which NCCL refuses.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _enter(int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]), None, 0, function, args)
        return
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = f"file://{folder}/rendezvous"
        mp.spawn(_enter, (num_processes, rendezvous, num_processes, function, args), num_processes)


def _enter(
    local_rank: int, local_size: int, rendezvous: str | None, size: int, function: Callable[..., None], args: tuple
) -> None:
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
        if local_size <= torch.cuda.device_count():
            backend = "cpu:gloo,cuda:nccl"
    else:
        # Ranks share the cores; more threads than cores make every rank slower.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))
    if rendezvous is None:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, init_method=rendezvous, rank=local_rank, world_size=size)
    try:
        function(*args)
    finally:
        gc.collect()  # a buffer in a reference cycle keeps the group alive, and gloo aborts a process that exits with one
        dist.destroy_process_group()
