"""How the network's work and the node's overlap: an exchange along the rail in stages, so that the ranks of a node pass on what
one stage has brought while the next is on its way.

In turn t of an exchange among N nodes a rank puts rows to the t-th node behind its own, and gets rows from the t-th before it;
in turn 0, which is also turn N, the rows are its own node's, and nothing crosses. A stage is some turns that follow each other.
As every turn is a permutation of the nodes, all cards work in each, and both ends of every stream know which stage it belongs
to.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from deepep_train.errors import ArgumentError

VARIABLE = "DEEPEP_TRAIN_RAIL_STAGES"


class Turns(NamedTuple):
    """From the turn `first` up to, not including, `end`."""

    first: int
    end: int

    def sources(self, node: int, num_nodes: int) -> int:
        """The first of the consecutive nodes, counted round, that rows come from in these turns."""
        return (node - self.end + 1) % num_nodes

    def destinations(self, node: int, num_nodes: int) -> int:
        """The same of those that they go to."""
        return (node + self.first) % num_nodes


def asked() -> int:
    """The stages that the environment asks for, at most; the same on all ranks, or they would wait for one another in vain.

    Raises:
        ArgumentError: if it is no such number.
    """
    word = os.environ.get(VARIABLE, "1").strip()
    if not word.isdecimal() or int(word) < 1:
        raise ArgumentError(f"{VARIABLE} must be a number from 1 on, got {word!r}", VARIABLE)
    return int(word)


class Stages(NamedTuple):
    """Of both operations; as many of either. What stays in the node is moved while the network is busy with other stages: a
    dispatch's when the first has come, a combine's when the last has left."""

    dispatch: list[Turns]
    combine: list[Turns]


def stages_of(num_nodes: int, most: int) -> Stages:
    """At most so many stages, of turns 1 to N - 1 as evenly as can be, the longer ones first."""
    crossing = num_nodes - 1
    number = max(1, min(most, crossing))
    ends = [1 + -(-crossing * (i + 1) // number) for i in range(number)]
    stages = [Turns(first, end) for first, end in zip([1, *ends[:-1]], ends, strict=True)]
    forth, back = stages[0]._replace(first=0), stages[-1]._replace(end=num_nodes + 1)
    return Stages([forth, *stages[1:]], [*stages[:-1], back])


def in_order(first: str, second: str, num_stages: int) -> tuple[str, ...]:
    """Launches of both hops: the first hop is one stage ahead, for where streams share a queue of the GPU's
    (CUDA_DEVICE_MAX_CONNECTIONS=1), in which nothing overtakes."""
    steps: list[str] = []
    for stage in range(num_stages):
        steps += [first] if stage == 0 else [first, second]
    return (*steps, second)
