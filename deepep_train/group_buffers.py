"""One `Buffer` per process group, shared by the layers of a model that were made without one."""

from __future__ import annotations

import atexit
import os
from typing import Any

import torch.distributed as dist

from deepep_train.buffer import Buffer

# Memory for what they receive, in bytes (`Buffer`'s num_nvl_bytes): Megatron's layers, for one, have nowhere to say it.
VARIABLE = "DEEPEP_TRAIN_NVL_BYTES"

# By group and by what it is for. Making one is a collective call, so all ranks must find one here, or none: it stays when the
# last layer that used it is gone, as ranks collect their garbage when they like.
_buffers: dict[tuple[str, bool], Buffer] = {}
atexit.register(_buffers.clear)  # before the modules go that a buffer's end needs


def buffer_of(group: dist.ProcessGroup | None, low_latency: bool = False) -> Buffer:
    """The group's buffer; making the first is a collective call of the group.

    It lives until it is destroyed, on all ranks alike (`layer.buffer.destroy()`), or its group is, and then the next call for
    any group lets go of it.

    Within a node all share one: what low-latency calls take there is what normal ones take. Across nodes they may take what the
    others would not (`Buffer`'s `low_latency_mode`), so those that make low-latency calls share one, and the rest another.

    It takes as much memory as the environment's DEEPEP_TRAIN_NVL_BYTES says, or more.

    Args:
        group: None for the default group, or this process alone without torch.distributed.
        low_latency: whether it is for low-latency calls, too.
    """
    if group is None and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    for key in [key for key, buffer in _buffers.items() if buffer.destroyed or _is_gone(buffer.group)]:
        del _buffers[key]
    name = "" if group is None else str(getattr(group, "group_name", id(group)))
    for mode in (low_latency, not low_latency):
        buffer = _buffers.get((name, mode))
        if buffer is not None and buffer.group is group and (mode == low_latency or buffer.num_nodes == 1):
            return buffer
    word = os.environ.get(VARIABLE, "").strip() or "0"
    num_nvl_bytes: Any = int(word) if word.isdecimal() else word  # which Buffer refuses, on all ranks
    made = _buffers[name, low_latency] = Buffer(group, num_nvl_bytes, low_latency_mode=low_latency)
    return made


def _is_gone(group: dist.ProcessGroup | None) -> bool:
    """Whether it has been destroyed, which torch does not say of a group otherwise."""
    if group is None:
        return False
    if not dist.is_initialized():
        return True
    try:
        dist.get_process_group_ranks(group)
    except (KeyError, ValueError, RuntimeError):
        return True
    return False
