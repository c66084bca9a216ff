"""How much of an arena tensors take, as arithmetic: there without kernels, too."""

from __future__ import annotations

from collections.abc import Iterable

from deepep_train.routing import round_up

# What part of the arena is set aside for staging: one operation's rows where the rest is full, and combine's temporaries.
STAGING_SHARE = 4
SEGMENT = 20 << 20  # bytes that torch asks the heap for, whatever smaller tensor above 1 MiB it is for
_STEP = 2 << 20  # bytes, of which larger tensors' segments are multiples


def size_class(num_bytes: int) -> int:
    """How much memory to take for a tensor of `num_bytes` whose size is a little different in every step, so that what one
    leaves behind fits the next. At most a tenth more; powers of two and the like, likely means of balanced routing, lie
    in the middle of a class."""
    step = 1 << max((num_bytes + num_bytes // 2).bit_length() - 5, 1)
    return -(-(num_bytes - step // 2) // step) * step + step // 2


def segment_bytes(num_bytes: int) -> int:
    """Of the heap, that one tensor takes at most."""
    return max(SEGMENT, round_up(num_bytes, _STEP))


def bytes_for(tensors: Iterable[int]) -> int:
    """By how much an arena must be larger to hold tensors of so many bytes each besides: a part of that is staging again. The
    arena, and staging in it, are rounded up to steps whether it is larger or not."""
    return _with_staging(2 * _STEP + sum(map(segment_bytes, tensors)))


def bytes_to_receive(num_bytes: int) -> int:
    """Of an arena that holds received tensors of so many bytes together, whatever their classes."""
    return _with_staging(-(-num_bytes * 11 // 10))


def _with_staging(heap: int) -> int:
    return -(-heap * STAGING_SHARE // (STAGING_SHARE - 1))
