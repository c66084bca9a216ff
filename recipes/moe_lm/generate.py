#!/usr/bin/env python3
"""Text from a checkpoint that train.py left, its experts spread over the ranks and reached by the low-latency calls.

    torchrun --standalone --nproc-per-node 2 recipes/moe_lm/generate.py --folder runs/moe_lm --prompt "import torch"
    python recipes/moe_lm/generate.py --folder runs/moe_lm --exchange both

Any number of ranks that divides the experts will do, whatever the run had. Rank 0 writes, the others' experts serve it.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from pathlib import Path

from options import BrokenInput, end_broken, environment

EXCHANGES = ("low-latency", "normal", "both")


def main() -> int:
    """The exit code."""
    try:
        given = _parse()
        options = _options_of_run(given)
        from checkpoints import Checkpoints
        from sample import generate
        from torch import distributed, frombuffer, uint8
        from trainer import Trainer
        from world import join

        world = join(options)
        trainer = Trainer(options, world)
        found = Checkpoints(given.run).resume(trainer)
        if found is None:
            raise BrokenInput(f"--folder {given.run}: there is no whole checkpoint in {given.run / 'checkpoints'}")
        prompt = frombuffer(bytearray(given.prompt.encode()), dtype=uint8).long()
        texts = []
        for exchange in ("low-latency", "normal") if given.exchange == "both" else (given.exchange,):
            for layer in trainer.layers:
                layer.low_latency, layer.low_latency_tokens = exchange == "low-latency", options.seq
            began = time.perf_counter()
            texts.append(generate(trainer, prompt, given.bytes, given.temperature))
            if world.rank == 0:
                seconds = time.perf_counter() - began
                print(
                    f"--- step {found[0]}, {exchange} exchange on {world.size} rank(s), engine "
                    f"{trainer.layers[0].buffer.engine}, {given.bytes / seconds:.0f} bytes/s ---\n"
                    f"{texts[-1].decode(errors='replace')}",
                    flush=True,
                )
        if given.exchange == "both" and world.rank == 0:
            pairs = enumerate(zip(*(text[-given.bytes :] for text in texts), strict=True))
            same = next((i for i, (a, b) in pairs if a != b), given.bytes)
            print(f"--- the same text for {same} of {given.bytes} bytes", flush=True)
        del trainer, layer
        gc.collect()  # a buffer in a reference cycle keeps the group alive, and gloo aborts a process that exits with one
        distributed.destroy_process_group()
    except BrokenInput as error:
        end_broken(error, "generate.py")
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="generate.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--folder", dest="run", type=Path, default=Path("runs/moe_lm"), help="what train.py had as --out (default %(default)s)"
    )
    parser.add_argument("--prompt", default="def ", help="text to continue (default %(default)r)")
    parser.add_argument("--bytes", type=int, default=200, help="to write (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest byte (default %(default)s)")
    parser.add_argument(
        "--exchange", choices=EXCHANGES, default=EXCHANGES[0], help="both: also by the calls of training, and compare"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--engine", choices=("auto", "nvlink", "rdma", "collective"), default="auto", help="as in Buffer, on GPUs"
    )
    given = parser.parse_args()
    if given.bytes < 1 or given.temperature < 0 or not given.prompt:
        raise BrokenInput("--bytes must be at least 1, --temperature at least 0, and --prompt not empty")
    return given


def _options_of_run(given: argparse.Namespace) -> argparse.Namespace:
    """The options with which the run's model was made."""
    log = given.run / "log.json"
    try:
        arguments = json.loads(log.read_text())["arguments"]
    except (OSError, ValueError, KeyError) as error:
        raise BrokenInput(f"--folder {given.run}: {log} is not what train.py leaves: {error}") from error
    size = environment("WORLD_SIZE", 1)
    if arguments["experts"] % size:
        raise BrokenInput(f"the run's {arguments['experts']} experts cannot be spread evenly over {size} ranks")
    changed = {"device": given.device, "engine": given.engine, "expert_parallel": size, "out": given.run}
    changed["num_local_ranks"] = None
    return argparse.Namespace(**arguments | changed)


if __name__ == "__main__":
    sys.exit(main())
