#!/usr/bin/env python3
"""Train a byte-level MoE language model: data parallel, its experts spread over the ranks.

    torchrun --standalone --nproc-per-node 2 recipes/moe_lm/train.py --help

The same command trains on CPUs and on GPUs; `python recipes/moe_lm/train.py` is one process that holds all experts.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

from files import make_writable, read_text
from options import BrokenInput, end_broken, parse


def main() -> int:
    """The exit code."""
    try:
        options = parse()
        missing = [name for name in ("torch", "deepep_train", "tqdm", "matplotlib") if find_spec(name) is None]
        if missing:
            raise BrokenInput(f"not installed: {', '.join(missing)}; pip install 'deepep_train[recipes]' brings all")
        if options.dry_run:
            read_text(options.data, options.seq)
            make_writable(options.out)
            return 0
        from run import run

        return run(options)
    except BrokenInput as error:
        end_broken(error)


if __name__ == "__main__":
    sys.exit(main())
