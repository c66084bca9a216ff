"""Which low-latency combines are one launch, in slices; no kernel runs."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if importlib.util.find_spec("deepep_train._C") is None:
    pytest.skip("the package was built without nvcc, so it has no kernels", allow_module_level=True)

from low_latency_stand_ins import BUFFER, Kernels, X, combine, dispatch

from deepep_train.engines.low_latency import LowLatency
from deepep_train.engines.low_latency_arguments import Shape

LARGE = Shape(max_tokens=128, hidden=7168, num_experts=256, top_k=8)


def takes(
    num_tokens: int = 128,
    size: int = 8,
    num_sms: int = 16,
    one_gpu: bool = True,
    at_once: bool = True,
    forced: bool | None = None,
    far: Any = None,
    **shape: int,
) -> bool:
    fields = {"_peers": SimpleNamespace(size=size), "_far": far, "_num_sms": num_sms, "_one_gpu": one_gpu, "_at_once": at_once}
    of_h100 = SimpleNamespace(**fields, in_slices=forced, _l2_bytes=50 << 20)
    return LowLatency._takes_slices(of_h100, LARGE._replace(**shape), num_tokens)  # type: ignore[arg-type]


def test_large_ones_of_ranks_that_run_at_once_on_one_gpu_are() -> None:
    assert takes()
    assert not takes(at_once=False)  # they take turns on the GPU
    assert not takes(one_gpu=False, at_once=False)  # they have one each
    assert not takes(far=object())


def test_what_fits_the_cache_in_two_launches_and_what_does_not_fit_it_in_slices_is_not() -> None:
    assert not takes(num_tokens=32)
    assert not takes(size=2)
    assert not takes(num_tokens=256, max_tokens=256)
    assert takes(num_tokens=256, max_tokens=256, size=4)


@pytest.mark.parametrize("forced", [None, True])
def test_what_the_kernel_cannot_is_not_even_if_it_is_asked_for(forced: bool | None) -> None:
    assert not takes(forced=forced, hidden=7168 + 128)
    assert not takes(forced=forced, one_gpu=False, at_once=False)  # its flags are of the gpu scope
    assert not takes(forced=forced, num_sms=3)  # 43 tokens a block
    assert takes(forced=forced, num_sms=4)


def test_either_can_be_asked_for() -> None:
    assert takes(num_tokens=1, size=1, at_once=False, forced=True)
    assert not takes(forced=False)


def test_one_launch_or_two(engine: LowLatency, kernels: Kernels) -> None:
    """Hooks, rows that peers reach, LogFMT, and an output that lies in the input want two; each rank's own setting decides."""
    handle = dispatch(engine)[2]
    inside = torch.zeros(5, 4, 512, dtype=torch.bfloat16)
    two = ["combine_send", "combine_receive"]

    def launched(**how: Any) -> list[str]:
        kernels.launched.clear()
        _, hook = combine(engine, handle, **how)
        if hook is not None:
            hook()
        return [name for name, _ in kernels.launched]

    assert launched() == two  # its first setting
    engine.in_slices = True
    assert launched() == launched(out=torch.empty_like(X)) == ["combine_slices"]
    assert launched(with_hook=True) == launched(use_logfmt=True) == two
    assert launched(zero_copy=True, y=engine.combine_buffer(BUFFER, handle)) == two
    assert launched(y=inside, out=inside[4, 1:]) == two
