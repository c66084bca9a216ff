"""The memory that low-latency calls of one shape take, as arithmetic: there without kernels, too."""

from __future__ import annotations

from deepep_train.engines import arena_sizes
from deepep_train.engines.low_latency_arguments import LIMITS, Shape
from deepep_train.routing import round_up

SETS = 2  # of slots, hence of results that may be alive
_CONTROL_BYTES = 64 << 10  # at least what csrc/low_latency/space.cuh's Control has


def space_bytes(shape: Shape, num_ranks: int) -> int:
    """Of a space whose ranks are one node, at most; csrc/low_latency/space.cuh's `Layout` says why."""
    tokens, hidden, experts, top_k = shape
    local = experts // num_ranks
    lists = num_ranks * round_up(4 * (2 + local + tokens * (1 + top_k)), 128)
    slots = num_ranks * tokens * round_up(2 * hidden, 128)
    places = round_up(8 * experts, 128)
    rows = num_ranks * tokens * min(top_k, local) * 2 * hidden
    return _CONTROL_BYTES + SETS * (lists + slots + places + rows)


def combine_buffer_bytes(shape: Shape) -> int:
    """Of what `get_next_low_latency_combine_buffer` gives, one for each set."""
    return shape.num_experts * shape.max_tokens * 2 * shape.hidden


def arena_bytes(max_tokens: int, hidden: int, num_ranks: int, num_experts: int) -> int:
    """By how much an arena must be larger to hold one shape, with its combine buffers, whatever its top-k. Between nodes the
    space lies in NVSHMEM's memory instead."""
    shape = Shape(max_tokens, hidden, num_experts, LIMITS.top_k)
    return arena_sizes.bytes_for([space_bytes(shape, num_ranks), *SETS * [combine_buffer_bytes(shape)]])
