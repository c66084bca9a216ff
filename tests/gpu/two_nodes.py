"""Four ranks as two nodes of two, processes, bit for bit against the picture: for `compute-sanitizer --target-processes all`.

PYTHONPATH=tests:tests/gpu python tests/gpu/two_nodes.py
"""

from __future__ import annotations

import os

import torch
from draws import Exchange
from test_nvlink import check

if __name__ == "__main__":
    os.environ["DEEPEP_TRAIN_TEST_TIMEOUT"] = "200"  # the ranks, which are started from here, see it
    cases = [
        Exchange((23, 9, 0, 14), 1032, 4, 3, "mixed", torch.bfloat16, layout, 4, seed=i)
        for i, layout in enumerate(("rank", "expert"))
    ]
    fp8 = Exchange((5, 17, 8, 3), 256, 4, 3, "uniform", torch.float8_e4m3fn, "rank", 1, torch.float32, seed=2)
    check([*cases, fp8], num_biases=1, fresh=True, engine="rdma", num_local_ranks=2)
    print("fine")
