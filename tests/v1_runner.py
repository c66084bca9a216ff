"""The command line and the processes of tests/test_intranode.py, test_internode.py and test_low_latency.py."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deepep_train import DeepEPError
from deepep_train.cli.launch import Nodes, run_ranks

GPU_DEFAULTS = {"num_processes": 8, "num_tokens": 4096, "hidden": 7168, "num_topk": 8, "num_experts": 256}
CPU_DEFAULTS = {"num_processes": 2, "num_tokens": 256, "hidden": 512, "num_topk": 4, "num_experts": 16}


@dataclass(frozen=True)
class Work:
    """What was asked for; `device` is "cuda" or "cpu"."""

    num_tokens: int
    hidden: int
    num_topk: int
    num_experts: int
    device: str
    tune: bool

    @classmethod
    def of(cls, args: argparse.Namespace, **more: Any) -> Any:
        """From what `parse` returned, for subclasses with their own fields besides."""
        sizes = {name: getattr(args, name) for name in ("num_tokens", "hidden", "num_topk", "num_experts")}
        return cls(**sizes, device=args.device, tune=not args.no_tuning, **more)


class Parser(argparse.ArgumentParser):
    """The arguments that all have; sizes depend on whether there is a GPU."""

    def __init__(self, description: str | None, gpu: dict[str, int] | None = None, cpu: dict[str, int] | None = None) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.sizes = {"cuda": GPU_DEFAULTS | (gpu or {}), "cpu": CPU_DEFAULTS | (cpu or {})}
        for name, default in self.sizes["cuda"].items():
            text = f"default {default}, without a GPU {self.sizes['cpu'][name]}"
            self.add_argument(f"--{name.replace('_', '-')}", type=int, help=text)
        self.add_argument("--device", choices=("cuda", "cpu"), help="default cuda where there is a GPU")
        self.add_argument("--no-tuning", action="store_true", help="checks only")
        self.add_argument("--deadline", type=float, default=480.0, help="seconds until everything is killed")

    def parse(self, argv: Sequence[str] | None, num_nodes: int = 1) -> argparse.Namespace:
        args = self.parse_args(argv)
        args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        for name, value in self.sizes[args.device].items():
            if getattr(args, name) is None:
                setattr(args, name, value)
            if getattr(args, name) < 1:
                self.error(f"--{name.replace('_', '-')} must be at least 1")
        ranks = args.num_processes * num_nodes
        if args.num_experts % ranks or args.num_experts < args.num_topk:
            self.error(f"--num-experts must be divisible by the {ranks} ranks and at least --num-topk")
        return args


def small(num_tokens: int, hidden: int) -> list[str]:
    """The arguments of what pytest runs on CPUs."""
    sizes = {"num-tokens": num_tokens, "hidden": hidden, "num-topk": 3, "num-experts": 8, "device": "cpu", "deadline": 90}
    return [f"--{name}={value}" for name, value in sizes.items()]


def nodes_of(parser: Parser) -> Nodes:
    """Under torchrun its machines and, in `parser`, its processes; else those of the environment."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return nodes_of_environment()
    parser.set_defaults(num_processes=int(os.environ["LOCAL_WORLD_SIZE"]))
    return Nodes(int(os.environ["GROUP_WORLD_SIZE"]))


def nodes_of_environment() -> Nodes:
    """As DeepEP's tests have it: WORLD_SIZE machines, of which this is number RANK, meet at MASTER_ADDR:MASTER_PORT."""
    number, here = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0")))
    return Nodes(number, here, f"{os.environ.get('MASTER_ADDR', '127.0.0.1')}:{os.environ.get('MASTER_PORT', '8361')}")


def start(args: argparse.Namespace, on_every_rank: Callable[[Any], None], work: Work, nodes: Nodes | None = None) -> int:
    """The exit status."""
    try:
        run_ranks(args.num_processes, on_every_rank, work, deadline=args.deadline, device=args.device, nodes=nodes)
    except DeepEPError as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    return 0
