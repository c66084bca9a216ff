"""The spaces of a buffer's low-latency calls, one a shape: how the ranks take their memory together, and lose it."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from torch import Tensor

from deepep_train import _C  # type: ignore[attr-defined]
from deepep_train.engines.arena import Arena, ArenaFull
from deepep_train.engines.low_latency_arguments import Shape, agreed
from deepep_train.engines.low_latency_blocks import Block, choose, give_back, offered
from deepep_train.engines.low_latency_far import OtherNodes
from deepep_train.engines.low_latency_sizes import arena_bytes
from deepep_train.engines.low_latency_space import Space
from deepep_train.engines.nvshmem import before_deadline
from deepep_train.engines.peers import Peers, raise_if_different
from deepep_train.errors import ArgumentError, DeepEPError


class Spaces:
    """Arguments as `LowLatency`'s."""

    def __init__(
        self,
        peers: Peers,
        arena: Arena,
        addresses: list[int],
        ordered: Callable[[], AbstractContextManager[int]],
        device: torch.device,
        far: OtherNodes | None,
    ) -> None:
        self._peers, self._arena, self._far = peers, arena, far
        self._ordered, self._device = ordered, device
        self._arenas = torch.tensor(addresses, device=device)
        self._spaces: dict[Shape, Space] = {}

    def __contains__(self, shape: Shape | None) -> bool:
        return shape in self._spaces

    def __iter__(self) -> Iterator[Space]:
        return iter(self._spaces.values())

    def __len__(self) -> int:
        return len(self._spaces)

    def params(self, p: Any, space: Space, slots: int) -> Any:
        """`p` with what csrc/low_latency/params.hpp has in `Common` of this space."""
        p.spaces, p.own = space.addresses.data_ptr(), space.memory.data_ptr()
        p.arenas, p.set = self._arenas.data_ptr(), slots
        return self._describe(p, space.shape)

    def _describe(self, p: Any, shape: Shape) -> Any:
        p.rank, p.num_ranks = self._peers.rank, self._peers.size
        far = self._far
        p.first_local, p.num_local = (0, p.num_ranks) if far is None else (far.first_local, far.num_local)
        p.put_bytes = 0 if far is None else far.put_bytes.data_ptr()
        p.max_tokens, p.hidden, p.num_experts, p.top_k = shape
        return p

    def of(self, shape: Shape | None, error: Exception | None) -> Space:
        """The first call of a shape is a collective one, and raises on every rank if any has an `error`."""
        if shape is not None and shape in self._spaces:
            return self._spaces[shape]
        if torch.cuda.is_current_stream_capturing():
            raise DeepEPError("the first low_latency_dispatch of a shape cannot be captured in a CUDA graph; make one before")
        block: Block | None = None
        with offered() as idle:
            mine = {"name": secrets.randbits(62), "idle": [[b.name, b.num_bytes] for b in idle.values()]}
            everyone = self._agree(mine | {"agreed": {} if shape is None else agreed(shape)}, error)
            assert shape is not None
            num_bytes = _C.low_latency.space_bytes(self._describe(_C.low_latency.Common(), shape))
            if self._far is not None and (again := choose([other["idle"] for other in everyone], num_bytes)) is not None:
                block = idle.pop(again)
        error, memory, offset = None, None, 0
        where: list[int] = []
        with self._ordered():
            try:
                if (far := self._far) is not None:
                    name = everyone[0]["name"]
                    block = block or before_deadline(self._peers, lambda: far.take(name, num_bytes))
                    memory, where = far.open(block)
                else:
                    memory = self._take((num_bytes,), torch.uint8, shape)
                    offset = self._arena.offset(memory)
                memory[: _C.low_latency.control_bytes()].zero_()
                torch.cuda.current_stream(self._device).synchronize()
            except RuntimeError as caught:
                error = caught
            try:
                # When this returns, every rank's flags are 0.
                everyone = self._agree({"agreed": {}, "offset": offset}, error)
            except DeepEPError:
                # The other ranks may be using it, but then do not offer it, so that it is not taken again before they do.
                with suppress(RuntimeError):  # of CUDA, if that is what failed; then nothing will be taken again
                    self._give_back([block] if block is not None else [])
                raise
            assert memory is not None
            if self._far is None:
                where = [base + other["offset"] for base, other in zip(self._arenas.tolist(), everyone, strict=True)]
            space = self._spaces[shape] = Space(shape, memory, torch.tensor(where, device=self._device), block)
        return space

    def combine_buffer(self, space: Space, slots: int) -> Tensor:
        """bf16 [L, R*M, H] that peers reach; the same for every use of the same slots."""
        kept, shape, size = space.combine_buffers[slots], space.shape, self._peers.size
        if kept is None:
            rows = (shape.num_experts // size, size * shape.max_tokens, shape.hidden)
            kept = space.combine_buffers[slots] = self._take(rows, torch.bfloat16, shape)
        return kept

    def clean(self, max_tokens: int, hidden: int, num_experts: int) -> None:
        """Start anew, on all ranks together; results that are alive are lost."""
        spaces = [s for k, s in self._spaces.items() if k[:3] == (max_tokens, hidden, num_experts)]
        if not spaces or torch.cuda.is_current_stream_capturing():
            return
        with self._ordered():
            torch.cuda.current_stream(self._device).synchronize()
            self._peers.gather_objects({}, "clean_low_latency_buffer")
            for space in spaces:
                space.forget()
                space.memory[: _C.low_latency.control_bytes()].zero_()
            torch.cuda.current_stream(self._device).synchronize()
            self._peers.gather_objects({}, "clean_low_latency_buffer")

    def close(self) -> None:
        """Spaces are no longer called through; NVSHMEM's memory that no graph has is given back when the GPU comes so far."""
        if not self._spaces:
            return
        with self._ordered():
            for space in self._spaces.values():
                space.close()
            if not torch.cuda.is_current_stream_capturing():
                self._give_back([s.block for s in self._spaces.values() if s.block is not None and not s.was_captured])
        self._spaces.clear()

    def _give_back(self, blocks: list[Block]) -> None:
        """For later buffers, when the GPU has come so far."""
        if blocks:
            behind = torch.cuda.Event()
            behind.record(torch.cuda.current_stream(self._device))
            for block in blocks:
                give_back(block, behind)

    def _take(self, size: tuple[int, ...], dtype: torch.dtype, shape: Shape) -> Tensor:
        """A tensor for the calls of `shape`, out of the arena."""
        try:
            return self._arena.empty(size, dtype)
        except ArenaFull as full:
            have = self._arena.num_bytes
            need = have + arena_bytes(shape.max_tokens, shape.hidden, self._peers.size, shape.num_experts)
            raise DeepEPError(
                f"the arena of rank {self._peers.rank} is full: {full.num_bytes} bytes of the low-latency calls of {shape} do "
                f"not fit beside what lives in its {have}; pass num_nvl_bytes={need} or more to Buffer, or keep fewer tensors "
                "alive"
            ) from None

    def _agree(self, mine: dict[str, Any], error: Exception | None) -> list[dict[str, Any]]:
        """What every rank gives, if none has an error and all have the same "agreed"; else raise, on every rank."""
        mine |= {"error": "" if error is None else str(error), "argument": getattr(error, "argument", "")}
        everyone = self._peers.gather_objects(mine, "low_latency_dispatch")
        broken = [r for r, other in enumerate(everyone) if other["error"]]
        if broken:
            what = "low_latency_dispatch: " + "; ".join(f"rank {r}: {everyone[r]['error']}" for r in broken)
            if all(everyone[r]["argument"] for r in broken):
                raise ArgumentError(what, everyone[broken[0]]["argument"], broken) from error
            raise DeepEPError(what) from error
        raise_if_different("low_latency_dispatch", [other["agreed"] for other in everyone])
        return everyone
