"""How many SMs a call of the nvlink engine may occupy."""

from __future__ import annotations

import math

from deepep_train.routing import round_up

# Bytes of bf16 rows that one SM stores (dispatch) or pulls and sums (combine) in a second, a rank's own rows included, measured
# between two H100s with 8 SMs (docs/performance.md, "Several GPUs"). And what the links of one GPU carry, one way, by compute
# capability: measured for 9, the others in NVLink's proportion.
BYTES_PER_SM = {"dispatch": 47e9, "combine": 38e9}
_LINK_BYTES = {8: 260e9, 9: 390e9, 10: 780e9}
MOST_SMS = 32


def most_sms(sm_count: int, sharing: int) -> int:
    """For each of `sharing` ranks on one GPU of `sm_count` SMs. Blocks wait for each other, so those of all these ranks must be
    able to run at the same time; one in 32 SMs is left to others."""
    return max(1, (sm_count - sm_count // 32) // sharing)


def default_sms(operation: str, capability: int, sm_count: int, num_ranks: int, sharing: int) -> int:
    """SMs that keep the links of a GPU busy, an even number: what the links carry one way, and a rank's own rows with it (one
    in `num_ranks` of all), over what an SM moves. Measured, the rate bends before that: dispatch reached 76% of the link with
    16 SMs and no more with 24 (docs/measured/links_2_h100.json), so more would buy little.

    Ranks that share a GPU take at most half of it between them: kernels that wait for a peer must leave its other kernels
    room. With 8 ranks x 14 of 132 SMs a model's backward stood still (docs/kernels.md, "Open").

    Args:
        operation: "dispatch" or "combine".
        capability: the major number of the GPU's compute capability.
        num_ranks: of the group; `sharing` of them have this GPU.
    """
    link = _LINK_BYTES.get(capability, max(_LINK_BYTES.values()))
    moved = link * num_ranks / max(1, num_ranks - 1)
    wanted = min(MOST_SMS, round_up(math.ceil(moved / BYTES_PER_SM[operation]), 2))
    return wanted if sharing == 1 else max(1, min(wanted, sm_count // 2 // sharing))
