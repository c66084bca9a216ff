"""One rank's kernels for ncu, which cannot replay kernels that wait for other processes. Not a test; without MPS:

ncu --clock-control none --kernel-name regex:"reduce|combine|layout" --launch-skip 1 --metrics \
gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,dram__bytes_read.sum,dram__bytes_write.sum \
python tests/gpu/profile_one_rank.py

The rows are about those that each of 8 ranks receives in `bench`, two for a token, and 128 SMs are what all 8 have there.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

import deepep_train as dt

NUM_TOKENS, HIDDEN = 21504, 7168


def main() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    buffer = dt.Buffer(group, num_nvl_bytes=12_000_000_000, timeout=60, engine="nvlink")
    dt.Buffer.set_num_sms(128)
    x = torch.randn(NUM_TOKENS, HIDDEN, device="cuda").bfloat16()
    idx = torch.rand(NUM_TOKENS, 32, device="cuda").topk(2)[1]
    out = dt.dispatch(x, idx, torch.rand(NUM_TOKENS, 2, device="cuda"), buffer=buffer, num_experts=32, layout="expert")
    assert isinstance(out.x, torch.Tensor)
    anywhere = out.x.clone()  # not where peers can reach it
    choices = torch.rand(4096, 256, device="cuda").topk(8)[1]
    for _ in range(2):
        dt.combine(anywhere, out.handle)
        buffer.get_dispatch_layout(choices, 256)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
