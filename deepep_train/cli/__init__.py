"""The command line: `python -m deepep_train COMMAND`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from deepep_train.errors import DeepEPError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m deepep_train", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    from deepep_train.cli import bench, doctor, plan

    for command in (doctor, bench, plan):
        command.add_parser(commands)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (DeepEPError, ValueError, OSError) as error:
        print(f"{parser.prog} {args.command}: {error}", file=sys.stderr)
        return 2
