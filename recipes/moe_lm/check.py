"""`--check`: expert parallelism computes what one process with all the experts computes.

Losses alone would not tell: AdamW hardly notices a gradient that is twice too large. Gradient norms do.
"""

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
    parallel = Trainer(options, world, exact=True)
    expected = []
    for n in range(STEPS):
        loss = parallel.step(n, [corpus.batch(n, world.rank, options.batch)])
        expected.append((parallel.share(loss, 0.0, False).loss, parallel.gradient_norm))
    single_world = alone(world)
    verdict = torch.zeros(1)
    if single_world is not None:
        verdict += _compare(Trainer(options, single_world, exact=True), corpus, world.size, expected)
    dist.all_reduce(verdict, group=world.everyone)
    return bool(verdict)


def _compare(single: Trainer, corpus: Corpus, ranks: int, expected: list[tuple[float, float]]) -> bool:
    print(
        f"in float64                                               relative difference of\n"
        f"step   {f'loss on {ranks} ranks':>18}   {'on one process':>18}      loss   gradient norm",
        flush=True,
    )
    worst = 0.0
    for n, (loss, norm) in enumerate(expected):
        reference = single.step(n, [corpus.batch(n, rank, single.options.batch) for rank in range(ranks)])
        differences = _relative(loss, reference), _relative(norm, single.gradient_norm)
        worst = max(worst, *differences)
        print(f"{n + 1:4d}   {loss:18.12f}   {reference:18.12f}   {differences[0]:7.1e}   {differences[1]:13.1e}", flush=True)
    agree = worst <= TOLERANCE
    word = "agree" if agree else "DISAGREE"
    print(f"check: losses and gradients {word}: largest relative difference {worst:.1e}, allowed {TOLERANCE:g}", flush=True)
    return agree


def _relative(value: float, reference: float) -> float:
    difference = abs(value - reference) / max(abs(reference), 1e-300)
    return difference if math.isfinite(difference) else math.inf
