"""Rows of any dtype as what the rail's kernels move, bytes in whole 16-byte pieces, and how wide the engine's own rows are. No
kernel is needed here: `plan` counts bytes by the same functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deepep_train.engines.base import MAX_EXPERTS

_STEP = 16  # bytes
_BITS = 32  # of a word
_HEAD = 5  # csrc/rdma/fresh.hpp's kHead


def padded(row_bytes: int) -> int:
    """As rows travel."""
    return -(-row_bytes // _STEP) * _STEP


def num_words(num_local_ranks: int) -> int:
    """That have a bit for each rank of a node."""
    return -(-num_local_ranks // _BITS)


def words_bytes(top_k: int, has_weights: bool, num_local_ranks: int) -> int:
    """Of the words that a fresh dispatch sends beside each row: its token's number, indices, weights, a bit for each rank of
    the node where it goes."""
    return padded(4 * (1 + top_k * (1 + has_weights) + num_words(num_local_ranks)))


def counts_bytes(num_ranks: int, num_nodes: int) -> int:
    """Of the row of counts that each rank has for all before a fresh dispatch: one width, whatever the ranks' arguments."""
    return padded(4 * (_HEAD + num_ranks + num_nodes + MAX_EXPERTS))


def as_rows(t: Tensor) -> Tensor:
    """[rows, n] of any dtype -> uint8 [rows, padded bytes], aligned; the same memory where it can be."""
    t = t.detach()
    if not t.is_contiguous() or t.stride(-1) != 1:  # what has no rows counts as contiguous whatever its strides are
        t = t.clone(memory_format=torch.contiguous_format)
    width = t.size(1) * t.element_size()
    rows = t.view(torch.uint8).view(t.size(0), width)
    if padding := padded(width) - width:
        rows = F.pad(rows, (0, padding))
    return rows if rows.data_ptr() % _STEP == 0 else rows.clone()


def as_elements(rows: Tensor, like: Tensor) -> Tensor:
    """The reverse, in `like`'s dtype and width. The last step is a change of dtype: what comes out of that is no view to
    autograd, so callers may write to it."""
    width = like.size(1) * like.element_size()
    return rows[:, :width].contiguous().view(like.dtype)
