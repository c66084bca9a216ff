"""Stock Megatron-Core on CPU ranks, through `deepep_train.megatron.cpu`; tests/gpu has those for GPUs."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch


def missing() -> str:
    if torch.cuda.is_available():
        return "for machines without a GPU: Megatron would take it"
    try:
        found = importlib.util.find_spec("megatron.core.transformer") is not None
    except ModuleNotFoundError:
        found = False
    return "" if found else "megatron-core is not installed (it needs Python 3.12)"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = missing()
    here = Path(__file__).parent
    for item in items:
        if reason and here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))
