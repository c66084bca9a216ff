"""The model of how many SMs a call takes."""

from __future__ import annotations

import pytest

from deepep_train.engines.sms import default_sms, most_sms


@pytest.mark.parametrize("sharing", [1, 2, 4, 8, 64, 1000])
def test_ranks_of_one_gpu_fit_at_the_same_time(sharing: int) -> None:
    assert most_sms(132, sharing) == max(1, 128 // sharing)
    default = default_sms(9, 132, sharing)
    assert default == (14 if sharing == 1 else max(1, min(14, 66 // sharing)))


def test_a_gpu_of_ones_own_takes_what_its_links_need() -> None:
    assert [default_sms(major, 132, 1) for major in (8, 9, 10, 12)] == [10, 14, 26, 26]
