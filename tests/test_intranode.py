"""DeepEP V1's calls between the ranks of one machine: checks against a reference, then timings over numbers of SMs.

    python tests/test_intranode.py --num-processes 8 --num-tokens 4096 --hidden 7168 --num-topk 8 --num-experts 256

Rank r takes GPU r modulo their number; without a GPU the ranks talk through gloo and the collective engine, and the defaults
are small. pytest runs the checks on two CPU processes.
"""

from __future__ import annotations

import sys

import torch.distributed as dist
import v1_runner
from v1_calls import arena_bytes, check_and_tune
from v1_runner import Work

from deepep_train import Buffer


def on_every_rank(work: Work) -> None:
    """One rank's part."""
    engine = "auto" if work.device == "cuda" else "collective"
    num_bytes = arena_bytes(work, dist.get_world_size())
    check_and_tune(Buffer(dist.group.WORLD, num_nvl_bytes=num_bytes, engine=engine, timeout=60), work)


def main(argv: list[str] | None = None) -> int:
    args = v1_runner.Parser(__doc__).parse(argv)
    return v1_runner.start(args, on_every_rank, Work.of(args))


def test_checks_pass_on_two_cpu_processes() -> None:
    sizes = ["--num-processes", "2", "--num-tokens", "33", "--hidden", "128", "--num-topk", "3", "--num-experts", "8"]
    assert main([*sizes, "--device", "cpu", "--deadline", "90"]) == 0


if __name__ == "__main__":
    sys.exit(main())
