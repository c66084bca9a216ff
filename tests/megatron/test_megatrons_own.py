"""Megatron's own container tests, on CPU ranks."""

from __future__ import annotations

import importlib.util

import pytest
from harness import run_ranks

own = pytest.importorskip("megatrons_own", reason="megatron-core is not installed", exc_type=ImportError)

pytestmark = pytest.mark.skipif(bool(own.missing()), reason=own.missing())


@pytest.mark.parametrize(("tp", "ep"), own.PARALLEL)
@pytest.mark.parametrize("name", own.CONTAINERS)
def test_container(name: str, tp: int, ep: int) -> None:
    if "fp8" in name and importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("Megatron takes fp8 with Transformer Engine only")
    run_ranks(tp * ep, own.container, name, tp, ep, timeout=100)
