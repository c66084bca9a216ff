"""Requests of the rdma engine's fresh dispatches, and the kernels that its tests run on CPUs."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from draws import Exchange
from reference import Given

from deepep_train.engines.base import DispatchRequest, Payload

NEEDS_KERNELS = pytest.mark.skipif(
    importlib.util.find_spec("deepep_train._C") is None, reason="the package was built without nvcc, so it has no kernels"
)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    from rail_on_cpu import compile_kernels

    made = compile_kernels(tmp_path_factory.mktemp("kernels"))
    if made is None:
        pytest.skip("there is no g++")
    return made


def request_of(case: Exchange, given: Given, bound: int = 0, **other: Any) -> DispatchRequest:
    how: dict[str, Any] = {
        "payload": Payload(given.x),
        "layout": None,
        "topk_idx": given.topk_idx,
        "topk_weights": given.topk_weights,
        "num_experts": case.num_experts,
        "arrangement": case.layout,
        "alignment": case.alignment,
        "num_worst_tokens": bound,
    }
    return DispatchRequest(**how | other)
