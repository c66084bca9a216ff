"""DeepEP V1's calls between nodes: both layouts against brute force, V1's calls against a reference at any size, then timings.

One machine, its ranks as 2 nodes (--num-local-ranks says how large):

    python tests/test_internode.py --num-processes 8 --num-local-ranks 4 --num-tokens 4096 --hidden 7168

Several machines, this command on each, with WORLD_SIZE the number of machines, RANK this one's, and MASTER_ADDR (MASTER_PORT,
8361) the first's:

    WORLD_SIZE=2 RANK=0 MASTER_ADDR=node0 python tests/test_internode.py --engine rdma

Rank r takes GPU r modulo their number; without a GPU the ranks talk through gloo, and the defaults are small. torchrun does as
well. pytest runs the checks on CPU processes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
import v1_runner
from comparing import Drawn, exchange_twice
from draws import STYLES, Exchange
from v1_calls import Checks, arena_bytes, check_and_tune

from deepep_train import Buffer

CPU_SIZES = {"num_processes": 4}
KINDS = {"BF16": torch.bfloat16, "FP8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Work(v1_runner.Work):
    num_local_ranks: int
    engine: str


def on_every_rank(work: Work) -> None:
    """One rank's part."""
    size = dist.get_world_size()
    sizes = {"num_nvl_bytes": arena_bytes(work, size), "num_local_ranks": work.num_local_ranks}
    buffer = Buffer(dist.group.WORLD, engine=work.engine, timeout=60, **sizes)
    check_and_tune(buffer, work, partial(check_brute_force, buffer, work.device))


def check_brute_force(buffer: Buffer, device: str, checks: Checks) -> None:
    """Rows of both layouts, weights, cached handles and sums against tests/reference.py: few tokens, differently many on each
    rank and on one none, in every style of routing."""
    size = buffer.group_size
    tokens = tuple((5 * rank + 3) % 13 if rank != 1 else 0 for rank in range(size))
    for (kind, dtype), layout in product(KINDS.items(), ("rank", "expert")):
        scales = torch.float32 if kind == "FP8" else None
        case = Exchange(tokens, 256, 4, 2, "", dtype, layout, 4, scales)
        checks.passed(f"{kind}, layout={layout!r}, brute force", partial(brute_force, buffer, device, case))


def brute_force(buffer: Buffer, device: str, case: Exchange) -> None:
    sums_of = buffer.group_size // buffer.num_nodes if buffer.two_level else 1
    for seed, style in enumerate(STYLES):
        drawn = Drawn.of(replace(case, style=style, seed=seed), num_biases=seed % 3, dtype=torch.bfloat16)
        g = drawn.given[buffer.rank]
        mine = replace(g, x=to(g.x, device), topk_idx=to(g.topk_idx, device), topk_weights=to(g.topk_weights, device))
        got = exchange_twice(buffer, case, mine, drawn.ys[buffer.rank].to(device), to(drawn.bias(buffer.rank), device))
        drawn.check(got, buffer.rank, sums_of)


def to(value: Any, device: str) -> Any:
    if isinstance(value, tuple):
        return tuple(to(v, device) for v in value)
    return None if value is None else value.to(device)


def main(argv: list[str] | None = None) -> int:
    parser = v1_runner.Parser(__doc__, cpu=CPU_SIZES)
    parser.add_argument("--engine", choices=("auto", "rdma", "collective"), default="auto", help="default auto")
    parser.add_argument(
        "--num-local-ranks", type=int, help="ranks of a node; default: half of one machine's, with several machines all of each"
    )
    nodes = v1_runner.nodes_of(parser)
    args = parser.parse(argv, nodes.number)
    local = args.num_processes // (1 if nodes.number > 1 else 2) if args.num_local_ranks is None else args.num_local_ranks
    if local < 1 or args.num_processes % local:
        parser.error(f"--num-local-ranks, here {local}, must divide --num-processes, here {args.num_processes}")
    return v1_runner.start(args, on_every_rank, Work.of(args, num_local_ranks=local, engine=args.engine), nodes)


# As a command, for pytest; tests/cluster/test_slurm.py runs it as several machines do -------------------------------------

_SIZES = v1_runner.small(33, 128)


def _command(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK", "TORCHELASTIC_RUN_ID")}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, __file__, *_SIZES, *arguments], env=clean | environment, **pipes)


def _output(process: subprocess.Popen[str], status: int = 0) -> str:
    try:
        text = process.communicate(timeout=120)[0]
    finally:
        process.kill()
    assert process.returncode == status, text
    return text


def test_two_emulated_nodes_of_two_cpu_processes() -> None:
    text = _output(_command("--num-processes", "4", "--num-local-ranks", "2", "--engine", "collective"))
    assert "4 ranks, 2 nodes, collective engine" in text
    for kind, layout in product(KINDS, ("rank", "expert")):
        assert f"[testing] {kind}, layout='{layout}', brute force ... passed" in text
    assert text.count("passed") == 3 + 16 + 4
    assert text.count("[tuning] combine") == 2 and "network" in text


def test_an_engine_that_cannot_be_had_and_a_mesh_that_does_not_fit() -> None:
    text = _output(_command("--num-processes", "2", "--engine", "rdma"), status=1)
    assert "engine='rdma' cannot be used" in text and "FAILED: rank" in text
    text = _output(_command("--num-processes", "4", "--num-local-ranks", "3"), status=2)
    assert "--num-local-ranks, here 3, must divide --num-processes, here 4" in text


if __name__ == "__main__":
    sys.exit(main())
