"""Memory that a call on CPU tensors needs only until it returns."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor


class Scratch(threading.local):
    """Kept from call to call, by purpose and thread, since on CPUs fresh memory's pages cost time in every call. As large as
    the largest call so far. On GPUs torch keeps memory by itself."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def empty(self, purpose: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """An uninitialized tensor of `like`'s dtype and device; the next request for the same purpose gets the same memory."""
        if like.device.type != "cpu":
            return like.new_empty(tuple(shape))
        num_bytes = math.prod(shape) * like.element_size()
        kept = self._kept.get(purpose)
        if kept is None or kept.numel() < num_bytes:
            with torch.inference_mode(False):  # it may be written to in any mode
                kept = self._kept[purpose] = torch.empty(num_bytes, dtype=torch.uint8)
        return kept[:num_bytes].view(like.dtype).view(tuple(shape))

    def num_bytes(self) -> int:
        """Kept for this thread."""
        return sum(kept.numel() for kept in self._kept.values())

    def clear(self) -> None:
        """Give back this thread's memory; other threads' goes with them."""
        self._kept.clear()
