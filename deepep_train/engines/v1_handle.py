"""What the tensors of DeepEP V1's intranode handle must say when they are not those that dispatch returned (copies, say)."""

from __future__ import annotations

import torch
from torch import Tensor

from deepep_train.errors import ArgumentError


def checked_prefix(handle: tuple[Tensor, ...], rank: int, is_slot: bool) -> Tensor:
    """`rank_prefix_matrix` on the CPU, int32 [R, R], after a look, which waits for the GPU, at whether it fits the others.

    Args:
        handle: rank_prefix_matrix [R, R], two that are not looked at, recv_src_idx [N], is_token_in_rank [T, R] and send_head
            [T, R], of these shapes and dtypes.
        is_slot: whether send_head numbers tokens among all that a receiver gets, or (False) among this rank's alone.

    Raises:
        ArgumentError: counts that fall, more rows than `recv_src_idx` has, or a `send_head` that does not number this rank's
            tokens for every receiver.
    """
    prefix_RR = handle[0].cpu()
    num_received, in_rank_TR, head_TR = handle[3].size(0), handle[4].cpu(), handle[5].cpu()
    if (prefix_RR.diff(dim=0, prepend=torch.zeros_like(prefix_RR[:1])) < 0).any():
        raise ArgumentError(f"handle: rank_prefix_matrix must not fall along its columns, got {prefix_RR.tolist()}", "handle")
    if (rows := int(prefix_RR[-1, rank])) > num_received:
        raise ArgumentError(
            f"handle: recv_src_idx must name the {rows} rows of rank_prefix_matrix, got {num_received} of them", "handle"
        )
    first_R = prefix_RR[rank - 1] if rank else torch.zeros_like(prefix_RR[0])
    position_TR = in_rank_TR.cumsum(0, dtype=torch.int32) - 1
    expected_TR = torch.where(in_rank_TR, position_TR + first_R if is_slot else position_TR, -1)
    counted_R, given_R = in_rank_TR.sum(0), prefix_RR[rank] - first_R
    if not torch.equal(counted_R.int(), given_R) or not torch.equal(expected_TR.int(), head_TR):
        raise ArgumentError(
            f"handle: is_token_in_rank sends {counted_R.tolist()} tokens, rank_prefix_matrix counts {given_R.tolist()}, and "
            "send_head must number them for each receiver: these are not one dispatch's tensors",
            "handle",
        )
    return prefix_RR
