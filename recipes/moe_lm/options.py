"""The command line, checked before anything heavy is imported: a typing mistake is answered at once."""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

EXIT_BROKEN_INPUT = 2


class BrokenInput(Exception):
    """What the user gave cannot be used; the text says why in one line. Every rank raises it alike, or, if `one_machine`,
    perhaps only those of one machine."""

    def __init__(self, text: str, one_machine: bool = False) -> None:
        super().__init__(text)
        self.one_machine = one_machine


def environment(name: str, default: int) -> int:
    """A number that torchrun sets for every rank, such as RANK or WORLD_SIZE."""
    return int(os.environ.get(name, default))


def end_broken(error: BrokenInput, program: str = "train.py") -> NoReturn:
    """Rank 0 says what is broken, in one line, and ends with code 2; the other ranks end quietly.

    torchrun kills a machine's ranks when the first one ends, so the quiet ones wait: a faster one would silence rank 0.
    """
    if environment("LOCAL_RANK" if error.one_machine else "RANK", 0) == 0:
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    else:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(20)
    # Not sys.exit: background threads of a broken start must not keep the process.
    os._exit(EXIT_BROKEN_INPUT)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options, all of them checked as far as they can be without files and GPUs. Raises `BrokenInput`."""
    options = _parser().parse_args(arguments)
    size, local_size = environment("WORLD_SIZE", 1), environment("LOCAL_WORLD_SIZE", environment("WORLD_SIZE", 1))
    if options.expert_parallel is None:
        options.expert_parallel = min(size, local_size)
    checks = (
        (options.dim % (2 * options.heads) == 0, f"--dim {options.dim} must be a multiple of twice --heads {options.heads}"),
        (options.top_k <= options.experts, f"--top-k {options.top_k} is more than --experts {options.experts}"),
        (
            size % options.expert_parallel == 0,
            f"--expert-parallel {options.expert_parallel} does not divide the {size} ranks",
        ),
        (
            options.experts % options.expert_parallel == 0,
            f"--experts {options.experts} cannot be spread evenly over {options.expert_parallel} expert-parallel ranks",
        ),
        (
            options.num_local_ranks is None or options.expert_parallel % options.num_local_ranks == 0,
            f"--num-local-ranks {options.num_local_ranks} does not divide the {options.expert_parallel} expert-parallel ranks",
        ),
    )
    for holds, otherwise in checks:
        if not holds:
            raise BrokenInput(otherwise)
    return options


class _Parser(argparse.ArgumentParser):
    """argparse that raises instead of printing its usage on every rank."""

    def error(self, message: str) -> NoReturn:
        raise BrokenInput(f"{message} (--help lists the options)")

    def print_help(self, file: IO[str] | None = None) -> None:  # type: ignore[override]
        if environment("RANK", 0) == 0:
            super().print_help(file)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="train.py",
        description="Train a byte-level MoE language model with expert parallelism; under torchrun, or as one process.",
        epilog="SIGUSR1, SIGTERM and Ctrl-C end the run after the current step, with a checkpoint and exit code 0.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )

    def add(group: Any, name: str, kind: Callable[[str], Any], default: Any, text: str) -> None:
        group.add_argument(name, type=kind, default=default, help=text, metavar=kind.__name__.strip("_").upper())

    files = parser.add_argument_group("files")
    add(files, "--data", Path, None, "a file, or a folder of files, to learn; without it Python's own standard library")
    add(files, "--out", Path, Path("runs/moe_lm"), "folder for checkpoints, log.json, loss_curve.png and sample.txt")
    files.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint in --out, if there is one")
    add(files, "--save-every", _count, 100, "steps between checkpoints; one is saved at the end besides")

    model = parser.add_argument_group("model")
    add(model, "--layers", _count, 4, "transformer blocks, each with an MoE layer")
    add(model, "--dim", _count, 128, "hidden size")
    add(model, "--heads", _count, 4, "attention heads")
    add(model, "--experts", _count, 8, "experts per layer, spread evenly over the expert-parallel ranks")
    add(model, "--top-k", _count, 2, "experts per token")
    add(model, "--ffn", _count, 256, "hidden size of each expert")

    training = parser.add_argument_group("training")
    add(training, "--steps", _number, 400, "optimizer steps in all")
    add(training, "--batch", _count, 8, "sequences per rank and step")
    add(training, "--seq", _count, 128, "bytes per sequence")
    add(training, "--lr", _positive, 3e-3, "peak learning rate")
    add(training, "--warmup", _count, 50, "steps until the peak; after it the rate falls with the square root of the step")
    add(training, "--clip", _positive, 1.0, "largest gradient norm, over all parameters of all ranks")
    add(training, "--aux-loss", _at_least_zero, 0.01, "weight of the load balance loss")
    add(training, "--bias-rate", _at_least_zero, 0.001, "step of the balancing bias in the choice of experts; 0 for none")
    add(training, "--seed", _number, 0, "of the first weights, the batches and the sample")
    add(training, "--eval-every", _count, 100, "steps between evaluations on held-out text; one at the end besides")
    add(training, "--eval-sequences", _count, 64, "held-out sequences per evaluation")
    add(training, "--sample-bytes", _number, 300, "length of the text generated at the end")

    machine = parser.add_argument_group("machine")
    add(machine, "--expert-parallel", _count, None, "ranks that share one set of experts; without it all ranks of one node")
    machine.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes GPUs if there are any")
    machine.add_argument(
        "--engine",
        choices=("auto", "nvlink", "rdma", "collective"),
        default="auto",
        help="what tokens travel by on GPUs, as in Buffer",
    )
    add(machine, "--num-local-ranks", _count, None, "expert-parallel ranks of one node; without it as the host names say")
    machine.add_argument(
        "--check",
        action="store_true",
        help="only compare the losses of 20 steps with those of one process; exit code 1 if not alike",
    )
    machine.add_argument("--dry-run", action="store_true", help="only check the options, --data and --out")
    return parser


def _number(text: str) -> int:
    return _checked(int, text, 0, 2**31)


def _count(text: str) -> int:
    return _checked(int, text, 1, 2**31)


def _positive(text: str) -> float:
    value = _at_least_zero(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be above 0")
    return value


def _at_least_zero(text: str) -> float:
    return _checked(float, text, 0, 10**9)


def _checked(kind: Any, text: str, least: float, most: float) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not least <= value <= most:
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text!r} is not {what} from {least} to {most}")
    return value
