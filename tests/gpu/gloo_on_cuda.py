"""Lets Megatron train over gloo with tensors on a GPU, so that ranks may share one (NCCL refuses that).

gloo's collectives take CUDA tensors, but not when several are made one call, and its sends and receives do not at all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.pipeline_parallel import p2p_communication
from torch import Tensor

from deepep_train.megatron.replacements import Replacements

_replaced = Replacements()


class _Request:
    """Holds the host's tensor until the transfer is done, and copies what was received to where it belongs."""

    def __init__(self, work: Any, host: Tensor, to: Tensor | None) -> None:
        self._work, self._host, self._to = work, host, to

    def wait(self) -> None:
        self._work.wait()
        if self._to is not None:
            with torch.no_grad():
                self._to.copy_(self._host)


def through_host(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's sends and receives among pipeline stages (`tensor_send_prev` and so on, by name), through host memory."""

    def transfer(**given: Any) -> Any:
        tensors = {n: t for n, t in given.items() if isinstance(t, Tensor)}
        hosts = {n: t.detach().cpu() if "_send_" in n else torch.empty_like(t, device="cpu") for n, t in tensors.items()}
        works = stock(**given | hosts)
        to = {n: t if "_recv_" in n else None for n, t in tensors.items()}
        if isinstance(works, dict):  # by name without "tensor_", else in the order of the arguments
            return {n: _Request(w, hosts[f"tensor_{n}"], to[f"tensor_{n}"]) for n, w in works.items()}
        return [_Request(w, hosts[n], to[n]) for n, w in zip(tensors, works, strict=True)]

    return transfer


@contextlib.contextmanager
def _one_by_one(*_: Any, async_ops: bool = False, **__: Any) -> Iterator[None]:
    assert not async_ops, "only for collectives that are waited for"
    yield


def enable() -> None:
    """Doing it twice does nothing."""
    if _replaced:
        return
    for name in ("_batched_p2p_ops", "_p2p_ops"):
        _replaced.put(p2p_communication, name, through_host(getattr(p2p_communication, name)))
    _replaced.put(param_and_grad_buffer, "_coalescing_manager", _one_by_one)


def disable() -> None:
    """Take that back."""
    _replaced.take_back()
