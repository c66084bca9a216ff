"""The interface between `Buffer` and the engines that move data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from deepep_train.errors import ArgumentError, DeepEPError
from deepep_train.handle import Plan
from deepep_train.routing import RankLayout
from deepep_train.scale_blocks import ScaleBlocks

MAX_EXPERTS, MAX_TOP_K = 4096, 32  # of the kernels' engines; csrc/nvlink/protocol.cuh's kMaxExperts and kMaxTopK
MAX_ALIGNMENT = 1 << 16  # of theirs, too: with 4096 experts, row numbers still fit into 32 bits
MAX_NODES = 256  # of the rdma engine; csrc/rdma/params.hpp's kMaxNodes
MAX_NVLINK_RANKS = 64  # that reach each other's memory; csrc/nvlink/protocol.cuh's kMaxRanks


class Payload(NamedTuple):
    """Rows to move: `data` [rows, hidden] of any floating dtype and, for FP8, `scales` [rows, n].

    With `blocks` they arrive flat, in blocks of the receiver's groups of rows: one for each local expert in expert layout,
    one of all rows in rank layout. `scales` are then 32-bit words. Not in expert layout with `num_worst_tokens`.
    """

    data: Tensor
    scales: Tensor | None = None
    blocks: ScaleBlocks | None = None

    def parts(self) -> list[Tensor]:
        return [self.data] if self.scales is None else [self.data, self.scales]

    def agreement(self) -> tuple[object, ...]:
        """What all ranks must agree on, by the names in `_PAYLOAD`."""
        data, scales, blocks = self
        rows = data.dtype, data.shape[1], data.device.type
        if scales is None:
            return *rows, None, None, None
        return *rows, scales.dtype, scales.shape[1], None if blocks is None else tuple(blocks)


_PAYLOAD = ("dtype", "hidden", "device", "scales dtype", "scales per row", "scale blocks")


class Request(ABC):
    """What an engine is asked to do."""

    names: ClassVar[tuple[str, ...]]

    @abstractmethod
    def agreement(self) -> tuple[object, ...]:
        """What all ranks must agree on, by `names`: on the way of every call, so no more than the values themselves."""

    def signature(self) -> dict[str, object]:
        """The same in words, as they go to other ranks."""
        given = {name: value for name, value in zip(self.names, self.agreement(), strict=True) if value is not None}
        return {name: value if isinstance(value, (int, str)) else str(value) for name, value in given.items()}


@dataclass
class DispatchRequest(Request):
    """A checked dispatch with fresh routing. Shapes as in `deepep_train.dispatch`; `layout`: None where an engine that
    `checks_layout` is to count itself; `arrangement` and the rest as in `Plan`; `num_sms`: SMs to occupy, 0 for the buffer's
    setting; `recipe`: how the payload was quantized, in words that must agree."""

    names: ClassVar[tuple[str, ...]] = (
        "recipe",
        *_PAYLOAD,
        "num_experts",
        "top_k",
        "topk_weights given",
        "layout",
        "alignment",
    )
    payload: Payload
    layout: RankLayout | None
    topk_idx: Tensor | None
    topk_weights: Tensor | None
    num_experts: int
    arrangement: str = "rank"
    alignment: int = 1
    num_worst_tokens: int = 0
    num_sms: int = 0
    recipe: str = ""

    @property
    def counted(self) -> RankLayout:
        """`layout`, for engines that do not count."""
        assert self.layout is not None
        return self.layout

    def agreement(self) -> tuple[object, ...]:
        top_k = 0 if self.topk_idx is None else self.topk_idx.shape[1]
        has_weights = self.topk_weights is not None
        return (
            self.recipe,
            *self.payload.agreement(),
            self.num_experts,
            top_k,
            has_weights,
            self.arrangement,
            self.alignment,
        )


def wrong_counts(
    given: Tensor, counted: Tensor, argument: str = "num_tokens_per_rank", of: str = "is_token_in_rank"
) -> ArgumentError:
    """The counts given are not what `of` comes to; both int32 of one shape."""
    return ArgumentError(f"{argument}={given.tolist()} does not count {of}, which has {counted.tolist()}", argument)


@dataclass
class RedispatchRequest(Request):
    """A checked dispatch along the routing of an earlier one."""

    names = ("recipe", *_PAYLOAD, "layout", "alignment")
    payload: Payload
    plan: Plan
    num_sms: int = 0
    recipe: str = ""

    def agreement(self) -> tuple[object, ...]:
        return self.recipe, *self.payload.agreement(), self.plan.layout, self.plan.alignment


@dataclass
class CombineRequest(Request):
    """A checked combine.

    Attributes:
        rows: [plan.num_rows, hidden].
        weights: float32, [num_rows, top_k] in rank layout, [num_rows] in expert layout; summed alongside.
        bias: tensors [num_tokens, hidden] that the sum starts from.
    """

    names = (*_PAYLOAD, "layout", "weights per token")
    rows: Tensor
    plan: Plan
    weights: Tensor | None = None
    bias: Sequence[Tensor] = field(default=())
    num_sms: int = 0

    def agreement(self) -> tuple[object, ...]:
        width = 0 if self.weights is None else self.weights.shape[1] if self.weights.dim() == 2 else self.plan.top_k
        return *Payload(self.rows).agreement(), self.plan.layout, width


class Received(NamedTuple):
    """What a dispatch with fresh routing gives.

    Attributes:
        payload: [num_rows, …].
        topk_idx: int64 [num_rows, top_k] local expert numbers (rank layout with indices), else None.
        topk_weights: float32 [num_rows, top_k], in expert layout [num_rows], None if none were sent.
        plan, tensors: for the handle; `tensors` as DeepEP V1 lays them out.
    """

    payload: Payload
    topk_idx: Tensor | None
    topk_weights: Tensor | None
    plan: Plan
    tensors: tuple[Tensor, ...]


RequestT = TypeVar("RequestT", bound="DispatchRequest | RedispatchRequest | CombineRequest")


class Prepared(Generic[RequestT]):
    """A request, or the error that stood in the way of making one.

    An engine whose call exchanges anything joins the exchange either way, so that every rank learns of the error.
    """

    def __init__(self, make: Callable[[], RequestT]) -> None:
        self.request: RequestT | None = None
        self.error: Exception | None = None
        try:
            self.request = make()
        except Exception as error:  # noqa: BLE001 - whatever it is, the peers must hear of it
            self.error = error

    def require(self) -> RequestT:
        """The request; raises the error if there is none."""
        if self.request is None:
            assert self.error is not None
            raise self.error
        return self.request


class NoPeerAccess(DeepEPError):
    """These ranks cannot reach each other's memory, though nothing told so before they tried; the same on every rank."""


def need_own_device(device: torch.device | None, own: torch.device | None) -> None:
    """For engines that serve one GPU alone: `device` must be that one, or None."""
    if device is not None and device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if device not in (None, own):
        raise ArgumentError(f"device must be {own}, this engine's, got {device}", "device")


def aligned(t: Tensor) -> Tensor:
    """As kernels read it, 16 bytes at a time: contiguous, a copy if need be."""
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def address_of(t: Tensor | None) -> int:
    """As kernels are told it; 0: there is none."""
    return 0 if t is None else t.data_ptr()


def need_rows_of(
    payload: Payload, argument: str, own: torch.device | None, dtypes: Collection[torch.dtype], engine: str
) -> None:
    """For the same: rows that lie on `own`, in one of `dtypes` or in bytes."""
    data = payload.data
    if data.device != own:
        raise ArgumentError(
            f"{argument} must lie on {own}, this engine's device, got {data.device}; Buffer(engine='collective') serves any "
            "device",
            argument,
        )
    if data.dtype.itemsize != 1 and data.dtype not in dtypes:
        raise ArgumentError(
            f"{argument} in {data.dtype} needs engine='collective'; {engine} moves bf16, fp16, fp32 and FP8", argument
        )


class Engine(ABC):
    """Moves rows between the ranks of one group. Results are the same, bit for bit, on every engine.

    Engines work on the current stream; `Buffer` chooses it. Arguments come checked.
    """

    name: str
    rank: int
    low_latency: Any = None  # `engines.low_latency.LowLatency` where there are kernels for it
    device: torch.device | None = None  # the only one it serves; None: any
    forwards: bool = False  # whether rows cross between nodes once and are forwarded there, and sums are by node
    # Whether dispatch itself counts tokens, and finds wrong indices and counts, so that no check need wait for the GPU.
    checks_layout: bool = False

    def check_payload(self, payload: Payload, argument: str = "x") -> None:  # noqa: B027 - most engines take everything
        """Raise `ArgumentError` if this engine cannot move `payload`."""

    @abstractmethod
    def layout(self, topk_idx: Tensor, num_experts: int) -> RankLayout:
        """Count tokens by rank, node and expert; exchanges nothing."""

    @abstractmethod
    def dispatch(self, prepared: Prepared[DispatchRequest]) -> Received:
        """Send every row to the ranks its layout names."""

    @abstractmethod
    def redispatch(self, prepared: Prepared[RedispatchRequest]) -> Payload:
        """Send rows the way an earlier dispatch sent its own."""

    @abstractmethod
    def combine(self, prepared: Prepared[CombineRequest]) -> tuple[Tensor, Tensor | None]:
        """Bring rows back and sum them: ([num_tokens, hidden], weights float32 [num_tokens, top_k] or None)."""

    @abstractmethod
    def plan_of(self, tensors: tuple[Tensor, ...]) -> Plan:
        """The plan of a handle that lost its class: its own, if these are the tensors that dispatch returned, or, if they are
        copies, what they say (rank layout, no indices)."""

    @abstractmethod
    def check(self) -> None:
        """Raise what has failed so far."""

    @abstractmethod
    def destroy(self) -> None:
        """Give back what the engine holds."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | None) -> Tensor:
        """An uninitialised tensor in the memory from which `combine` reads fastest; `device` None: the engine's choice."""
        return torch.empty(tuple(shape), dtype=dtype, device=device)

    def memory_stats(self) -> dict[str, int]:
        """Bytes held for communication, by purpose."""
        return {}
