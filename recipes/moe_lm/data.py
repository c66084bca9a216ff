"""Batches: pure functions of the seed, the step and the rank, so that a resumed run needs no position in the data."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


class Corpus:
    """Bytes to learn, and bytes held out.

    Args:
        text: the bytes; the last twentieth, or one sequence if that is more, is held out.
        sequence: bytes per sequence.
        seed: of the batches.
    """

    def __init__(self, text: bytes, sequence: int, seed: int) -> None:
        everything = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        held_out = max(len(text) // 20, sequence + 1)
        self.train, self.held_out = everything[:-held_out], everything[-held_out:]
        self.sequence, self.seed = sequence, seed
        self.unigram_entropy = _entropy(everything)

    def batch(self, step: int, rank: int, size: int) -> Tensor:
        """int64 [size, sequence + 1]: inputs and, shifted by one, targets."""
        generator = torch.Generator().manual_seed(_mixed(self.seed, step, rank))
        starts = torch.randint(len(self.train) - self.sequence, (size,), generator=generator)
        return self._cut(self.train, starts)

    def held_out_sequences(self, count: int) -> Tensor:
        """int64 [count, sequence + 1], evenly spaced; fewer where they would overlap."""
        last = len(self.held_out) - self.sequence - 1
        count = min(count, last // (self.sequence + 1) + 1)
        return self._cut(self.held_out, torch.arange(count) * last // max(count - 1, 1))

    def _cut(self, text: Tensor, starts: Tensor) -> Tensor:
        return text[starts.unsqueeze(1) + torch.arange(self.sequence + 1)].to(torch.int64)


def _mixed(*numbers: int) -> int:
    """Neighbouring numbers give unrelated seeds."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "big") >> 1


def _entropy(text: Tensor) -> float:
    """Nats per byte of a model that knows how often each byte occurs and nothing else."""
    counts = torch.bincount(text, minlength=256).to(torch.float64)
    share = counts[counts > 0] / counts.sum()
    return float(-(share * share.log()).sum())
