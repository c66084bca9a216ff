"""What ranks must agree on, as a number that kernels compare."""

from __future__ import annotations

import functools
import hashlib
import json

_SIGNATURES = (1 << 63) - 1


def numbered(signature: int, number: int) -> int:
    """Of one call among those with that signature: two numbers give two results."""
    return (signature + number * 0x9E3779B97F4A7C15) & _SIGNATURES


@functools.lru_cache(maxsize=4096)
def hashed(*parts: object) -> int:
    return int.from_bytes(hashlib.blake2b(json.dumps(parts, default=str).encode(), digest_size=7).digest(), "big")
