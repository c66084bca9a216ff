"""The low-latency calls' part between nodes, over NVSHMEM: spaces in its memory, and what is put behind each of the kernels.

docs/low_latency.md explains the protocol, csrc/rdma/low_latency.cu holds the kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepep_train.engines.low_latency_blocks import Block


def tensor_at(address: int, num_bytes: int, device: torch.device) -> Tensor:
    """Python's eyes on memory that torch does not own: uint8 [num_bytes]."""
    storage = torch._C._construct_storage_from_data_pointer(address, device, num_bytes)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


class OtherNodes:
    """See the module.

    Args:
        kernels: `deepep_train._rdma`, with NVSHMEM started for the group's ranks.
        end: this rank's `Endpoint`.
        first_local, num_local: ranks of this node, which reach each other's memory.
    """

    def __init__(self, kernels: Any, end: Any, first_local: int, num_local: int, num_ranks: int, device: torch.device) -> None:
        self.first_local, self.num_local = first_local, num_local
        self._kernels, self._num_ranks, self._device = kernels, num_ranks, device
        self.put_bytes = torch.zeros(1, dtype=torch.int64, device=device)  # the kernels count: how many rows go is known there
        self._launches = {
            "dispatch_send": end.put_dispatch,
            "dispatch_receive": lambda p, stream: end.answer(p, False, stream),
            "combine_send": end.put_combine,
            "combine_receive": lambda p, stream: end.answer(p, True, stream),
        }

    def take(self, name: int, num_bytes: int) -> Block:
        """New memory, a collective call, which may be made on a thread of its own."""
        with torch.cuda.device(self._device):
            return Block(name, num_bytes, self._kernels.allocate(num_bytes))

    def open(self, block: Block) -> tuple[Tensor, list[int]]:
        """Its memory, and where every rank's is, as this process maps it; 0 for those of other nodes."""
        local = range(self.first_local, self.first_local + self.num_local)
        where = [self._kernels.of_peer(block.address, r) if r in local else 0 for r in range(self._num_ranks)]
        return tensor_at(block.address, block.num_bytes, self._device), where

    def follow(self, launched: str, p: Any, stream: int) -> None:
        """What comes behind a launch of that name in `_C.low_latency`, with its arguments."""
        self._launches[launched](p, stream)
