"""What an exchange between nodes that has failed raises: the kernels' codes as exceptions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from deepep_train.engines.nvlink_failures import END, wrong_arguments
from deepep_train.errors import ArgumentError, DeepEPError, PeerTimeoutError

AT_FAULT_MISCOUNTED = 2  # fresh.hpp's
AWAITED = ("their readiness", "their rows", "gave up")  # causes of which another rank may be the cause


def rail_error(failure: Any, rank: int, timeout: float) -> DeepEPError:
    """The exception for a failure that a kernel has found in an exchange between nodes.

    Args:
        failure: `_rdma.Failure`.
        timeout: seconds, the buffer's.
    """
    where, who = f"exchange {failure.number} between nodes on rank {rank}", ", ".join(map(str, failure.ranks))
    if failure.cause == "mismatched":
        return DeepEPError(f"{where}: rank {who} is in another call, or its handle or shapes differ; {END}")
    if failure.cause == "refused":
        text = f"{where}: rank {who} refused to take part: see the exception raised there; results are NaN; {END}"
        return DeepEPError(text)
    if failure.cause == "gave up":
        return DeepEPError(f"{where}: rank {who} has failed: see the exception raised there; {END}")
    text = f"{where}: waited {timeout:g} s in vain for {failure.cause} of rank {who}; {END}"
    return PeerTimeoutError(text, failure.ranks, "rail")


def counts_error(report: Sequence[int], number: int, rank: int, bytes_for: Callable[[int, int], int]) -> DeepEPError:
    """The same for what the ranks have told of a dispatch with num_worst_tokens.

    Args:
        report: as the kernel leaves it (csrc/rdma/fresh.hpp).
        bytes_for: the `num_rdma_bytes` that so many rows of so many bytes need.
    """
    where = f"dispatch (exchange {number} between nodes) on rank {rank}"
    verdict, most, widest, *by_rank = report
    size = len(by_rank) // 3
    odd, bounds, rows = (by_rank[i * size : (i + 1) * size] for i in range(3))
    ranks = [r for r, is_odd in enumerate(odd) if is_odd]
    if verdict == 3:
        return ArgumentError(
            f"{where}: {most} rows of {widest} bytes between two nodes do not fit, and with num_worst_tokens no memory is made "
            f"for them; pass num_rdma_bytes={bytes_for(most, widest)} or more to a Buffer without low_latency_mode, or make as "
            f"large a dispatch without num_worst_tokens before; {END}",
            "num_rdma_bytes",
        )
    if verdict == 2:
        each = "; ".join(f"rank {r}: num_worst_tokens={bounds[r]} but {rows[r]} rows" for r in ranks)
        return ArgumentError(f"{where}: {each} arrive; {END}", "num_worst_tokens", ranks)
    return wrong_arguments(where, ranks, [r for r in ranks if odd[r] == AT_FAULT_MISCOUNTED])
