"""Megatron's own tests of dispatchers and of overlapping two micro-batches, on ranks that share a GPU."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from harness import run_ranks

own = pytest.importorskip("megatrons_own", reason="megatron-core is not installed", exc_type=ImportError)

import megatron_ranks as ranks  # noqa: E402

_missing = own.missing() or (
    "" if importlib.util.find_spec("transformer_engine_torch") is not None else "Transformer Engine is not installed"
)
pytestmark = pytest.mark.skipif(bool(_missing), reason=_missing)


@pytest.mark.parametrize(("tp", "ep"), own.PARALLEL)
@pytest.mark.parametrize("name", own.CONTAINERS)
def test_container(name: str, tp: int, ep: int) -> None:
    run_ranks(tp * ep, ranks.container, name, tp, ep, timeout=60)


LAYER = ("test_schedule_layer_1f1b", "TestA2AOverlap")
CHUNK = ("test_schedule_chunk_1f1b", "TestA2AOverlap")
DELAYED = ("test_delay_wgrad_compute", "TestDelayWgradCompute")
PLAIN, FP8 = own.FLEX | {"fp8_flag": None}, own.FLEX | {"fp8_flag": ("e4m3", "blockwise")}

# All of a2a_overlap that takes a flex backend, but for those on Megatron's FSDP, which is NCCL's, and the one that captures
# tensor parallel collectives in CUDA graphs, which gloo's cannot be. Of Megatron's many combinations of layers with FP8 recipes
# these.
OVERLAPS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "layer": (*LAYER, "test_transformer_layer_overlap", PLAIN),
    "layer, fp8": (*LAYER, "test_transformer_layer_overlap", FP8),
    "mtp layer": (*LAYER, "test_mtp_layer_overlap", PLAIN),
    "chunk": (*CHUNK, "test_1f1b_schedule_model_chunk", PLAIN | {"mtp_layers": 0, "layers": [2, 1]}),
    "chunk, mtp": (*CHUNK, "test_1f1b_schedule_model_chunk", PLAIN | {"mtp_layers": 1, "layers": [1, 2]}),
    "masked chunk": (
        *CHUNK, "test_1f1b_schedule_model_chunk_with_padding_mask", own.FLEX | {"tp_size": 1, "layers": [2, 1]}
    ),
    "masked chunk, tp 2": (
        *CHUNK, "test_1f1b_schedule_model_chunk_with_padding_mask", own.FLEX | {"tp_size": 2, "layers": [1, 1]}
    ),
    "delayed wgrad": (
        *DELAYED, "test_overlap_dispatch_backward_with_experts_wgrad", PLAIN | {"shared_expert_intermediate_size": None}
    ),
    "delayed wgrad, shared experts": (
        *DELAYED, "test_overlap_dispatch_backward_with_experts_wgrad", PLAIN | {"shared_expert_intermediate_size": 512}
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OVERLAPS.values(), ids=OVERLAPS.keys())
def test_overlap(case: tuple[str, str, str, dict[str, Any]]) -> None:
    run_ranks(4, ranks.overlap, *case, timeout=60)
