"""How many SMs a call of the nvlink engine may occupy."""

from __future__ import annotations

from deepep_train.routing import round_up

# What one SM moves, measured on an H100 (docs/performance.md: 16 SMs in all), in bytes a second: the slower of dispatch's
# stores and combine's pulls. And what the links of one GPU carry, one way.
BYTES_PER_SM = 35e9
_LINK_BYTES = {8: 300e9, 9: 450e9, 10: 900e9}  # by compute capability: NVLink 3, 4, 5


def most_sms(sm_count: int, sharing: int) -> int:
    """For each of `sharing` ranks on one GPU of `sm_count` SMs. Blocks wait for each other, so those of all these ranks must be
    able to run at the same time; one in 32 SMs is left to others."""
    return max(1, (sm_count - sm_count // 32) // sharing)


def default_sms(capability: int, sm_count: int, sharing: int) -> int:
    """SMs that keep the links of a GPU busy: their one-way bandwidth over what an SM moves, rounded up to an even number.

    Ranks that share a GPU take at most half of it between them: kernels that wait for a peer must leave its other kernels
    room. With 8 ranks x 14 of 132 SMs a model's backward stood still (docs/kernels.md, "Open").

    Args:
        capability: the major number of the GPU's compute capability.
    """
    link = _LINK_BYTES.get(capability, max(_LINK_BYTES.values()))
    wanted = round_up(-(-int(link) // int(BYTES_PER_SM)), 2)
    return wanted if sharing == 1 else max(1, min(wanted, sm_count // 2 // sharing))
