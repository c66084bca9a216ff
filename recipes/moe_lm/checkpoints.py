"""Which checkpoints a run writes, keeps and goes on from."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from trainer import Trainer
from world import together

from deepep_train import moe

KEPT = 2


class Checkpoints:
    """The folder `checkpoints` in a run's output folder, one folder per saved step."""

    def __init__(self, out: Path) -> None:
        self.folder = out / "checkpoints"
        self.kept: list[Path] = []  # of this run and the one it goes on from, oldest first

    def save(self, trainer: Trainer, step: int, history: Any) -> str:
        """Save after `step` steps; returns the fingerprint of what was saved. A collective call.

        Only now do the checkpoints of an earlier run in the same folder go, so there always is a whole one.
        """
        path = self.folder / f"step-{step:08d}"
        moe.save_checkpoint(path, trainer.model, trainer.optimizer, shared={"step": step, "history": history})
        self.kept = [*self.kept, path][-KEPT:]
        if trainer.world.rank == 0:
            for other in self.folder.iterdir():
                if other not in self.kept:
                    shutil.rmtree(other)
        return fingerprint(trainer)

    def resume(self, trainer: Trainer) -> tuple[int, Any] | None:
        """Load the newest whole checkpoint, written by any number of ranks: (steps done, history), or None if there is
        none. A collective call. Raises `BrokenInput` if the checkpoint does not fit."""
        names: list[Any] = [[path.name for path in self._whole()]]
        dist.broadcast_object_list(names, src=0)  # a network file system may show the ranks different lists
        if not names[0]:
            return None
        self.kept = [self.folder / name for name in names[0]][-KEPT:]
        loaded = together(lambda: moe.load_checkpoint(self.kept[-1], trainer.model, trainer.optimizer))
        return loaded.shared["step"], loaded.shared["history"]

    def _whole(self) -> list[Path]:
        # What is being written, or was when a run was killed, has another suffix.
        return sorted(p for p in self.folder.glob("step-*") if p.suffix == "" and (p / ".metadata").is_file())


def fingerprint(trainer: Trainer) -> str:
    """A digest of every bit of parameters, buffers and optimizer state, whatever number of ranks they are spread over; a
    collective call. Equal fingerprints: what was loaded is what was saved."""
    mine: dict[tuple[str, int], bytes] = {}
    experts = moe.expert_parameter_names(trainer.model)
    first = dist.get_rank(trainer.world.experts) * trainer.options.experts // dist.get_world_size(trainer.world.experts)
    parameters = dict(trainer.model.named_parameters())
    for name, tensor in trainer.model.state_dict(keep_vars=True).items():
        parameter = parameters.get(name)
        state = {} if parameter is None else trainer.optimizer.state.get(parameter, {})
        for key, value in {"": tensor, **state}.items():
            spread = name in experts and value.shape == tensor.shape
            for number, part in enumerate(value.unbind(0) if spread else [value]):
                mine[f"{name} {key}", first + number if spread else 0] = _digest(part)
    everyone: list[Any] = [None] * trainer.world.size
    dist.all_gather_object(everyone, mine)
    merged = {key: digest for part in everyone for key, digest in part.items()}
    return hashlib.blake2b(repr(sorted(merged.items())).encode(), digest_size=8).hexdigest()


def _digest(tensor: Tensor) -> bytes:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(data.numpy().data, digest_size=16).digest()
