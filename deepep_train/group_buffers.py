"""One `Buffer` per process group, shared by the layers of a model that were made without one."""

from __future__ import annotations

import weakref

import torch.distributed as dist

from deepep_train.buffer import Buffer

# A buffer goes when the last layer that uses it does.
_buffers: weakref.WeakValueDictionary[str, Buffer] = weakref.WeakValueDictionary()


def buffer_of(group: dist.ProcessGroup | None) -> Buffer:
    """The group's buffer; making the first is a collective call of the group.

    Args:
        group: None for the default group, or this process alone without torch.distributed.
    """
    if group is None and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    name = "" if group is None else str(getattr(group, "group_name", id(group)))
    buffer = _buffers.get(name)
    if buffer is None or buffer.destroyed or buffer.group is not group:
        buffer = _buffers[name] = Buffer(group)
    return buffer
