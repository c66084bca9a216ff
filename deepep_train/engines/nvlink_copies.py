"""Plans of the nvlink engine's handles that have become copies: what their tensors say, once somebody has looked at it."""

from __future__ import annotations

import torch
from torch import Tensor

from deepep_train import _C  # type: ignore[attr-defined]
from deepep_train.engines.nvlink_tables import NvlinkPlan
from deepep_train.engines.signature import hashed
from deepep_train.engines.v1_handle import checked_prefix, need_rank_layout
from deepep_train.errors import ArgumentError


def plan_of_copies(tensors: tuple[Tensor, ...], rank: int, num_ranks: int, device: torch.device) -> NvlinkPlan:
    """Of V1's six tensors, copied or written to since dispatch returned them: no kernel may run on what they say before the CPU
    has looked, which waits for the GPU.

    Args:
        device: the engine's.

    Raises:
        ArgumentError: they lie elsewhere, do not fit together, or are of a dispatch to expert layout.
    """
    need_rank_layout(tensors)
    prefix_RR, _, _, source, _, send_slot = tensors
    if send_slot.device != device:
        raise ArgumentError(f"handle must lie on {device}, this engine's device, got {send_slot.device}", "handle")
    prefix = checked_prefix(tensors, rank, is_slot=True)
    send_slot, received = send_slot.contiguous(), prefix_RR[-1, rank].reshape(1)
    tables = _C.Tables(send_slot.shape[0], 0, 0, num_ranks, False, False)
    tables.send_slot = tables.send_row = tables.pull_row = send_slot.data_ptr()
    tables.num_received = received.data_ptr()
    return NvlinkPlan(
        number=hashed("copied handle", *prefix.flatten().tolist()),
        num_tokens=send_slot.size(0),
        num_received=source.size(0),
        num_rows=source.size(0),
        num_experts=0,
        top_k=0,
        layout="rank",
        alignment=1,
        tokens_per_expert=torch.empty(0, dtype=torch.int64),
        recv_topk_idx=None,
        tables=tables,
        kept=(send_slot, received),
        has_tail=True,  # it may: nobody knows any more
        stream=None,
        as_made=None,
    )
