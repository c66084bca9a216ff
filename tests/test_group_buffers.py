"""The buffer that a group's layers share: which it is must not depend on what ranks have collected, or still hold."""

from __future__ import annotations

import gc
import os
import weakref

import pytest
import torch.distributed as dist
from harness import run_ranks

from deepep_train import ArgumentError, group_buffers, moe
from deepep_train.group_buffers import buffer_of


def layer_of(group: dist.ProcessGroup) -> moe.MoELayer:
    return moe.MoELayer(8, 16, 4, 2, group=group)


def one_after_another(rank: int, size: int, group: dist.ProcessGroup) -> None:
    first = layer_of(group)
    shared = weakref.ref(first.buffer)
    held = first if rank == 0 else None
    del first
    gc.collect()
    second = layer_of(group)  # hangs, if one rank makes a buffer and the other does not
    assert second.buffer is shared() is buffer_of(group)
    del held
    second.buffer.destroy()
    assert layer_of(group).buffer is not shared()


def test_a_model_that_is_gone_on_some_ranks_changes_nothing() -> None:
    run_ranks(2, one_after_another, timeout=60)


def of_a_group_that_goes(rank: int, size: int, group: dist.ProcessGroup) -> None:
    other = dist.new_group(list(range(size)))
    buffer = weakref.ref(buffer_of(other))
    assert buffer_of(other) is buffer()
    dist.destroy_process_group(other)
    kept = buffer_of(group)
    gc.collect()
    assert buffer() is None
    assert buffer_of(None) is kept  # of the default group, which this one is
    assert [b.group for b in group_buffers._buffers.values()].count(group) == 1


def test_it_goes_with_its_group() -> None:
    run_ranks(2, of_a_group_that_goes, timeout=60)


def of_a_size(rank: int, size: int, group: dist.ProcessGroup) -> None:
    other = dist.new_group(list(range(size)))
    os.environ[group_buffers.VARIABLE] = "3 GB" if rank == 1 else "12345"
    with pytest.raises(ArgumentError, match=r"rank 1: num_nvl_bytes must be .*, got '3 GB'"):
        buffer_of(other)
    os.environ[group_buffers.VARIABLE] = " 12345\n"
    assert buffer_of(other).num_nvl_bytes == 12345
    os.environ[group_buffers.VARIABLE] = ""
    assert buffer_of(group).num_nvl_bytes == 0


def test_it_has_the_size_that_the_environment_says() -> None:
    run_ranks(2, of_a_size, fresh=True, timeout=60)
