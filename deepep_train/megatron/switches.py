"""Whether tokens may cross in FP8, by configuration, command line or environment."""

from __future__ import annotations

import os
from typing import Any

from deepep_train.errors import ArgumentError

FP8_FIELD = "moe_fp8_dispatch"  # of a TransformerConfig: True or False, set on it after it was made
FP8_OPTION = "--no-moe-fp8-dispatch"  # of `python -m deepep_train.megatron`
FP8_VARIABLE = "DEEPEP_TRAIN_FP8_DISPATCH"  # of the environment, where neither of these says anything
_WORDS = {"1": True, "true": True, "on": True, "yes": True, "0": False, "false": False, "off": False, "no": False}


def wants_fp8_dispatch(config: Any) -> bool:
    """The configuration's `FP8_FIELD`, else `FP8_VARIABLE`; on if neither is set (or the variable is empty)."""
    chosen = getattr(config, FP8_FIELD, None)
    if chosen is not None:
        if not isinstance(chosen, bool):
            raise ArgumentError(f"{FP8_FIELD} must be True or False, got {chosen!r}", FP8_FIELD)
        return chosen
    word = os.environ.get(FP8_VARIABLE, "").strip().lower() or "1"
    if word not in _WORDS:
        raise ArgumentError(f"{FP8_VARIABLE} must be one of {', '.join(_WORDS)}, got {word!r}", FP8_VARIABLE)
    return _WORDS[word]


def take_option(arguments: list[str]) -> list[str]:
    """Command-line arguments without `FP8_OPTION`, which turns FP8 dispatch off for this process and those it starts."""
    if FP8_OPTION in arguments:
        os.environ[FP8_VARIABLE] = "0"
    return [a for a in arguments if a != FP8_OPTION]
