"""Two ranks as processes, bit for bit against the picture: for `compute-sanitizer --target-processes all`.

PYTHONPATH=tests:tests/gpu python tests/gpu/two_processes.py
"""

from __future__ import annotations

import torch
from draws import Exchange
from test_nvlink import check

if __name__ == "__main__":
    for layout in ("rank", "expert"):
        bf16 = Exchange((23, 9), 1032, 4, 3, "mixed", torch.bfloat16, layout, 4)
        fp8 = Exchange((5, 17), 256, 4, 3, "uniform", torch.float8_e4m3fn, layout, 8, torch.float32, seed=1)
        check([bf16, fp8], num_biases=1, fresh=True)
        check([bf16, fp8], spare=5, fresh=True)
    print("fine")
