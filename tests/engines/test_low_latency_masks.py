"""Which ranks low-latency calls leave out, as far as the CPU knows; no kernel runs."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

if importlib.util.find_spec("deepep_train._C") is None:
    pytest.skip("the package was built without nvcc, so it has no kernels", allow_module_level=True)

from low_latency_stand_ins import Kernels, Memory, combine, dispatch, ordered

from deepep_train import ArgumentError
from deepep_train.engines.low_latency import LowLatency
from deepep_train.engines.peers import Peers


class ThreePeers(Peers):
    """This is rank 1; the others say what it says."""

    def __init__(self) -> None:
        super().__init__(None, 5.0)
        self.rank, self.size = 1, 3

    def gather_objects(self, mine: Any, operation: str) -> list[Any]:
        return [mine] * self.size


@pytest.fixture
def of_three(kernels: Kernels) -> LowLatency:
    arena: Any = Memory()
    return LowLatency(ThreePeers(), arena, [0] * 3, 4, True, ordered, torch.device("cpu"))


def masked(engine: LowLatency) -> list[int]:
    status = torch.full((3,), 7, dtype=torch.int32)
    engine.query_mask(status)
    return status.tolist()


def test_a_rank_that_is_unmasked_owes_no_answer_in_any_shape(of_three: LowLatency, kernels: Kernels) -> None:
    for most in (4, 5):
        dispatch(of_three, max_tokens=most, num_experts=6)
    of_three.update_mask(0, True)
    assert masked(of_three) == [1, 0, 0] and kernels.forgotten == []
    of_three.update_mask(2, True)
    of_three.update_mask(0, False)
    assert masked(of_three) == [0, 0, 1] and kernels.forgotten == [(0, 4), (0, 5)]
    of_three.update_mask(0, True)
    of_three.clean_mask()
    assert masked(of_three) == [0, 0, 0]
    assert kernels.forgotten[2:] == [(0, 4), (0, 5), (2, 4), (2, 5)]
    of_three.clean_mask()
    of_three.update_mask(0, False)
    assert len(kernels.forgotten) == 6  # who is not masked owes what it did


def test_ranks_given_up_by_the_kernels_are_told_of(of_three: LowLatency, kernels: Kernels) -> None:
    of_three._mask[2] = 1  # as kernels do
    assert masked(of_three) == [0, 0, 1]
    handle = dispatch(of_three, num_experts=6)[2]
    of_three.update_mask(2, False)
    combine(of_three, handle, torch.zeros(2, 12, 512, dtype=torch.bfloat16))  # what is alive stays so
    of_three.clean(4, 512, 6)
    assert masked(of_three) == [0, 0, 0]
    with pytest.raises(ArgumentError, match="has taken"):  # and is lost when all start anew
        combine(of_three, handle, torch.zeros(2, 12, 512, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    "rank, mask, named",
    [
        (1, True, "rank_to_mask must be another rank"),
        (3, True, "rank_to_mask must be below the group's 3 ranks"),
        (-1, True, "rank_to_mask"),
        (True, True, "rank_to_mask"),
        (0, 1, "mask must be True or False"),
    ],
)
def test_refused_masks(of_three: LowLatency, rank: int, mask: bool, named: str) -> None:
    with pytest.raises(ArgumentError, match=named):
        of_three.update_mask(rank, mask)
    assert masked(of_three) == [0, 0, 0]
    for status in (torch.zeros(2, dtype=torch.int32), torch.zeros(3), None):
        with pytest.raises(ArgumentError, match="mask_status must be a int32 tensor of shape"):
            of_three.query_mask(status)  # type: ignore[arg-type]
