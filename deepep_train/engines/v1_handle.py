"""What the tensors of a DeepEP V1 handle must say when they are not those that dispatch returned (copies, say)."""

from __future__ import annotations

import torch
from torch import Tensor

from deepep_train.errors import ArgumentError


def channels(num_ranks: int, arrangement: str, device: torch.device) -> Tensor:
    """A handle's `recv_channel_prefix_matrix` (internode: `recv_gbl_channel_prefix_matrix`), int32 [R, channels]. V1's channels
    are one here, which begins at 0. In expert layout, which V1 does not have, there are none, so that copies of the handle's
    tensors, which say nothing of where a row's copies are, are not taken for a handle of rank layout."""
    return torch.zeros(num_ranks, 1 if arrangement == "rank" else 0, dtype=torch.int32, device=device)


def need_rank_layout(handle: tuple[Tensor, ...]) -> None:
    """Raises:
    ArgumentError: these are copies of what a dispatch to expert layout returned.
    """
    given = handle[2] if len(handle) == 6 else handle[5]
    if given.numel() == 0:
        name = "recv_channel_prefix_matrix" if len(handle) == 6 else "recv_gbl_channel_prefix_matrix"
        raise ArgumentError(
            f"handle: {name} {list(given.shape)} is that of a dispatch to expert layout, whose plan travels neither with "
            "copies of its tensors nor with altered ones: hand back the handle that dispatch returned",
            "handle",
        )


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
