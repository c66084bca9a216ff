"""The model of how many SMs a call takes."""

from __future__ import annotations

import pytest

from deepep_train.engines.sms import default_sms, most_sms


@pytest.mark.parametrize("sharing", [1, 2, 4, 8])
def test_ranks_of_one_gpu_fit_at_the_same_time(sharing: int) -> None:
    assert most_sms(132, sharing) == max(1, 128 // sharing)
    for operation, alone in (("dispatch", 10), ("combine", 12)):
        default = default_sms(operation, 9, 132, 8, sharing)
        assert default == (alone if sharing == 1 else max(1, min(alone, 66 // sharing)))


def test_a_gpu_of_ones_own_takes_what_its_links_need() -> None:
    found = [[default_sms(op, major, 132, 8, 1) for major in (8, 9, 10, 12)] for op in ("dispatch", "combine")]
    assert found == [[8, 10, 20, 20], [8, 12, 24, 24]]
    # With two ranks half of the rows are a rank's own; alone, nothing crosses a link.
    assert [[default_sms(op, 9, 132, ranks, 1) for ranks in (1, 2, 64)] for op in ("dispatch", "combine")] == [
        [10, 18, 10],
        [12, 22, 12],
    ]
