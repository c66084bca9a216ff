"""What importing the package costs and brings in, in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

import deepep_train

CODE = """
import json, sys, time
start = time.perf_counter()
import torch
torch_seconds = time.perf_counter() - start
before = set(sys.modules)
start = time.perf_counter()
import deepep_train
seconds = time.perf_counter() - start
print(json.dumps({
    "torch": torch_seconds,
    "seconds": seconds,
    "new": sorted(set(sys.modules) - before),
    "cuda": torch.cuda.is_initialized(),
    "distributed": torch.distributed.is_initialized(),
}))
"""


@pytest.fixture(scope="module")
def imported() -> dict[str, Any]:
    """The fastest of three imports: a busy machine slows down some, a slow package all."""

    def once() -> dict[str, Any]:
        done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    best = once()
    for _ in range(2):
        if best["seconds"] >= 0.5:
            best = min(best, once(), key=lambda found: found["seconds"])
    return best


def test_import_is_quick(imported: dict[str, Any]) -> None:
    assert imported["seconds"] < 0.5, imported


@pytest.mark.parametrize(
    "module", ["megatron", "transformer_engine", "torch._dynamo", "torch._inductor", "triton", "matplotlib", "sympy", "pytest"]
)
def test_import_brings_in_nothing_heavy(imported: dict[str, Any], module: str) -> None:
    assert not [name for name in imported["new"] if name == module or name.startswith(f"{module}.")]


def test_import_starts_nothing(imported: dict[str, Any]) -> None:
    assert not imported["cuda"]
    assert not imported["distributed"]


def test_public_names() -> None:
    names = {"Buffer", "Config", "EventOverlap", "EventHandle", "dispatch", "combine", "Dispatched", "Handle"}
    names |= {"DeepEPError", "ArgumentError", "PeerTimeoutError", "__version__"}
    assert names <= set(deepep_train.__all__)
    for name in deepep_train.__all__:
        assert getattr(deepep_train, name).__doc__
