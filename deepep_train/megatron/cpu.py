"""Runs Megatron-Core's MoE on a machine without a GPU: for development, tests and small experiments, over gloo.

    from deepep_train.megatron import cpu
    cpu.enable()                      # before the model is built
    config = TransformerConfig(..., **cpu.CONFIG)

Megatron asks torch.cuda for streams, events and random states whatever it runs on, and makes tensors on "cuda". `enable` gives
it stand-ins that do nothing, since all work of a CPU is done when a call returns, and lets "cuda" mean "cpu"; `disable` takes
that back. Layer specifications must be the "local" ones, not Transformer Engine's.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from deepep_train.errors import DeepEPError
from deepep_train.megatron.replacements import Replacements

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

_HYBRID_BLOCKS = ("megatron.core.models.hybrid.hybrid_block", "megatron.core.ssm.mamba_block")  # by release

_replaced = Replacements()


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


# Functions that make tensors on a device given by name. A TorchFunctionMode would catch them all, but not in the backward pass,
# where activation checkpointing runs the forward pass again.
_FACTORIES = (
    *("arange", "as_tensor", "empty", "empty_like", "eye", "full", "full_like", "linspace", "ones", "ones_like"),
    *("rand", "randint", "randn", "randperm", "tensor", "zeros", "zeros_like"),
)


def _on_cpu(make: Callable[..., Any]) -> Callable[..., Any]:
    def made(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return make(*args, **kwargs)

    return made


def _to(stock: Callable[..., Any]) -> Callable[..., Any]:
    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args and _is_cuda(args[0]):
            args = ("cpu", *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return stock(self, *args, **kwargs)

    return to


def _type(stock: Callable[..., Any]) -> Callable[..., Any]:
    def type_(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = stock(self, *args, **kwargs)
        # Megatron's gradient clipping wants to read "torch.cuda.FloatTensor".
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    return type_


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
    if _replaced:
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
        _replaced.put(torch.cuda, name, stand_in)
    _replaced.put(random, "_get_cuda_rng_state", lambda *_, **__: torch.get_rng_state())
    _replaced.put(random, "_set_cuda_rng_state", lambda state, *_, **__: torch.set_rng_state(state))
    # As on a GPU, where it copies to the host and may give numpy arrays; there is nothing to copy.
    _replaced.put(token_dispatcher, "maybe_move_tensor_to_cpu", _on_the_host)
    for name in _FACTORIES:
        _replaced.put(torch, name, _on_cpu(getattr(torch, name)))
    _replaced.put(torch.Tensor, "to", _to(torch.Tensor.to))
    _replaced.put(torch.Tensor, "cuda", lambda self, *_, **__: self)
    _replaced.put(torch.Tensor, "record_stream", lambda *_: None)
    _replaced.put(torch.Tensor, "type", _type(torch.Tensor.type))
    _replaced.put(moe_utils, "te_general_gemm", None)  # Transformer Engine's runs on GPUs only; 0.16 does without the name
    for name in _HYBRID_BLOCKS:
        with contextlib.suppress(ImportError):
            # Whatever the specification, hybrid models end in Transformer Engine's norm.
            norm = importlib.import_module("megatron.core.transformer.torch_norm").WrappedTorchNorm
            _replaced.put(importlib.import_module(name), "TENorm", norm)


def disable() -> None:
    """Take the stand-ins back."""
    _replaced.take_back()


def _on_the_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor
