"""GPT-MoE models of Transformer Engine layers under an FP8 recipe, on ranks that share a GPU: tokens sent in FP8, beside tokens
sent as they are. Each row is quantized by the same numbers before the wire or behind it, so that forward passes are the same;
weight gradients take operands that were quantized twice.

`--junitxml FILE` keeps how far the curves lie apart.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from harness import run_ranks

small = pytest.importorskip("small", reason="megatron-core is not installed", exc_type=ImportError)

import megatron_ranks as ranks  # noqa: E402

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine_torch") is None, reason="Transformer Engine is not installed"
)

BLOCKWISE = {"fp8": "e4m3", "fp8_recipe": "blockwise"}
OVERLAP = {"overlap_moe_expert_parallel_comm": True, "delay_wgrad_compute": True}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "moe recompute": {"config": {"recompute_granularity": "selective", "recompute_modules": ["moe"]}},
    "shared experts overlapped": {
        "config": {"moe_shared_expert_intermediate_size": 128, "moe_shared_expert_overlap": True},
    },
    "distributed optimizer, several micro-batches": {"use_distributed_optimizer": True, "micro_batches": 3},
    "delayed wgrad": {"config": {"num_layers": 4}, "micro_batches": 4, "overlap": OVERLAP},
}


@pytest.mark.parametrize("how", CASES.values(), ids=CASES.keys())
def test_fp8_dispatch_follows_bf16_dispatch(record_property: Any, how: dict[str, Any]) -> None:
    how = dict(how)
    dispatcher = small.OURS | how.pop("overlap", {})
    setup = ranks.setup_of(BLOCKWISE | how.pop("config", {}), **how)
    results = run_ranks(4, ranks.fp8_trainings, setup, dispatcher, 10, timeout=120)
    distances = [ranks.apart(in_fp8, in_bf16) for (in_bf16, in_fp8), _, _ in results]
    record_property("apart", distances)
    record_property("curves", results[-1][0])
    for _, engines, sent in results:
        assert set(engines) == {"nvlink"}
        assert sent[0] == 0, "tokens crossed in FP8 though the switch said no"
        assert sent[1] > 0, "no token crossed in FP8"
    assert results[-1][0][1][-1][0] < results[-1][0][1][0][0], "it does not learn"
    assert max(distances) <= 0.005, f"losses lie {distances} apart"


def test_gradients_cross_in_fp8(record_property: Any) -> None:
    setup = ranks.setup_of(BLOCKWISE)
    results = run_ranks(4, ranks.fp8_gradients, setup, small.OURS, 10, timeout=120)
    distances = [ranks.apart(in_fp8, in_bf16) for (in_bf16, in_fp8), _ in results]
    record_property("apart", distances)
    assert all(count > 0 for _, count in results), "no gradient crossed in FP8"
    assert max(distances) <= 0.005, f"losses lie {distances} apart"
