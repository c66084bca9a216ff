"""Session-wide set-up: small, repeatable hypothesis runs, and the end of the ranks' processes."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from harness import close_pools
from hypothesis import HealthCheck, Phase, settings

# No shrinking: an example that kills its pool of processes costs seconds, and the drawn cases are small as they are.
_QUIET = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
    "phases": [Phase.explicit, Phase.reuse, Phase.generate],
    "report_multiple_bugs": False,
}
settings.register_profile("repeatable", derandomize=True, max_examples=40, database=None, **_QUIET)
settings.register_profile("search", max_examples=1000, print_blob=True, **_QUIET)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(scope="session", autouse=True)
def _processes() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    close_pools()
