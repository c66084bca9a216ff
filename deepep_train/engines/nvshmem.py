"""NVSHMEM in this process: loaded and started once, for one group of ranks, and never ended, since its end is a collective call
that a process on its way out must not wait for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from deepep_train.engines import nvshmem_present
from deepep_train.engines.peers import Peers, raise_if_broken
from deepep_train.errors import ArgumentError, PeerTimeoutError

T = TypeVar("T")
_started: list[int] = []  # the ranks, as the job numbers them


def extension() -> Any:
    """`deepep_train._rdma`; raises `ImportError` with what is missing."""
    nvshmem_present.load(nvshmem_present.find())
    from deepep_train import _rdma  # type: ignore[attr-defined]

    return _rdma


def before_deadline(peers: Peers, call: Callable[[], T]) -> T:
    """The result of one of NVSHMEM's collective calls, which wait for ever for a rank that is gone; this does not."""
    done: list[Any] = []

    def run() -> None:
        try:
            done.append((call(), None))
        except Exception as error:  # noqa: BLE001 - raised below
            done.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(peers.timeout)
    if not done:
        silent = peers.roll_call()
        who = f"rank {', '.join(map(str, silent))}" if silent else "some rank"
        peers.failure = PeerTimeoutError(
            f"NVSHMEM on rank {peers.rank}: {who} did not come to a collective call within {peers.timeout:g} s; "
            "this buffer can no longer be used",
            silent,
            "NVSHMEM",
        )
        raise peers.failure
    result, error = done[0]
    if error is not None:
        raise error
    return result


def start(peers: Peers, device: torch.device) -> Any:
    """The extension, with NVSHMEM started for these ranks; a collective call."""
    kernels, error, ranks = None, "", [0] if peers.group is None else dist.get_process_group_ranks(peers.group)
    mine: dict[str, Any] = {"error": "", "id": "", "started": _started}
    try:
        kernels = extension()
        if peers.rank == 0 and not _started:
            mine["id"] = kernels.unique_id().hex()
    except (ImportError, RuntimeError) as caught:
        mine["error"] = str(caught)
    everyone = peers.gather_objects(mine, "Buffer")
    raise_if_broken(everyone)
    assert kernels is not None
    if all(other["started"] == ranks for other in everyone):
        return kernels
    if any(other["started"] for other in everyone):
        text = "; ".join(f"on rank {r} for ranks {other['started']}" for r, other in enumerate(everyone) if other["started"])
        raise ArgumentError(
            f"engine='rdma': NVSHMEM serves one group of ranks for as long as a process lives, here {ranks}; started {text}",
            "group",
        )
    try:
        unique = bytes.fromhex(everyone[0]["id"])
        before_deadline(peers, lambda: kernels.start(device.index, peers.rank, peers.size, unique))
        _started[:] = ranks
    except RuntimeError as caught:
        error = str(caught)
    raise_if_broken([{"error": text} for text in peers.gather_objects(error, "Buffer")])
    return kernels
