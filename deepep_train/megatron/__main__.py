"""Runs a Megatron training script with the backend of this library known to it and to its command line.

    torchrun --nproc-per-node 8 -m deepep_train.megatron pretrain_gpt.py \\
        --moe-token-dispatcher-type flex --moe-flex-dispatcher-backend deepep_train …

`--no-moe-fp8-dispatch` among the script's arguments sends tokens as they are under every FP8 recipe; `--moe-fp8-gradients`
sends combine's gradients in FP8 where tokens cross in FP8.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path
from typing import Any

from deepep_train.megatron.install import BACKEND, install
from deepep_train.megatron.switches import take_option

OPTION = "--moe-flex-dispatcher-backend"


def accept_backend() -> None:
    """Let every parser made from now on take the backend's name for `OPTION`, whatever the release that adds it."""
    stock = argparse._ActionsContainer.add_argument

    def add_argument(self: Any, *args: Any, **kwargs: Any) -> Any:
        if OPTION in args and kwargs.get("choices") is not None:
            kwargs["choices"] = [*kwargs["choices"], BACKEND]
        return stock(self, *args, **kwargs)

    argparse._ActionsContainer.add_argument = add_argument  # type: ignore[method-assign]


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__, file=sys.stderr)
        raise SystemExit(0 if len(sys.argv) > 1 else "usage: python -m deepep_train.megatron SCRIPT ARGS…")
    script = Path(sys.argv[1])
    if not script.is_file():
        raise SystemExit(f"python -m deepep_train.megatron: there is no script {script}")
    if not getattr(sys.flags, "safe_path", False):  # Python 3.11
        # As python does for a script. Before Megatron is imported: a checkout of Megatron-LM has its own megatron.core.
        sys.path[0] = str(script.resolve().parent)
    install()
    accept_backend()
    sys.argv = take_option(sys.argv[1:])
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
