"""Checkpoints through torch.distributed.checkpoint in which experts are one global tensor, sharded over the group.

A checkpoint written by 8 ranks loads on 2: each reads the slice of experts that it now holds, and the optimizer's state for
them, bit for bit. Files are ordinary DCP checkpoints with the model's own parameter names.
"""

from __future__ import annotations

import os
import pickle
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from deepep_train.errors import DeepEPError
from deepep_train.moe.layer import MoELayer
from deepep_train.moe.parallel import expert_parameter_names


class Loaded(NamedTuple):
    """What a checkpoint holds besides parameters and optimizer state.

    Attributes:
        shared: the `shared` object that was saved.
        own: the `own` object that this rank saved; None if the checkpoint was written on another number of ranks.
    """

    shared: Any
    own: Any


def save_checkpoint(
    path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, shared: Any = None, own: Any = None
) -> None:
    """Write a checkpoint directory, whole or not at all; a collective call of all ranks.

    Args:
        path: a directory that all ranks can reach; replaced if it exists.
        model: with any number of `MoELayer`s; the rest plain, in DDP or in FSDP2.
        shared: any picklable object that is the same on every rank, such as the step.
        own: any picklable object of this rank, such as its random number generators' state.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    if _rank() == 0 and partial.exists():
        shutil.rmtree(partial)
    _barrier()
    state = _state(model, optimizer)
    # Pickled, because DCP takes containers apart and a loader would have to know what was in them.
    state |= {"world_size": _world_size(), "shared": pickle.dumps(shared), f"own_{_rank()}": pickle.dumps(own)}
    with _quietly():
        dcp.save(state, checkpoint_id=partial)
    _barrier()
    if _rank() == 0:
        if path.exists():
            shutil.rmtree(path)
        os.replace(partial, path)
    _barrier()


def load_checkpoint(path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Loaded:
    """Load `save_checkpoint`'s directory into the model and the optimizer, in place, on any number of ranks; a collective
    call. Raises `DeepEPError` if there is no whole checkpoint at `path`, or it is another model's."""
    path = Path(path)
    if not (path / ".metadata").is_file():
        raise DeepEPError(f"{path} holds no checkpoint (no .metadata file)")
    with _quietly(), _plainly(path):
        head: dict[str, Any] = {"world_size": 0, "shared": b""}
        dcp.load(head, checkpoint_id=path)
        state = _state(model, optimizer)
        _check_fits(path, state["model"])
        own = f"own_{_rank()}"
        if head["world_size"] == _world_size():
            state[own] = b""
        dcp.load(state, checkpoint_id=path)
    # Tensors were filled in place where they alias the model; what the state dict API copies is put back here.
    sharded = _sharded_names(model)
    dcp_state.set_model_state_dict(model, {n: _local(t) if n in sharded else t for n, t in state["model"].items()})
    if optimizer is not None:
        saved = state["optimizer"]
        saved["state"] = {n: {k: _local(v) if n in sharded else v for k, v in e.items()} for n, e in saved["state"].items()}
        dcp_state.set_optimizer_state_dict(model, optimizer, saved)
    return Loaded(pickle.loads(head["shared"]), pickle.loads(state[own]) if own in state else None)


def _state(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    sharded = _sharded_names(model)
    mesh = _mesh(model)
    parameters: dict[str, Any] = dict(dcp_state.get_model_state_dict(model))
    lost = sharded - parameters.keys()
    if lost:
        raise DeepEPError(f"expert parameters are not in the model's state dict under the names expected: {sorted(lost)}")
    state: dict[str, Any] = {"model": {n: _global(t, mesh) if n in sharded else t for n, t in parameters.items()}}
    if optimizer is not None:
        optimizer_state: dict[str, Any] = dict(dcp_state.get_optimizer_state_dict(model, optimizer))
        entries: dict[str, dict[str, Any]] = optimizer_state["state"]
        optimizer_state["state"] = {
            name: {k: _global(v, mesh) if name in sharded and _is_like(v, parameters[name]) else v for k, v in entry.items()}
            for name, entry in entries.items()
        }
        state["optimizer"] = optimizer_state
    return state


def _check_fits(path: Path, parameters: dict[str, Any]) -> None:
    """DCP ignores what only the checkpoint holds, so a smaller model would take part of a larger one's for its own."""
    entries = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    sizes = {name: getattr(entry, "size", None) for name, entry in entries.items()}
    saved = {name.removeprefix("model."): size for name, size in sizes.items() if name.startswith("model.")}
    for name in sorted({*saved, *parameters}, key=lambda name: (name in saved and name in parameters, name)):
        there, here = saved.get(name), getattr(parameters.get(name), "shape", None)
        if there != here:
            shown = [f"is {list(size)}" if size is not None else "does not exist" for size in (there, here)]
            raise DeepEPError(f"{path} is a checkpoint of another model: {name} {shown[0]} there and {shown[1]} here")


def _is_like(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


def _mesh(model: nn.Module) -> DeviceMesh | None:
    """The expert-parallel group of the model's layers as a device mesh; None if every rank is on its own."""
    for module in model.modules():
        if isinstance(module, MoELayer) and module.buffer.group is not None:
            device_type = module.experts.w1.device.type
            return DeviceMesh.from_group(module.buffer.group, device_type)
    return None


def _global(local: Tensor, mesh: DeviceMesh | None) -> Tensor:
    return local if mesh is None else DTensor.from_local(local.detach(), mesh, [Shard(0)], run_check=False)


def _local(value: Any) -> Any:
    """Undo `_global`."""
    return value.to_local() if isinstance(value, DTensor) else value


def _sharded_names(model: nn.Module) -> set[str]:
    """Expert parameters as the state dict API names them: without what DDP, torch.compile and checkpoint wrappers put in
    between. Its own mapping is asked, because a name taken wrongly would save one rank's experts as everybody's."""
    names: set[str] = set()
    for name in expert_parameter_names(model):
        names |= dcp_state._get_fqns(model, name)
    return names


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def _plainly(path: Path) -> Iterator[None]:
    """DCP raises a BaseException that prints every rank's traceback; what went wrong is the innermost one's message."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(sorted(error.failures.items())))
        raise DeepEPError(f"{path} cannot be loaded: rank {rank}: {type(cause).__name__}: {cause}") from error


@contextmanager
def _quietly() -> Iterator[None]:
    """DCP warns that a single process saves without coordination, which is what is meant here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
