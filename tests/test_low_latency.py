"""DeepEP V1's low-latency calls: checks bit for bit against a loop over experts, then timings.

    python tests/test_low_latency.py --num-processes 8 --num-tokens 128 --hidden 7168 --num-topk 8 --num-experts 256

Rank r takes GPU r modulo their number; without a GPU the ranks talk through gloo and the collective engine, and the defaults
are small. With --num-local-ranks one machine plays several nodes, between which NVSHMEM puts; several machines run the same
command with WORLD_SIZE (their number), RANK (which this is), MASTER_ADDR and MASTER_PORT set, or under torchrun. pytest runs
the checks on two CPU processes, and on two that play a machine each.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
import v1_runner
from low_latency_cases import KINDS, STYLES, Case, round_trip

from deepep_train import Buffer
from deepep_train.cli import bench_gpu

GPU_SIZES = {"num_tokens": 128}
CPU_SIZES = {"num_tokens": 32}
ROUNDS, CALLS = 5, 10
PRESSURE_ROUNDS = 100


@dataclass(frozen=True)
class Work(v1_runner.Work):
    pressure: bool
    use_logfmt: bool
    allow_nvlink: bool
    allow_mnnvl: bool
    num_local_ranks: int | None


def on_every_rank(work: Work) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    hint = Buffer.get_low_latency_rdma_size_hint(work.num_tokens, work.hidden, size, work.num_experts)
    how = {"num_qps_per_rank": work.num_experts // size, "num_local_ranks": work.num_local_ranks}
    how |= {"allow_nvlink_for_low_latency_mode": work.allow_nvlink, "allow_mnnvl": work.allow_mnnvl}
    buffer = Buffer(dist.group.WORLD, num_rdma_bytes=hint, low_latency_mode=True, **how)
    if rank == 0:
        print(f"{size} ranks, {buffer.engine} engine; {work}", flush=True)
    say(f"checks passed: {check(buffer, work, rank, size)} exchanges", rank)
    if work.pressure:
        for seed in range(PRESSURE_ROUNDS):
            case = _case(work, size, KINDS[seed % 4], STYLES[seed % len(STYLES)], seed % 2 == 0, seed % 3 == 0, seed)
            first, again = (_hash(buffer, case, rank, work.device) for _ in range(2))
            assert first == again, f"rank {rank}: {case}: bits differ from one time to the next"
        say(f"pressure test passed: {PRESSURE_ROUNDS} exchanges, each twice with equal bits", rank)
    if work.tune and work.device == "cuda":
        tune(buffer, replace(_case(work, size, "fp8", "uniform", False, False, 0), logfmt=work.use_logfmt), rank)
    dist.barrier()
    buffer.destroy()


def say(text: str, rank: int) -> None:
    dist.barrier()
    if rank == 0:
        print(text, flush=True)


def _case(work: Work, size: int, kind: str, style: str, hook: bool, zero_copy: bool, seed: int) -> Case:
    """Ranks with all their tokens, and one with fewer."""
    tokens = tuple(work.num_tokens - (r * 7 % work.num_tokens if r % 2 else 0) for r in range(size))
    shape = (tokens, work.num_tokens, work.hidden, work.num_experts, work.num_topk)
    return Case(*shape, style, kind, hook, zero_copy, seed)


def check(buffer: Buffer, work: Work, rank: int, size: int) -> int:
    """All kinds of rows, hooks and copies, over the routings; returns how many."""
    kinds = [kind for kind in KINDS if kind != "ue8m0" or work.hidden % 512 == 0]
    cases = [
        _case(work, size, kind, STYLES[i % len(STYLES)], hook, zero_copy, i)
        for i, (kind, hook, zero_copy) in enumerate(product(kinds, (False, True), (False, True)))
    ]
    cases += [replace(case, logfmt=True, zero_copy=False) for case in cases[:2]]
    cases += [replace(cases[0], asynchronous=calls) for calls in ("combine", "both")]
    for case in cases:
        errors = round_trip(buffer, rank, case, work.device)
        assert not errors, f"rank {rank}: {case}: {len(errors)} errors, first {errors[0]}"
    return len(cases)


def _hash(buffer: Buffer, case: Case, rank: int, device: str) -> int:
    x, idx, weights = (t.to(device) for t in case.inputs(rank))
    how = case.arguments | {"use_fp8": False, "round_scale": False, "use_ue8m0": False}
    recv, count, handle, _, hook = buffer.low_latency_dispatch(x, idx, case.most, case.num_experts, **how)
    if hook is not None:
        hook()
    for e, n in enumerate(count.tolist()):
        recv[e, n:] = 0
    z, _, hook = buffer.low_latency_combine(recv, idx, weights, handle, return_recv_hook=case.hook)
    if hook is not None:
        hook()
    return sum(hash(t.cpu().view(torch.int16).numpy().tobytes()) for t in (recv, z))


def tune(buffer: Buffer, case: Case, rank: int) -> None:
    """Milliseconds of each call, the slowest rank's, and of its two phases."""
    x, idx, weights = (t.cuda() for t in case.inputs(rank))
    kept = buffer.low_latency_dispatch(x, idx, case.most, case.num_experts, use_fp8=False)
    rows, handle = kept[0], kept[2]

    def dispatch(use_fp8: bool) -> Any:
        return buffer.low_latency_dispatch(x, idx, case.most, case.num_experts, use_fp8=use_fp8)

    def both() -> None:
        handle = dispatch(True)[2]
        buffer.low_latency_combine(rows, idx, weights, handle, use_logfmt=case.logfmt)

    calls: dict[str, Callable[[], Any]] = {
        "combine": lambda: buffer.low_latency_combine(rows, idx, weights, handle, use_logfmt=case.logfmt),
        "dispatch FP8 + combine": both,
    }
    for name, call in calls.items():
        handle.space.are_over[handle.set] = True  # type: ignore[attr-defined] # of V1's tuple: its slots may serve again
        ms = bench_gpu.slowest_ms(bench_gpu.captured(call, CALLS), 1, ROUNDS) / CALLS
        if rank == 0:
            print(f"{name}: {1e3 * ms:.1f} us", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = v1_runner.Parser(__doc__, GPU_SIZES, CPU_SIZES)
    parser.add_argument("--pressure-test", action="store_true", help=f"besides, {PRESSURE_ROUNDS} exchanges twice each")
    parser.add_argument("--use-logfmt", action="store_true", help="time combines in 10 bits a value; they are always checked")
    parser.add_argument("--disable-nvlink", action="store_true", help="V1's; without effect: each peer is reached as it can be")
    parser.add_argument("--allow-mnnvl", action="store_true", help="V1's; without effect")
    parser.add_argument(
        "--num-local-ranks", type=int, help="ranks of a node, which must divide all; default: those of a machine"
    )
    nodes = v1_runner.nodes_of(parser)
    args = parser.parse(argv, nodes.number)
    how = {"allow_nvlink": not args.disable_nvlink, "allow_mnnvl": args.allow_mnnvl, "use_logfmt": args.use_logfmt}
    work = Work.of(args, pressure=args.pressure_test, num_local_ranks=args.num_local_ranks, **how)
    return v1_runner.start(args, on_every_rank, work, nodes)


# For pytest -----------------------------------------------------------------------------------------------------------------

_SIZES = v1_runner.small(9, 512)


def test_checks_pass_on_two_cpu_processes() -> None:
    assert main(["--num-processes", "2", "--use-logfmt", *_SIZES]) == 0


def test_two_machines_of_one_process() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    machines = [
        subprocess.Popen(
            [sys.executable, __file__, "--num-processes", "1", *_SIZES],
            env=os.environ | {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        texts = [machine.communicate(timeout=120)[0] for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    assert [machine.returncode for machine in machines] == [0, 0], texts
    assert "2 ranks, collective engine" in texts[0] and "checks passed: 20 exchanges" in texts[0] and not texts[1], texts


if __name__ == "__main__":
    sys.exit(main())
