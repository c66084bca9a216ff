"""Megatron-Core trains through this library: see docs/megatron.md.

    import deepep_train.megatron
    deepep_train.megatron.install()
    TransformerConfig(..., moe_token_dispatcher_type="flex", moe_flex_dispatcher_backend="deepep_train")

Importing this needs no Megatron; calling does.
"""

from __future__ import annotations

from typing import Any

from deepep_train.megatron.install import BACKEND, DISPATCHERS, install, uninstall

__all__ = ["BACKEND", "DISPATCHERS", "TokenDispatcher", "install", "uninstall"]


def __getattr__(name: str) -> Any:
    if name == "TokenDispatcher":
        from deepep_train.megatron.dispatcher import TokenDispatcher

        return TokenDispatcher
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
