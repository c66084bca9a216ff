"""Real text as batches of bytes: pure functions of the seed, the step and the rank, so that a resumed run needs no position."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}


class Text:
    """Bytes of a file, of a folder's files, or of the standard library's sources.

    Args:
        path: None for the standard library.
        sequence: bytes of a sequence.
        seed: of the batches.

    Raises:
        SystemExit: if there is nothing to read, with the reason.
    """

    def __init__(self, path: Path | None, sequence: int, seed: int) -> None:
        folder = Path(sysconfig.get_path("stdlib")) if path is None else path
        files = [folder] if folder.is_file() else sorted(folder.rglob("*.py" if path is None else "*"))
        kept = [f for f in files if f.is_file() and not _SKIPPED & set(f.relative_to(folder).parts)]
        data = b"".join(f.read_bytes() for f in kept)
        if len(data) <= sequence + 1:
            raise SystemExit(f"--data {folder}: {len(data)} bytes are too few for sequences of {sequence}")
        self.bytes = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self.sequence, self.seed = sequence, seed

    def batches(self, step: int, rank: int, count: int, size: int) -> Iterator[Tensor]:
        """`count` micro-batches of a step: int64 [size, sequence + 1], inputs and, shifted by one, targets."""
        for number in range(count):
            digest = hashlib.blake2b(repr((self.seed, step, rank, number)).encode(), digest_size=7).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
            starts = torch.randint(len(self.bytes) - self.sequence, (size, 1), generator=generator)
            yield self.bytes[starts + torch.arange(self.sequence + 1)].to(torch.int64)
