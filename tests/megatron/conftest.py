"""Stock Megatron-Core on CPU ranks, through `deepep_train.megatron.cpu`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


def has_megatron() -> bool:
    try:
        return importlib.util.find_spec("megatron.core.transformer") is not None
    except ModuleNotFoundError:
        return False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and not has_megatron():
            item.add_marker(pytest.mark.skip(reason="megatron-core is not installed (it needs Python 3.12)"))
