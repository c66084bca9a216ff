"""Argument checks shared by every public call: each raises `ArgumentError` naming the argument and what was passed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from deepep_train.config import Config
from deepep_train.engines.base import Payload
from deepep_train.errors import ArgumentError
from deepep_train.events import EventOverlap
from deepep_train.handle import LAYOUTS
from deepep_train.scale_blocks import ScaleBlocks

PAYLOAD_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8)
SCALE_DTYPES = (torch.float32, torch.int32, torch.uint8)


def shown(value: Any) -> str:
    """A value as error messages show it: tensors by dtype and shape."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)} on {value.device}"
    text = repr(value)
    return f"{text if len(text) < 80 else text[:77] + '...'} ({type(value).__name__})"


def need(condition: bool, argument: str, expected: str, got: Any) -> None:
    """Raise `ArgumentError` unless `condition` holds."""
    if not condition:
        raise ArgumentError(f"{argument} must be {expected}, got {shown(got)}", argument.partition(":")[0])


# Counts of rows, experts and bytes: far above what fits a machine, and safely inside the int64 that headers are made of.
LARGEST = 2**48
MOST_EXPERTS = 1 << 20  # of which every rank has a table


def integer(value: Any, argument: str, minimum: int = 0) -> int:
    is_int = isinstance(value, int) and not isinstance(value, bool)
    need(is_int and minimum <= value <= LARGEST, argument, f"an int from {minimum} to 2**48", value)
    return value


def number(value: Any, argument: str, minimum: float = 0.0) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    need(is_number and minimum <= value < float("inf"), argument, f"a finite number >= {minimum:g}", value)
    return value


def _fits(shape: Sequence[int | None], given: Sequence[int]) -> bool:
    """Whether `given` is `shape`, where None is any size."""
    if len(shape) != len(given):
        return False
    for wanted, size in zip(shape, given, strict=True):  # noqa: SIM110 - `all` takes twice as long, on the way of every call
        if wanted is not None and wanted != size:
            return False
    return True


_WITH_MEMORY = (Tensor, torch.nn.Parameter)


def _has_memory(value: Any) -> bool:
    """Whether its elements are what lies at its `data_ptr()`: that of a DTensor, say, is 0, and so is that of a tensor whose
    storage was freed, while a part of one points right behind nothing; what a negated view has there is not its elements."""
    if type(value) not in _WITH_MEMORY and (
        not isinstance(value, Tensor) or is_traceable_wrapper_subclass(value) or hasattr(value, "fake_mode")
    ):
        return False
    return not value.numel() or (value.data_ptr() != 0 and _is_stored(value) and not value.is_neg())


def _is_stored(t: Tensor) -> bool:
    """Whether its storage still reaches to its last element."""
    size = t.numel() if t.is_contiguous() else 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return (t.storage_offset() + size) * t.element_size() <= t.untyped_storage().nbytes()


def tensor(
    value: Any,
    argument: str,
    shape: Sequence[int | None],
    dtypes: Sequence[torch.dtype],
    device: torch.device | None,
    is_read: bool = True,
) -> Tensor:
    """A dense tensor of this shape (None: any size), one of these dtypes, on this device (None: any), with memory if its
    elements are to be read."""
    if (
        isinstance(value, Tensor)
        and value.dtype in dtypes
        and _fits(shape, value.shape)
        and (device is None or value.device == device)
        and value.layout == torch.strided
        and (not is_read or _has_memory(value))
    ):
        return value  # before any text is made: this is on the way of every call
    names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
    wanted = f"a {names} tensor of shape [{', '.join('any' if n is None else str(n) for n in shape)}]"
    wanted += f" on {device}" if device is not None else ""
    need(isinstance(value, Tensor), argument, wanted, value)
    need(value.layout == torch.strided, argument, f"{wanted}, dense (layout torch.strided, not {value.layout})", value)
    if is_read and not _has_memory(value):
        text = f"{argument} must be {wanted} with memory of its own, got a {type(value).__name__}"
        text += "; pass its local part, x.to_local()" if hasattr(value, "to_local") else ""
        text += " whose storage is empty or too short" if type(value) in _WITH_MEMORY and not value.is_neg() else ""
        text += " that is a negated view: pass x.resolve_neg()" if value.is_neg() else ""
        raise ArgumentError(text, argument.partition(":")[0])
    need(value.dtype in dtypes, argument, wanted, value)
    need(_fits(shape, value.shape), argument, wanted, value)
    need(device is None or value.device == device, argument, wanted, value)
    return value


def flag(value: Any, argument: str) -> bool:
    need(isinstance(value, bool), argument, "True or False", value)
    return value


def wire_format(use_logfmt: Any, zero_copy: Any) -> None:
    """How low_latency_combine's rows travel."""
    flag(use_logfmt, "use_logfmt")
    flag(zero_copy, "zero_copy")
    if use_logfmt and zero_copy:
        raise ArgumentError("use_logfmt=True needs a copy of x, and zero_copy=True makes none", "use_logfmt")


def stream_arguments(previous_event: Any, async_finish: Any, allocate_on_comm_stream: Any, config: Any = None) -> None:
    """What every call of V1 says about streams and tuning."""
    if previous_event is None and config is None and async_finish is False and allocate_on_comm_stream is False:
        return
    need(config is None or isinstance(config, Config), "config", "a deepep_train.Config or None", config)
    is_event = previous_event is None or isinstance(previous_event, EventOverlap)
    need(is_event, "previous_event", "an EventOverlap or None", previous_event)
    flag(async_finish, "async_finish")
    flag(allocate_on_comm_stream, "allocate_on_comm_stream")
    if allocate_on_comm_stream and not (async_finish and previous_event is not None):
        raise ArgumentError(
            "allocate_on_comm_stream=True needs previous_event and async_finish=True", "allocate_on_comm_stream"
        )


def v1_handle(tensors: Sequence[Any], num_ranks: int, num_nodes: int) -> None:
    """The tensors of a handle that lost its class, in V1's places: 6 of an intranode or 10 of an internode dispatch."""
    int32 = (torch.int32,)
    in_rank = tensors[4] if len(tensors) == 6 else tensors[0]
    tensor(in_rank, "handle: is_token_in_rank", [None, num_ranks], (torch.bool,), None)
    if len(tensors) == 6:
        tensor(tensors[0], "handle: rank_prefix_matrix", [num_ranks, num_ranks], int32, in_rank.device)
        tensor(tensors[3], "handle: recv_src_idx", [None], int32, in_rank.device)
        tensor(tensors[5], "handle: send_head", list(in_rank.shape), int32, in_rank.device)
    else:
        tensor(tensors[4], "handle: recv_rdma_rank_prefix_sum", [num_nodes], int32, in_rank.device)
        tensor(tensors[6], "handle: recv_gbl_rank_prefix_sum", [num_ranks], int32, in_rank.device)
        tensor(tensors[9], "handle: send_nvl_head", [None, num_ranks // num_nodes], int32, in_rank.device)


def payload(x: Any, argument: str = "x", num_tokens: int | None = None) -> Payload:
    """`x`: a floating tensor [tokens, hidden], or an FP8 pair (data [tokens, hidden], scales [tokens, n]), or a
    `Payload` with `blocks`."""
    if not isinstance(x, (tuple, list)):
        if isinstance(x, Tensor):
            _need_device(x, argument)
            if x.dtype in FP8_DTYPES:
                raise ArgumentError(f"{argument} in FP8 must come as a pair (data, scales), got {shown(x)}", argument)
        data = tensor(x, argument, [num_tokens, None], PAYLOAD_DTYPES, None)
        need(data.shape[1] >= 1, argument, "at least one element wide", data)
        return Payload(data)
    if x and isinstance(x[0], Tensor):
        _need_device(x[0], argument)
    blocks = x.blocks if isinstance(x, Payload) else None
    need(len(x) == 2 or isinstance(x, Payload), argument, "a tensor or a pair (data, scales)", x)
    data = tensor(x[0], f"{argument}[0]", [num_tokens, None], FP8_DTYPES, None)
    scales = tensor(x[1], f"{argument}[1]", [data.size(0), None], SCALE_DTYPES, data.device)
    need(data.size(1) >= 1, f"{argument}[0]", "at least one element wide", data)
    need(scales.size(1) >= 1, f"{argument}[1]", "at least one scale wide", scales)
    if blocks is not None:
        _scale_blocks(blocks, f"{argument}: blocks")
        need(scales.element_size() == 4, f"{argument}[1]", "32-bit scales, to be put into blocks", scales)
    return Payload(data, scales, blocks)


def _need_device(value: Tensor, argument: str) -> None:
    need(value.device.type in ("cpu", "cuda"), argument, "on the CPU or a CUDA device", value)


def _scale_blocks(value: Any, argument: str) -> None:
    need(isinstance(value, ScaleBlocks), argument, "fp8.ScaleBlocks or None", value)
    flag(value.tokens_innermost, f"{argument}.tokens_innermost")
    integer(value.multiple, f"{argument}.multiple", 1)
    need(value.multiple <= 2**16, f"{argument}.multiple", "at most 2**16", value.multiple)
    is_word = isinstance(value.padding_word, int) and -(2**31) <= value.padding_word < 2**31
    need(is_word, f"{argument}.padding_word", "an int of 32 bits", value.padding_word)


def experts(num_experts: Any, num_ranks: int) -> int:
    integer(num_experts, "num_experts", 1)
    need(num_experts <= MOST_EXPERTS, "num_experts", f"at most {MOST_EXPERTS}", num_experts)
    if num_experts % num_ranks:
        raise ArgumentError(f"num_experts={num_experts} must be divisible by the group's {num_ranks} ranks", "num_experts")
    return num_experts


def topk_idx(
    value: Any, num_tokens: int | None, num_experts: int, device: torch.device | None, check_range: bool = True
) -> Tensor:
    """int64 [tokens, top_k] in [-1, num_experts). Reading the range waits for the GPU if the tensor is there."""
    known = isinstance(value, Tensor) and value.dtype is torch.int64 and value.dim() == 2 and value.layout is torch.strided
    is_layout_call = num_tokens is None and device is None  # whose time is the CPU's
    if not (known and is_layout_call and _has_memory(value)):
        tensor(value, "topk_idx", [num_tokens, None], (torch.int64,), device)
    need(value.shape[1] >= 1, "topk_idx", "at least one choice wide", value)
    if check_range and value.numel():
        low, high = (int(v) for v in torch.aminmax(value))
        if low < -1 or high >= num_experts:
            raise ArgumentError(
                f"topk_idx must lie in [-1, {num_experts}) (num_experts={num_experts}), got values from {low} to {high}",
                "topk_idx",
            )
    return value


def layout(value: Any) -> str:
    need(isinstance(value, str) and value in LAYOUTS, "layout", " or ".join(map(repr, LAYOUTS)), value)
    return value


def bias(value: Any, num_tokens: int, like: Tensor) -> tuple[Tensor, ...]:
    """None, a tensor or a pair of tensors, each of the combined result's shape and dtype."""
    if value is None:
        return ()
    given = value if isinstance(value, (tuple, list)) else (value,)
    need(1 <= len(given) <= 2, "bias", "None, a tensor or a pair of tensors", value)
    return tuple(tensor(b, "bias", [num_tokens, like.size(1)], (like.dtype,), like.device) for b in given)
