"""Checkpoints in Megatron's own distributed format: experts are one global tensor, so another number of ranks can read them.
(But one rank not those of several, nor the reverse: without expert parallelism the optimizer's state has other names.)"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing


def save(out: Path, model: Any, optimizer: Any, history: list[dict[str, float]]) -> None:
    """Write `out`/step-N, whole or not at all as far as `load` can see; a collective call."""
    folder = out / f"step-{len(history):08d}"
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(_state(model, optimizer, is_loading=False), str(folder), validate_access_integrity=False)
    dist.barrier()
    if dist.get_rank() == 0:
        (folder / "history.json").write_text(json.dumps(history))  # last: it says that the rest is there
    dist.barrier()


def load(out: Path, model: Any, optimizer: Any) -> list[dict[str, float]]:
    """Read the newest whole checkpoint into the model and the optimizer and give its history; [] if there is none."""
    whole = sorted(path.parent for path in out.glob("step-*/history.json"))
    if not whole:
        return []
    state = dist_checkpointing.load(_state(model, optimizer, is_loading=True), str(whole[-1]))
    model.module.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return json.loads((whole[-1] / "history.json").read_text())


def _state(model: Any, optimizer: Any, is_loading: bool) -> dict[str, Any]:
    weights = model.module.sharded_state_dict()  # without the wrapper, whose name would be in every key
    return {"model": weights, "optimizer": optimizer.sharded_state_dict(weights, is_loading=is_loading)}
