"""Engines and the choice among them."""

from __future__ import annotations

import importlib.util
import itertools
import os
import socket
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

from deepep_train.engines import fabric, nvshmem_present
from deepep_train.engines.base import MAX_NODES, MAX_NVLINK_RANKS, Engine
from deepep_train.engines.base import NoPeerAccess as NoPeerAccess
from deepep_train.engines.collective import CollectiveEngine
from deepep_train.engines.peers import Peers
from deepep_train.errors import ArgumentError, DeepEPError

DEFAULT_ARENA_BYTES = 2 << 30
DEFAULT_RAIL_BYTES = 32 << 20  # of NVSHMEM's memory; dispatches ask for more
NUM_QUEUE_PAIRS = 8
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


def mesh_obstacle(hosts: list[str], local_ranks: int) -> str:
    """Why ranks on these hosts cannot be nodes of `local_ranks` consecutive ranks whose memory reaches each other; "" if they
    can. Several nodes may be of one host."""
    if local_ranks > MAX_NVLINK_RANKS:
        return f"nodes of {local_ranks} ranks, above the rdma engine's limit of {MAX_NVLINK_RANKS}"
    if (num_nodes := len(hosts) // local_ranks) > MAX_NODES:
        return f"{num_nodes} nodes of {local_ranks} ranks, above the rdma engine's limit of {MAX_NODES} nodes"
    for rank, host in enumerate(hosts):
        first = rank // local_ranks * local_ranks
        if host != hosts[first]:
            who = f"rank {first} on host {hosts[first]!r} and rank {rank} on host {host!r}"
            return (
                f"with {local_ranks} ranks a node, {who} would be of one node; a node is consecutive ranks of one host, as "
                f"many on each. Hosts in order of ranks: {_runs(hosts)}. Start equally many ranks a host, host by host; or, if "
                "these are one machine's containers, set DEEPEP_TRAIN_HOST to the same in all"
            )
    return ""


def _runs(hosts: list[str]) -> str:
    """As 2 x 'a', 1 x 'b'; at most some of them."""
    runs = [f"{len(list(same))} x {host!r}" for host, same in itertools.groupby(hosts)]
    return ", ".join(runs[:8] + ["..."] * (len(runs) > 8))


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
    nvlink = _survey_nvlink()
    return [
        nvlink,
        _survey_rdma(nvlink),
        Surveyed("low_latency", nvlink.usable, _low_latency_reason(nvlink)),
        Surveyed("collective", has_distributed, reason),
    ]


def _survey_rdma(nvlink: Surveyed) -> Surveyed:
    """Within a node it uses nvlink's kernels."""
    if not nvlink.usable:
        return Surveyed("rdma", False, nvlink.reason)
    if importlib.util.find_spec("deepep_train._rdma") is None:
        return Surveyed("rdma", False, "the package was built without NVSHMEM, so it has no kernels between nodes")
    if why := nvshmem_present.obstacle(nvshmem_present.find()):
        return Surveyed("rdma", False, why)
    return Surveyed("rdma", True, "for several nodes whose GPUs reach each other within; not tried on a network card yet")


def _low_latency_reason(nvlink: Surveyed) -> str:
    """Its kernels come with nvlink's."""
    if not nvlink.usable:
        return nvlink.reason
    return (
        "nvlink, and by that name what Buffer(low_latency_mode=True) takes; low-latency calls have the same kernels under both"
    )


def _survey_nvlink() -> Surveyed:
    if importlib.util.find_spec("deepep_train._C") is None:
        return Surveyed("nvlink", False, "the package was built without nvcc, so it has no kernels")
    if not torch.cuda.is_available():
        return Surveyed("nvlink", False, "torch sees no CUDA device")
    if torch.cuda.get_device_capability() < (8, 0):
        return Surveyed("nvlink", False, f"{torch.cuda.get_device_name()} is older than sm_80")
    if why := _allocator_obstacle():
        return Surveyed("nvlink", False, why)
    if why := _kernels_obstacle():
        return Surveyed("nvlink", False, f"its kernels do not run on {torch.cuda.get_device_name()}: {why}")
    return Surveyed("nvlink", True, f"for up to {MAX_NVLINK_RANKS} ranks of one host whose GPUs reach each other's memory")


def _allocator_obstacle() -> str:
    """The arena is one of torch's memory pools."""
    if (backend := torch.cuda.get_allocator_backend()) != "native":
        return f"torch's CUDA allocator is {backend!r} (PYTORCH_CUDA_ALLOC_CONF), which has no memory pools"
    if os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING") == "1":
        return "PYTORCH_NO_CUDA_MEMORY_CACHING=1: torch then takes nothing out of memory pools"
    return ""


def _kernels_obstacle() -> str:
    try:
        from deepep_train import _C  # type: ignore[attr-defined]
    except ImportError as error:
        return str(error)
    return _C.Communicator.obstacle(torch.cuda.current_device())


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
    return Choice("nvlink" if found["nvlink"].usable else "collective", reasons)


def whereabouts() -> dict[str, str]:
    """What other ranks must know of this one to choose an engine: its host, its GPU, and, if so, why it cannot use nvlink or
    rdma, and why its GPU could not put over a network."""
    nvlink = _survey_nvlink()
    rdma = _survey_rdma(nvlink)
    gpu = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid) if nvlink.usable else ""
    unusable = {name: "" if found.usable else found.reason for name, found in (("obstacle", nvlink), ("no rdma", rdma))}
    return {"host": host_name(), "gpu": gpu, "no puts": fabric.obstacle()} | unusable


def low_latency_across_nodes(everyone: list[dict[str, str]], otherwise: Choice) -> Choice:
    """rdma, whose low-latency calls put to other nodes, if all ranks with these `whereabouts` can use it."""
    without = [f"rdma on rank {r}: {other['no rdma']}" for r, other in enumerate(everyone) if other["no rdma"]]
    if without:
        return Choice(otherwise.name, [*otherwise.reasons, *without])
    return Choice("rdma", ["rdma: low_latency_mode=True and ranks on several nodes"])


def obstacle(everyone: list[dict[str, str]], first: int = 0) -> str:
    """Why, as far as this rank can tell, the ranks with these `whereabouts`, from rank `first` on, cannot use nvlink together;
    "" if they can."""
    if len(everyone) > MAX_NVLINK_RANKS:
        return f"{len(everyone)} ranks, above the limit of {MAX_NVLINK_RANKS}"
    for rank, other in enumerate(everyone, first):
        if other["obstacle"]:
            return f"rank {rank}: {other['obstacle']}"
    if len({other["host"] for other in everyone}) > 1:
        return "the ranks are on several hosts"
    here = torch.cuda.current_device()
    visible = {str(torch.cuda.get_device_properties(i).uuid): i for i in range(torch.cuda.device_count())}
    for rank, other in enumerate(everyone, first):
        there = visible.get(other["gpu"])
        if there is None:
            return f"the GPU of rank {rank} is hidden from this process (CUDA_VISIBLE_DEVICES)"
        if there != here and not torch.cuda.can_device_access_peer(here, there):
            return f"GPU {here} has no peer access to GPU {there} of rank {rank}"
    return ""


def obstacle_across(everyone: list[dict[str, str]], rank: int, local_ranks: int, two_level: bool | None) -> str:
    """The same of `rank` and rdma, which auto takes between hosts only where GPUs can put over the network themselves."""
    if why := mesh_obstacle([other["host"] for other in everyone], local_ranks):
        return why
    if len(everyone) // local_ranks < 2:
        return "the ranks are of one node"
    if two_level is False:
        return "two_level=False asks for rows that nobody forwards"
    for other, there in enumerate(everyone):
        if why := there["no rdma"] or there["no puts"]:
            return f"rank {other}: {why}"
    first = rank // local_ranks * local_ranks
    return obstacle(everyone[first : first + local_ranks], first)


def missing_peer_access() -> list[tuple[int, int]]:
    """Pairs of this process's GPUs of which the first cannot reach the second's memory."""
    count = torch.cuda.device_count()
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    return [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]


def create(
    name: str,
    group: dist.ProcessGroup | None,
    timeout: float,
    local_ranks: int,
    two_level: bool | None,
    num_nvl_bytes: int,
    num_rdma_bytes: int,
    num_sms: Callable[[], int],
    number: int,
    low_latency_mode: bool = False,
) -> Engine:
    """Build the engine that `choose` named; `two_level`, the bytes and the mode as in `Buffer`; `num_sms` gives the SMs that a
    call may occupy, `number` is the buffer's."""
    # What low-latency calls keep comes on top; then none of it is the rail's.
    kept_bytes = num_rdma_bytes if name == "low_latency" or low_latency_mode else 0
    arena_bytes = max(num_nvl_bytes, DEFAULT_ARENA_BYTES) + kept_bytes
    if name in ("nvlink", "low_latency"):
        from deepep_train.engines.nvlink import NvlinkEngine

        if two_level:
            raise ArgumentError(f"two_level=True needs engine='collective': {name} reaches every rank directly", "two_level")
        return NvlinkEngine(Peers(group, timeout, number), arena_bytes, num_sms, name)
    num_nodes = (1 if group is None else group.size()) // local_ranks
    if name == "rdma":
        from deepep_train.engines.rdma import RdmaEngine

        if num_nodes < 2:
            raise ArgumentError(f"engine='rdma' needs at least 2 nodes, these are {local_ranks} ranks of one", "engine")
        if two_level is False:
            raise ArgumentError("two_level=False needs another engine: rdma always forwards", "two_level")
        rail_bytes = max(num_rdma_bytes - kept_bytes, DEFAULT_RAIL_BYTES)
        return RdmaEngine(group, timeout, local_ranks, number, arena_bytes, rail_bytes, NUM_QUEUE_PAIRS, num_sms)
    assert name == "collective", name
    if two_level and num_nodes < 2:
        raise ArgumentError(f"two_level=True needs at least 2 nodes, these are {local_ranks} ranks of one", "two_level")
    forwards = two_level if two_level is not None else num_nodes > 1 and local_ranks > 1
    return CollectiveEngine(group, timeout, local_ranks, forwards, number)
