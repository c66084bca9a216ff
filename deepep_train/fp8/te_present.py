"""Whether Transformer Engine's kernels can run."""

from __future__ import annotations

import functools
import importlib
import importlib.util

import torch

from deepep_train.fp8.quantized import Recipe

_CAPABILITY = {Recipe.BLOCK: (9, 0), Recipe.TENSOR: (9, 0), Recipe.MXFP8: (10, 0)}


@functools.cache
def is_installed() -> bool:
    if importlib.util.find_spec("transformer_engine") is None:
        return False
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError, RuntimeError):  # without its PyTorch part, or without the libraries that it looks for
        return False
    return True


def has_te_kernels(device: torch.device, recipe: Recipe) -> bool:
    """For tensors of `recipe` on `device`."""
    return device.type == "cuda" and is_installed() and torch.cuda.get_device_capability(device) >= _CAPABILITY[recipe]
