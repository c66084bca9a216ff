"""The memory of ranks that reach each other: an arena of each, which the others have mapped."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from typing import Any, NamedTuple

import torch

from deepep_train import _C  # type: ignore[attr-defined]
from deepep_train.engines import processes
from deepep_train.engines.arena import Arena
from deepep_train.engines.base import NoPeerAccess
from deepep_train.engines.peers import Peers, raise_if_broken
from deepep_train.engines.sms import default_sms, most_sms
from deepep_train.errors import DeepEPError

_PROCESS = secrets.token_hex(8)  # containers may share host names and process numbers


class NodeMemory(NamedTuple):
    """One rank's end of it.

    Attributes:
        comm: the kernels' end, of the ranks that were mapped.
        arena: this rank's.
        processes: `processes.identity()` of every rank of the group.
        gpus: by rank, what tells GPUs apart; ranks with the same one share it.
        max_sms, default_sms: that a call may occupy, and takes where nobody says how many, by operation.
    """

    comm: Any
    arena: Arena
    processes: list[Any]
    gpus: list[str]
    max_sms: int
    default_sms: dict[str, int]


def map_memory(peers: Peers, ranks: range, arena_bytes: int, device: torch.device) -> NodeMemory:
    """Take `arena_bytes` and map those of `ranks`, of which this is one; a call of the whole group, whose ranks raise alike if
    one of them cannot."""
    total = _C.Communicator.control_bytes() + arena_bytes
    mine: dict[str, Any] = {"process": f"{_PROCESS}/{os.getpid()}", "error": "", "handle": "", "base": 0}
    mine["index"], mine["identity"] = device.index, processes.identity()
    properties = torch.cuda.get_device_properties(device)
    mine["gpu"] = str(properties.uuid)  # without the host's name: containers that share a GPU may differ in it
    torch.cuda.empty_cache()  # arenas of buffers that are gone are in it
    comm, closings, first = None, None, ranks.start == peers.rank
    with suppress(RuntimeError):  # without it, what has been destroyed is kept
        closings = _C.Closings(len(ranks)) if first else None
    mine["closings"] = closings.descriptor if closings else -1
    try:
        comm = _C.Communicator(device.index, ranks.index(peers.rank), len(ranks), total, float(peers.timeout))
        mine["base"] = comm.base
        mine["handle"] = comm.ipc_handle().hex() if len(ranks) > 1 else ""
    except RuntimeError as error:
        mine["error"] = f"no arena of {total} bytes: {error}"
    everyone = peers.gather_objects(mine, "Buffer")
    raise_if_broken(everyone)
    assert comm is not None
    mine["error"] = ""
    try:
        comm.open(
            [
                (b"" if o["process"] == mine["process"] else bytes.fromhex(o["handle"]), o["base"], o["index"])
                for o in everyone[ranks.start : ranks.stop]
            ]
        )
    except RuntimeError as error:
        mine["error"] = str(error)
    closings = closings or _closings_of(everyone[ranks.start], mine["identity"], len(ranks))
    try:
        raise_if_broken(peers.gather_objects(mine, "Buffer"))  # besides: nobody starts before all have mapped all
    except DeepEPError as error:
        raise NoPeerAccess(str(error)) from None
    if len(ranks) > 1:
        comm.share(closings)
    if closings:
        closings.seal()
    gpus = [o["gpu"] for o in everyone]
    sharing, sms = gpus.count(mine["gpu"]), properties.multi_processor_count
    return NodeMemory(
        comm,
        Arena(comm, device),
        [o["identity"] for o in everyone],
        gpus,
        most_sms(sms, sharing),
        {what: default_sms(what, properties.major, sms, peers.size, sharing) for what in ("dispatch", "combine")},
    )


def _closings_of(maker: dict[str, Any], identity: list[str], num_ranks: int) -> Any:
    """Where the ranks say that they have closed; None where it cannot be reached: processes in containers of their own."""
    if maker["closings"] < 0 or not identity or maker["identity"][:2] != identity[:2]:
        return None
    try:
        return _C.Closings(num_ranks, int(maker["identity"][2]), maker["closings"])
    except RuntimeError:
        return None
