"""Rows of any dtype as what the rail's kernels move: bytes, in whole 16-byte pieces."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_STEP = 16  # bytes


def padded(row_bytes: int) -> int:
    """As rows travel."""
    return -(-row_bytes // _STEP) * _STEP


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
    """The reverse, in `like`'s dtype and width."""
    width = like.size(1) * like.element_size()
    return rows[:, :width].contiguous().view(like.dtype).view(rows.size(0), like.size(1))
