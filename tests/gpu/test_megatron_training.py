"""GPT-MoE models of Transformer Engine layers, in bf16, on ranks that share a GPU, over the nvlink engine.

`--junitxml FILE` keeps how far the curves lie apart.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
from harness import run_ranks

small = pytest.importorskip("small", reason="megatron-core is not installed", exc_type=ImportError)

import megatron_ranks as ranks  # noqa: E402

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine_torch") is None, reason="Transformer Engine is not installed"
)

OURS, ALLTOALL, ALLGATHER = small.OURS, small.STOCK["alltoall"], small.STOCK["allgather"]
apart, setup_of = ranks.apart, ranks.setup_of


def same_losses(
    record: Callable[[str, Any], None],
    setup: Any,
    dispatchers: list[dict[str, Any]],
    steps: int,
    rel: float,
    train: Callable[..., Any] = ranks.trainings,
) -> list[Any]:
    """The first of `dispatchers` gives the expected losses."""
    results = run_ranks(setup.tp * setup.ep * setup.pp, train, setup, dispatchers, steps, timeout=100)
    expected, *others = results[-1][0]
    distances = [max(apart(curves[i + 1], curves[0]) for curves, *_ in results) for i in range(len(others))]
    record("apart", distances)
    record("expected", [expected[0], expected[-1]])
    record("found", [[other[0], other[-1]] for other in others])
    assert all(engines and set(engines) == {"nvlink"} for _, engines, *_ in results), "other engines were at work"
    assert expected[-1][0] < expected[0][0], "it does not learn"
    assert max(distances) <= rel, f"losses lie {distances} apart"
    return results


@pytest.mark.parametrize("size", [4, 8])
def test_twenty_steps_follow_alltoall(record_property: Any, size: int) -> None:
    same_losses(record_property, setup_of(ep=size), [ALLTOALL, OURS], 20, rel=0.01)


FEATURES: dict[str, Any] = {
    "shared experts overlapped": {
        "config": {"moe_shared_expert_intermediate_size": 128, "moe_shared_expert_overlap": True},
    },
    "capacity 0.5": {"config": {"moe_expert_capacity_factor": 0.5}},
    "mtp": {"config": {"mtp_num_layers": 1}},
    "moe recompute": {"config": {"recompute_granularity": "selective", "recompute_modules": ["moe"]}},
    "fp8": {"config": {"fp8": "e4m3", "fp8_recipe": "blockwise"}},
    "distributed optimizer, several micro-batches": {"use_distributed_optimizer": True, "micro_batches": 3},
}


@pytest.mark.parametrize("how", FEATURES.values(), ids=FEATURES.keys())
def test_features_follow_alltoall(record_property: Any, how: dict[str, Any]) -> None:
    same_losses(record_property, setup_of(**how), [ALLTOALL, OURS], 6, rel=0.01)


def test_expert_tensor_parallel_follows_allgather(record_property: Any) -> None:
    """alltoall gathers uneven parts there, which gloo does not do."""
    same_losses(record_property, setup_of(tp=2, ep=2), [ALLGATHER, OURS], 6, rel=0.01)


def test_megatrons_own_deepep_backend_follows_alltoall(record_property: Any) -> None:
    same_losses(record_property, setup_of(), [ALLTOALL, ranks.DEEPEP], 20, rel=0.01)


# Megatron's ways to do the same in another order: what they give must not change.

OVERLAP = {"overlap_moe_expert_parallel_comm": True}
DELAYED = OVERLAP | {"delay_wgrad_compute": True}
SAME = 1e-3


@pytest.mark.parametrize("parallel", [{"ep": 4}, {"ep": 2, "pp": 2, "vpp": 2}], ids=["ep 4", "pp 2, vpp 2, ep 2"])
@pytest.mark.parametrize("overlap", [OVERLAP, DELAYED], ids=["overlap", "delayed wgrad"])
def test_overlap_of_two_micro_batches(record_property: Any, parallel: dict[str, Any], overlap: dict[str, Any]) -> None:
    setup = setup_of({"num_layers": 4}, micro_batches=4, **parallel)
    same_losses(record_property, setup, [OURS, OURS | overlap], 6, rel=SAME)


def test_recomputed_activations_of_experts(record_property: Any) -> None:
    recompute = {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]}
    same_losses(record_property, setup_of(), [OURS, OURS | recompute], 6, rel=SAME)


@pytest.mark.parametrize("scopes", [["attn", "moe_router"], ["attn", "moe_router", "moe_preprocess"]], ids=" ".join)
def test_graphs_up_to_dispatch(record_property: Any, scopes: list[str]) -> None:
    graphs = {"cuda_graph_impl": "transformer_engine", "cuda_graph_modules": scopes}
    same_losses(record_property, setup_of(), [OURS, OURS | graphs], small.STEPS_BEFORE_CAPTURE + 4, rel=SAME)


def test_fused_experts_write_where_peers_read(record_property: Any) -> None:
    """To bf16's rounding: the experts compute in another way."""
    fused = {"use_transformer_engine_op_fuser": True}
    results = same_losses(record_property, setup_of(), [OURS, OURS | fused], 6, rel=0.01, train=ranks.fused_trainings)
    for _, _, in_place in results:
        assert in_place
        assert all(in_place)
