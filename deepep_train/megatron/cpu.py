"""Runs Megatron-Core's MoE on a machine without a GPU: for development, tests and small experiments, over gloo.

    from deepep_train.megatron import cpu
    cpu.enable()                      # before the model is built
    config = TransformerConfig(..., **cpu.CONFIG)

Megatron asks torch.cuda for streams, events and random states whatever it runs on, and makes tensors on "cuda". `enable` gives
it stand-ins that do nothing, since all work of a CPU is done when a call returns, and lets "cuda" mean "cpu" on the calling
thread; `disable` takes that back. Layer specifications must be the "local" ones, not Transformer Engine's.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from deepep_train.errors import DeepEPError

# What a TransformerConfig must say besides: no kernels that only GPUs have.
CONFIG: dict[str, Any] = {
    "use_cpu_initialization": True,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_dropout_fusion": False,
    "bias_activation_fusion": False,
    "persist_layer_norm": False,
    "moe_permute_fusion": False,
}

_undo: list[Callable[[], None]] = []


class _Stream:
    """Every stream is the CPU's own order."""

    cuda_stream = 0
    device = torch.device("cpu")

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, _: Any) -> None: ...

    def wait_event(self, _: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def synchronize(self) -> None: ...

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: Any) -> None: ...


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, _: Any = None) -> None: ...

    def wait(self, _: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 0.0


class _CudaIsCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if _is_cuda(kwargs.get("device")):
            kwargs = kwargs | {"device": "cpu"}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


@contextlib.contextmanager
def _stream(stream: Any) -> Iterator[Any]:
    yield stream


def enable() -> None:
    """Put the stand-ins in place, in torch.cuda and in Megatron. Doing it twice does nothing.

    Raises:
        DeepEPError: where there is a GPU, or no megatron-core.
    """
    if _undo:
        return
    if torch.cuda.is_available():
        raise DeepEPError("deepep_train.megatron.cpu is for machines without a GPU; hide it with CUDA_VISIBLE_DEVICES=")
    try:
        random = importlib.import_module("megatron.core.tensor_parallel.random")
        token_dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
        moe_utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    except ImportError as error:
        raise DeepEPError("deepep_train.megatron.cpu needs megatron-core: pip install megatron-core") from error
    one_stream = _Stream()
    for name, stand_in in {
        "current_device": lambda: "cpu",
        "current_stream": lambda *_, **__: one_stream,
        "default_stream": lambda *_, **__: one_stream,
        "Stream": _Stream,
        "Event": _Event,
        "stream": _stream,
        "synchronize": lambda *_, **__: None,
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
        "manual_seed": torch.default_generator.manual_seed,
    }.items():
        _replace(torch.cuda, name, stand_in)
    _replace(random, "_get_cuda_rng_state", lambda *_, **__: torch.get_rng_state())
    _replace(random, "_set_cuda_rng_state", lambda state, *_, **__: torch.set_rng_state(state))
    # As on a GPU, where it copies to the host and may give numpy arrays; there is nothing to copy.
    _replace(token_dispatcher, "maybe_move_tensor_to_cpu", _on_the_host)
    mode = _CudaIsCpu()
    mode.__enter__()
    _undo.append(lambda: mode.__exit__(None, None, None))
    if hasattr(moe_utils, "te_general_gemm"):
        _replace(moe_utils, "te_general_gemm", None)  # Transformer Engine's runs on GPUs only


def disable() -> None:
    """Take the stand-ins back."""
    while _undo:
        _undo.pop()()


def _on_the_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def _replace(module: Any, name: str, new: Any) -> None:
    old = getattr(module, name)
    setattr(module, name, new)
    _undo.append(lambda: setattr(module, name, old))
