"""Megatron's own dispatcher tests against this library's dispatcher, on ranks of the harness.

They need a checkout of Megatron-LM of the installed release, named by the environment variable MEGATRON_LM; of it only
tests/unit_tests is used. Its tests are written for torchrun, 8 GPUs and NCCL; here
- the ranks are joined by gloo before the tests start, which their `Utils` accepts: NCCL takes one rank a GPU only;
- parametrized tests are called with the parameters given here, since theirs name Megatron's backends;
- on a CPU, which Megatron's `_set_random_seed` passes over, the random states are made by what it would have called.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import small
import torch
from megatron.core import tensor_parallel

from deepep_train.megatron import BACKEND

PARALLEL = [(1, 2), (2, 1), (2, 2), (1, 4)]
# What Megatron itself gives the container tests of its flex backends.
CONTAINERS: dict[str, dict[str, Any]] = {
    "dispatcher_dropless_test": {},
    "dispatcher_capacity_test": {"moe_token_drop_policy": "probs", "moe_expert_capacity_factor": 0.5},
    "dispatcher_router_padding_for_fp8_test": {"num_moe_experts": 32, "moe_router_topk": 4},
}
FLEX = {"dispatcher_type": "flex", "flex_backend": BACKEND}


def missing() -> str:
    """Why these tests cannot run."""
    checkout = os.environ.get("MEGATRON_LM", "")
    if not checkout:
        return "MEGATRON_LM names no checkout of Megatron-LM"
    if not (Path(checkout) / "tests" / "unit_tests").is_dir():
        return f"MEGATRON_LM: there is no tests/unit_tests in {checkout}"
    return ""


def _module(name: str) -> ModuleType:
    checkout = os.environ["MEGATRON_LM"]
    if checkout not in sys.path:
        sys.path.insert(0, checkout)  # before this project's folder, which has a "tests", too
    return importlib.import_module(f"tests.unit_tests.{name}")


def _seed(seed_: int, **_: Any) -> None:
    torch.manual_seed(seed_)
    tensor_parallel.model_parallel_cuda_manual_seed(seed_)


def container(rank: int, size: int, group: Any, name: str, tp: int, ep: int) -> None:
    """One of `CONTAINERS`."""
    with small.set_up():
        module = _module("transformer.moe.test_token_dispatcher")
        if small.DEVICE == "cpu":
            module._set_random_seed = _seed
        made = module.MoEModelTestContainer(
            tp_size=tp, ep_size=ep, pp_size=1, moe_token_dispatcher_type="flex", moe_flex_dispatcher_backend=BACKEND,
            hidden_size=1024, test_dtype=torch.bfloat16, **CONTAINERS[name],
        )  # fmt: skip
        assert type(made.moe_layer.token_dispatcher).__module__ == "deepep_train.megatron.dispatcher"
        getattr(made, name)()


def overlap(rank: int, size: int, group: Any, file: str, of: str, name: str, given: dict[str, Any]) -> None:
    """Test `name` of class `of` in a2a_overlap/`file`."""
    with small.set_up():
        for key, value in (("RANK", rank), ("LOCAL_RANK", 0), ("WORLD_SIZE", size)):
            os.environ[key] = str(value)  # Megatron's arguments look for them
        _module("a2a_overlap.utils").get_valid_flex_dispatcher_backend = lambda: BACKEND
        made = getattr(_module(f"a2a_overlap.{file}"), of)()
        made.setup_method(None)
        try:
            getattr(made, name)(**given)
        finally:
            made.teardown_method(None)
