"""Files that the user names: the text to learn, and the folder for results. Needs no torch, so that mistakes show at once."""

from __future__ import annotations

import hashlib
import sysconfig
import tempfile
from pathlib import Path

from options import BrokenInput

_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def read_text(path: Path | None, sequence: int) -> bytes:
    """All bytes of a file, or of a folder's files but hidden ones; None for the `.py` files of the standard library, which
    every machine that runs this has. Raises `BrokenInput` if that cannot be read or is too short for `sequence`."""
    if path is None:
        text = _join(Path(sysconfig.get_path("stdlib")), ".py")
    elif path.is_dir():
        text = _join(path, "")
    elif path.is_file():
        text = _bytes(path)
    else:
        raise BrokenInput(f"--data {path}: no such file or folder")
    needed = 2 * (sequence + 1)  # one sequence and its last target, to train on and held out
    if len(text) < needed:
        raise BrokenInput(f"--data {path}: {len(text)} bytes are too few, --seq {sequence} needs at least {needed}")
    return text


def make_writable(out: Path) -> None:
    """Make the output folder; raises `BrokenInput` if that fails or nothing can be written there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise BrokenInput(f"--out {out}: cannot be written: {error.strerror}") from error


def _join(folder: Path, suffix: str) -> bytes:
    files = [f for f in folder.rglob(f"*{suffix}") if f.is_file() and not _is_skipped(f.relative_to(folder))]

    def shuffled(file: Path) -> bytes:
        return hashlib.blake2b(file.relative_to(folder).as_posix().encode(errors="surrogateescape")).digest()

    # In an order that is the same everywhere and has nothing to do with content: the end, held out, is a fair sample.
    return b"".join(_bytes(f) for f in sorted(files, key=shuffled))


def _is_skipped(relative: Path) -> bool:
    return any(part in _SKIPPED or part.startswith(".") for part in relative.parts)


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise BrokenInput(f"--data: {file} cannot be read: {error.strerror}") from error
