"""Whether tokens and gradients may cross in FP8, by configuration, command line or environment."""

from __future__ import annotations

import os
from typing import Any

import torch

from deepep_train.errors import ArgumentError

FP8_FIELD = "moe_fp8_dispatch"  # of a TransformerConfig: True or False, set on it after it was made
FP8_OPTION = "--no-moe-fp8-dispatch"  # of `python -m deepep_train.megatron`
FP8_VARIABLE = "DEEPEP_TRAIN_FP8_DISPATCH"  # of the environment, where neither of these says anything
GRADIENTS_FIELD = "moe_fp8_gradients"  # as above: whether combine's gradients cross in FP8 where tokens do
GRADIENTS_OPTION = "--moe-fp8-gradients"
GRADIENTS_VARIABLE = "DEEPEP_TRAIN_FP8_GRADIENTS"
_GRADIENTS = {"e4m3": torch.float8_e4m3fn, "hybrid": torch.float8_e5m2}  # by `TransformerConfig.fp8`
_WORDS = {"1": True, "true": True, "on": True, "yes": True, "0": False, "false": False, "off": False, "no": False}


def wants_fp8_dispatch(config: Any) -> bool:
    """The configuration's `FP8_FIELD`, else `FP8_VARIABLE`; on if neither is set (or the variable is empty)."""
    return _is_on(config, FP8_FIELD, FP8_VARIABLE, "1")


def gradient_dtype(config: Any) -> torch.dtype | None:
    """What combine's backward sends where tokens cross in FP8: the gradients' dtype of Megatron's FP8 format (`config.fp8`) if
    the configuration's `GRADIENTS_FIELD`, else `GRADIENTS_VARIABLE`, asks for it; None, gradients as they are, otherwise."""
    if not config.fp8 or not _is_on(config, GRADIENTS_FIELD, GRADIENTS_VARIABLE, "0"):
        return None
    if config.fp8 not in _GRADIENTS:
        raise ArgumentError(f"{GRADIENTS_FIELD} needs fp8 to be one of {', '.join(_GRADIENTS)}, got {config.fp8!r}", "fp8")
    return _GRADIENTS[config.fp8]


def _is_on(config: Any, field: str, variable: str, default: str) -> bool:
    chosen = getattr(config, field, None)
    if chosen is not None:
        if not isinstance(chosen, bool):
            raise ArgumentError(f"{field} must be True or False, got {chosen!r}", field)
        return chosen
    word = os.environ.get(variable, "").strip().lower() or default
    if word not in _WORDS:
        raise ArgumentError(f"{variable} must be one of {', '.join(_WORDS)}, got {word!r}", variable)
    return _WORDS[word]


def take_option(arguments: list[str]) -> list[str]:
    """Command-line arguments without this library's: `FP8_OPTION` turns FP8 dispatch off, `GRADIENTS_OPTION` FP8 gradients on,
    for this process and those it starts."""
    for option, variable, word in ((FP8_OPTION, FP8_VARIABLE, "0"), (GRADIENTS_OPTION, GRADIENTS_VARIABLE, "1")):
        if option in arguments:
            os.environ[variable] = word
    return [a for a in arguments if a not in (FP8_OPTION, GRADIENTS_OPTION)]
