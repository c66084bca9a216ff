"""Runs a function on several ranks: those that torchrun started, or processes started here."""

from __future__ import annotations

import faulthandler
import gc
import math
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import connection, get_context
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from deepep_train.errors import DeepEPError

_GRACE_SECONDS = 5.0  # for the other ranks to say what they saw, once one has failed
_TELL_SECONDS = 3.0  # before the deadline, ranks print where they are


class Nodes(NamedTuple):
    """Machines that run the same command: how many, which of them this is, and the host:port of the first where ranks meet."""

    number: int = 1
    here: int = 0
    address: str = ""


def run_ranks(
    num_processes: int,
    function: Callable[..., None],
    *args: Any,
    deadline: float = math.inf,
    device: str = "",
    nodes: Nodes | None = None,
) -> None:
    """Call `function(*args)` on every rank with torch.distributed initialized; `function` must be importable.

    Under torchrun the ranks are its processes; `num_processes`, `deadline` and `nodes` are ignored. With CUDA, rank i of a
    machine takes GPU i modulo their number, and gloo carries the collectives where ranks share a GPU, which NCCL refuses.

    Args:
        deadline: seconds after which all ranks print where they are and are killed.
        device: "cpu" leaves GPUs alone; by default they are used where there are any.
        nodes: with several, this starts the ranks of one, `num_processes` of `nodes.number` times as many.

    Raises:
        DeepEPError: if a rank failed, whose traceback has then been printed, or the deadline passed.
    """
    use_cuda = device != "cpu" and torch.cuda.is_available()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        local = Nodes(), int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
        _enter(*local, None, use_cuda, function, args)
        return
    context = get_context("spawn")
    tell_at = time.time() + deadline - _TELL_SECONDS
    with tempfile.TemporaryDirectory() as folder:
        nodes = nodes or Nodes()
        meet = f"tcp://{nodes.address}" if nodes.number > 1 else f"file://{folder}/rendezvous"
        how = (num_processes, meet, use_cuda, function, args)
        ranks = range(num_processes)
        processes = [context.Process(target=_guarded, args=(tell_at, nodes, r, *how), daemon=True) for r in ranks]
        try:
            for process in processes:
                process.start()
            _wait(processes, deadline)
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()


def _wait(processes: Sequence[Any], deadline: float) -> None:
    end = time.monotonic() + deadline
    failed: dict[int, int] = {}
    at_work = {process.sentinel: rank for rank, process in enumerate(processes)}
    while at_work:
        left = None if math.isinf(end) else max(0.0, end - time.monotonic())
        ready = connection.wait(list(at_work), left)
        if not ready:
            break
        for rank in [at_work.pop(sentinel) for sentinel in ready if isinstance(sentinel, int)]:
            processes[rank].join()
            if code := processes[rank].exitcode:
                failed[rank] = code
                end = min(end, time.monotonic() + _GRACE_SECONDS)
    if failed:
        first = next(iter(failed))
        raise DeepEPError(f"rank {first} failed first (exit code {failed[first]}); what it said is above")
    if at_work:
        raise DeepEPError(f"ranks {sorted(at_work.values())} had not finished after {deadline:g} s and were killed")


def _guarded(tell_at: float, nodes: Nodes, local_rank: int, *how: Any) -> None:
    if not math.isinf(tell_at):
        faulthandler.dump_traceback_later(max(0.1, tell_at - time.time()), exit=False)
    try:
        _enter(nodes, local_rank, *how)
    except BaseException:  # noqa: BLE001 - whatever it is, the user must see it
        who = f"node {nodes.here}, local rank {local_rank}" if nodes.number > 1 else f"rank {local_rank}"
        sys.stderr.write("".join(f"[{who}] {text}\n" for text in traceback.format_exc().splitlines()))
        sys.stderr.flush()
        os._exit(1)  # no clean-up that waits for ranks which are gone
    faulthandler.cancel_dump_traceback_later()


def _enter(
    nodes: Nodes,
    local_rank: int,
    local_size: int,
    rendezvous: str | None,
    use_cuda: bool,
    function: Callable[..., None],
    args: tuple,
) -> None:
    backend = "gloo"
    if use_cuda:
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
        torch.set_num_threads(1)
        if local_size <= torch.cuda.device_count():
            backend = "cpu:gloo,cuda:nccl"
    else:
        # Ranks share the cores; more threads than cores make every rank slower.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))
    if rendezvous is None:
        dist.init_process_group(backend)
    else:
        rank, size = nodes.here * local_size + local_rank, nodes.number * local_size
        dist.init_process_group(backend, init_method=rendezvous, rank=rank, world_size=size)
    function(*args)
    gc.collect()  # a buffer in a reference cycle keeps the group alive, and gloo aborts a process that exits with one
    dist.destroy_process_group()
