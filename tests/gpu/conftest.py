"""These tests need a CUDA GPU and the package's kernels; elsewhere they are skipped, with the reason.

    python -m pytest tests/gpu

Ranks are processes, rank r on GPU r modulo their number. Those that share a GPU do so with MPS or without it (then they take
turns, which is slow and just as correct). CUDA_VISIBLE_DEVICES=0 puts all of them on one.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch


def missing() -> str:
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    if importlib.util.find_spec("deepep_train._C") is None:
        return "the package was built without nvcc, so it has no kernels"
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = missing()
    here = Path(__file__).parent
    for item in items:
        if reason and here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))
