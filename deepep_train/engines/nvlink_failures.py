"""What an operation that has failed among ranks that reach each other's memory raises: the kernels' codes as exceptions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from deepep_train.engines import processes
from deepep_train.engines.base import DispatchRequest, wrong_counts
from deepep_train.errors import ArgumentError, DeepEPError, PeerTimeoutError
from deepep_train.routing import count_picks

END = "this buffer can no longer be used"


def device_error(failure: Any, rank: int, timeout: float, peers: Sequence[Sequence[str]]) -> DeepEPError:
    """The exception for a failure that a kernel has found.

    Args:
        failure: `_C.Failure`.
        timeout: seconds, the buffer's.
        peers: every rank's `processes.identity()`.
    """
    where = f"{failure.operation} (number {failure.epoch}) on rank {rank}"
    who = ", ".join(map(str, failure.ranks))
    if failure.cause == "missing":
        waited = f"waited {timeout:g} s in vain for {failure.meeting} of rank {who}"
        return PeerTimeoutError(f"{where}: {waited}{who_ended(peers)}; {END}", failure.ranks, failure.operation)
    if failure.cause == "blamed":
        text = f"{where}: other ranks gave up on rank {who}{who_ended(peers)}; {END}"
        return PeerTimeoutError(text, failure.ranks, failure.operation)
    if failure.cause == "astray":
        return DeepEPError(f"{where}: other ranks found rank {who} in another call, or with another handle or shapes; {END}")
    if failure.cause == "mismatched":
        return DeepEPError(f"{where}: rank {who} is in another call, or its handle or shapes differ; {END}")
    if failure.cause == "overflow":
        each = "; ".join(f"rank {r}: num_worst_tokens={failure.bounds[r]} but {failure.rows[r]} rows" for r in failure.ranks)
        return ArgumentError(f"{where}: {each} arrive; {END}", "num_worst_tokens", failure.ranks)
    if failure.cause == "refused":
        why = "see the exception raised there"
        if failure.bytes < 0:
            why = "its exchange with other nodes has failed"
        elif failure.bytes:
            why = f"an arena there has no room for {failure.bytes} bytes; pass a larger num_nvl_bytes to Buffer"
        return DeepEPError(f"{where}: rank {who} refused to take part: {why}; results are NaN; {END}")
    return wrong_arguments(where, failure.ranks, [r for r in failure.ranks if failure.bytes >> r & 1])


def wrong_arguments(where: str, ranks: Sequence[int], miscounted: Sequence[int]) -> ArgumentError:
    """For a dispatch with num_worst_tokens, of which the kernels tell no more. `miscounted`: those of `ranks` whose topk_idx is
    at fault."""
    texts = []
    if miscounted:
        who = ", ".join(map(str, miscounted))
        texts.append(f"topk_idx of rank {who} has an index outside [-1, num_experts), or counts beside it that are not its own")
    if others := [str(r) for r in ranks if r not in miscounted]:
        texts.append(f"the arguments of rank {', '.join(others)} are wrong or differ from this rank's")
    return ArgumentError(f"{where}: {', and '.join(texts)}; {END}", "topk_idx" if miscounted else "", ranks)


def check_cuda(comm: Any, stream: int, rank: int, peers: Sequence[Sequence[str]], error: BaseException | None = None) -> None:
    """Raise if CUDA has failed for good; `comm`: this rank's `_C.Communicator`."""
    if text := comm.cuda_error(stream):
        raise cuda_failed(text, rank, peers) from error


def leave(comm: Any, stream: int, rank: int, peers: Sequence[Sequence[str]]) -> None:
    """What follows on any stream comes behind what was launched on this one."""
    try:
        comm.leave(stream)
    except RuntimeError as error:  # it may be the first to see what an earlier kernel has done
        check_cuda(comm, stream, rank, peers, error)
        raise


def cuda_failed(text: str, rank: int, peers: Sequence[Sequence[str]]) -> DeepEPError:
    """Under MPS one process that is killed may break CUDA for all others of its GPU."""
    return DeepEPError(f"CUDA has failed on rank {rank}: {text}{who_ended(peers)}")


def who_ended(peers: Sequence[Sequence[str]]) -> str:
    """For the end of a sentence: the ranks whose processes are known to have ended; "" if none is."""
    ended = [str(r) for r, process in enumerate(peers) if processes.has_ended(process)]
    if not ended:
        return ""
    return f"; the process of rank {ended[0]} has ended" if len(ended) == 1 else f"; ended: ranks {', '.join(ended)}"


def layout_error(request: DispatchRequest) -> ArgumentError:
    """What the flag `out_of_range` of a count exchange stands for."""
    layout = request.layout
    if layout is not None:
        counted = layout.is_token_in_rank.sum(0, dtype=torch.int32)
        if not torch.equal(counted, layout.num_tokens_per_rank):
            return wrong_counts(layout.num_tokens_per_rank, counted)
    assert request.topk_idx is not None
    low, high = (int(v) for v in torch.aminmax(request.topk_idx)) if request.topk_idx.numel() else (-1, -1)
    if layout is not None and low >= -1 and high < request.num_experts:
        counted = count_picks(request.topk_idx, request.num_experts)
        return wrong_counts(layout.num_tokens_per_expert, counted, "num_tokens_per_expert", "topk_idx")
    return ArgumentError(
        f"topk_idx must lie in [-1, {request.num_experts}) (num_experts={request.num_experts}), "
        f"got values from {low} to {high}",
        "topk_idx",
    )
