"""Lets code written for DeepEP V1 run on this library: after `install()`, `import deep_ep` gets it."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import Any

import torch

from deepep_train.buffer import Buffer
from deepep_train.config import Config
from deepep_train.errors import DeepEPError
from deepep_train.events import EventHandle, EventOverlap

_OURS = "__deepep_train__"

_MODULES: dict[str, dict[str, Any]] = {
    "deep_ep": {
        "Buffer": Buffer,
        "Config": Config,
        "EventHandle": EventHandle,
        "EventOverlap": EventOverlap,
        "topk_idx_t": torch.int64,
    },
    "deep_ep.buffer": {"Buffer": Buffer},
    "deep_ep.utils": {"EventHandle": EventHandle, "EventOverlap": EventOverlap},
    "deep_ep_cpp": {"Config": Config, "EventHandle": EventHandle, "topk_idx_t": torch.int64},
}


def install() -> None:
    """Provide the modules `deep_ep`, `deep_ep.buffer`, `deep_ep.utils` and `deep_ep_cpp`. Doing it twice does nothing.

    Raises:
        DeepEPError: if the real DeepEP has been imported already, since its objects could then be mixed with ours.
    """
    foreign = [name for name in _MODULES if name in sys.modules and not hasattr(sys.modules[name], _OURS)]
    if foreign:
        raise DeepEPError(
            f"compat.install() must run before the real DeepEP is imported; {', '.join(foreign)} is loaded already"
        )
    for name, contents in _MODULES.items():
        if name in sys.modules:
            continue
        module = types.ModuleType(name, f"deepep_train in the place of {name}.")
        # A spec, so that importlib.util.find_spec finds the module as it would an installed one.
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=name == "deep_ep")
        if name == "deep_ep":
            module.__path__ = []
        vars(module).update(contents, **{_OURS: True})
        sys.modules[name] = module
    for name in _MODULES:
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])


def uninstall() -> None:
    """Take the modules away again; objects already imported from them go on working."""
    for name in _MODULES:
        if hasattr(sys.modules.get(name), _OURS):
            del sys.modules[name]
