"""`--check`: expert parallelism computes what one process with all the experts computes."""

from __future__ import annotations

import argparse
import math

import torch
import torch.distributed as dist
from data import Corpus
from trainer import Trainer
from world import World, alone

STEPS = 20
TOLERANCE = 1e-5


def check(options: argparse.Namespace, world: World, corpus: Corpus) -> bool:
    """Train `STEPS` steps on all ranks, then the same steps on rank 0 alone, every rank's batch a micro-batch of its own;
    rank 0 prints both losses of each step. Returns, on every rank, whether they agree. A collective call."""

    def batch(step: int, rank: int) -> torch.Tensor:
        return corpus.batch(step, rank, options.batch)

    parallel = Trainer(options, world, exact=True)
    losses = [parallel.share(parallel.step(n, [batch(n, world.rank)]), 0.0, False).loss for n in range(STEPS)]
    verdict = torch.zeros(1)
    single_world = alone(world)
    if single_world is not None:
        single = Trainer(options, single_world, exact=True)
        print(f"in float64\nstep   {f'{world.size} ranks':>18}   {'one process':>18}   relative difference", flush=True)
        worst = 0.0
        for n, loss in enumerate(losses):
            reference = single.step(n, [batch(n, rank) for rank in range(world.size)])
            difference = abs(loss - reference) / abs(reference)
            worst = max(worst, difference if math.isfinite(difference) else math.inf)
            print(f"{n + 1:4d}   {loss:18.12f}   {reference:18.12f}   {difference:.1e}", flush=True)
        verdict += worst <= TOLERANCE
        word = "agree" if verdict else "DISAGREE"
        print(f"check: the losses {word}: largest relative difference {worst:.1e}, allowed {TOLERANCE:g}", flush=True)
    dist.all_reduce(verdict, group=world.everyone)
    return bool(verdict)
