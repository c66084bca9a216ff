"""Small GPT-MoE models train as they do with Megatron's alltoall: same losses, same gradient norms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from harness import close_pools, run_ranks

small = pytest.importorskip("small", reason="megatron-core is not installed", exc_type=ImportError)


@pytest.fixture(scope="module", autouse=True)
def _ranks_end() -> Iterator[None]:
    """A stock model, once trained, is never freed, nor are its process groups, each with a thread of gloo's that looks around a
    hundred times a second. 180 of them in each of six ranks would slow down all later tests."""
    yield
    close_pools()


def same_curves(setup: Any, steps: int, dispatchers: list[dict[str, Any]] | None = None, rel: float = 1e-5) -> None:
    given = dispatchers or [small.OURS, small.STOCK["alltoall"]]
    results = run_ranks(setup.tp * setup.ep * setup.pp, small.trainings, setup, given, steps, timeout=150)
    for ours, theirs in results:
        for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert a == pytest.approx(b, rel=rel), f"step {step}"
    losses = [loss for loss, _ in results[-1][0]]
    if steps >= 20:
        assert losses[-1] < losses[0], "it does not learn"


SHARED = {"moe_shared_expert_intermediate_size": 24}
TWENTY_STEPS: dict[str, Any] = {
    "plain": {},
    "full recompute": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "moe recompute": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    "shared experts": SHARED,
    "capacity 0.5": {"moe_expert_capacity_factor": 0.5},
    "mtp": {"mtp_num_layers": 1},
}


@pytest.mark.parametrize("config", TWENTY_STEPS.values(), ids=TWENTY_STEPS.keys())
def test_twenty_steps(config: dict[str, Any]) -> None:
    same_curves(small.Setup(config=config), 20)


def test_twenty_steps_on_four_ranks() -> None:
    same_curves(small.Setup(ep=4), 20)


FEW_STEPS: dict[str, Any] = {
    "distributed optimizer, several micro-batches": {"use_distributed_optimizer": True, "micro_batches": 3},
    "shared experts overlapped": {"config": SHARED | {"moe_shared_expert_overlap": True}},
    "hybrid model": {"hybrid": "*E*E", "config": {"num_layers": 4, "is_hybrid_model": True}},
    "two pipeline stages": {"pp": 2, "micro_batches": 4, "config": {"num_layers": 2}},
}


@pytest.mark.parametrize("how", FEW_STEPS.values(), ids=FEW_STEPS.keys())
def test_a_few_steps(how: dict[str, Any]) -> None:
    small.skip_what_this_release_refuses(how.get("config", {}))
    same_curves(small.Setup(**how), 4)


OVERLAP = {"overlap_moe_expert_parallel_comm": True}


def overlapping(**how: Any) -> Any:
    return small.Setup(micro_batches=4, in_bf16=True, config={"num_layers": 4}, **how)


def test_overlap_of_two_micro_batches_changes_nothing() -> None:
    """The 1F1B schedule runs one micro-batch's communication beside another's computation, and frees tensors by its own
    rules."""
    same_curves(overlapping(ep=4), 4, [small.OURS | OVERLAP, small.OURS])


def test_overlap_in_an_interleaved_pipeline_changes_nothing() -> None:
    same_curves(overlapping(ep=2, pp=2, vpp=2), 4, [small.OURS | OVERLAP, small.OURS])


def test_an_interleaved_pipeline() -> None:
    """To bf16's rounding: alltoall adds up the rows of a token in another order."""
    same_curves(overlapping(ep=2, pp=2, vpp=2), 4, rel=2e-3)
