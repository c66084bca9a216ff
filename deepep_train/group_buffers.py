"""One `Buffer` per process group, shared by the layers of a model that were made without one."""

from __future__ import annotations

import weakref

import torch.distributed as dist

from deepep_train.buffer import Buffer

# By group and by what it is for. A buffer goes when the last layer that uses it does.
_buffers: weakref.WeakValueDictionary[tuple[str, bool], Buffer] = weakref.WeakValueDictionary()


def buffer_of(group: dist.ProcessGroup | None, low_latency: bool = False) -> Buffer:
    """The group's buffer; making the first is a collective call of the group.

    Within a node all share one: what low-latency calls take there is what normal ones take. Across nodes they may take what the
    others would not (`Buffer`'s `low_latency_mode`), so those that make low-latency calls share one, and the rest another.

    Args:
        group: None for the default group, or this process alone without torch.distributed.
        low_latency: whether it is for low-latency calls, too.
    """
    if group is None and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    name = "" if group is None else str(getattr(group, "group_name", id(group)))
    for mode in (low_latency, not low_latency):
        buffer = _buffers.get((name, mode))
        is_alive = buffer is not None and not buffer.destroyed and buffer.group is group
        if buffer is not None and is_alive and (mode == low_latency or buffer.num_nodes == 1):
            return buffer
    made = _buffers[name, low_latency] = Buffer(group, low_latency_mode=low_latency)
    return made
