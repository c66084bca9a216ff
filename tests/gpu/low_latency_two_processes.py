"""The low-latency kernels with two ranks as processes: for `compute-sanitizer --target-processes all`.

PYTHONPATH=tests:tests/gpu python tests/gpu/low_latency_two_processes.py
"""

from __future__ import annotations

import low_latency_ranks as ranks
from low_latency_cases import Case
from shared import run_ranks
from test_low_latency_kernels import cases_of, none_wrong

if __name__ == "__main__":
    slices = [Case((40, 23), 40, 3584, 4, 2, kind="bf16", seed=seed) for seed in range(3)]
    none_wrong(run_ranks(2, ranks.round_trips, cases_of(2, 4, 7), fresh=True, timeout=240))
    none_wrong(run_ranks(2, ranks.in_slices, slices, fresh=True, timeout=240))
    print("fine")
