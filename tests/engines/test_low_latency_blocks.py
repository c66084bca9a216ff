"""Which memory of NVSHMEM's low-latency calls use again: the same on every rank, and only what all have finished with."""

from __future__ import annotations

import random
from typing import Any

import pytest

from deepep_train.engines import low_latency_blocks as blocks
from deepep_train.engines.low_latency_blocks import Block


class Behind:
    def __init__(self, is_over: bool = True) -> None:
        self.is_over = is_over

    def query(self) -> bool:
        return self.is_over


@pytest.fixture(autouse=True)
def nothing_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_given_back", [])


def give_back(name: int, num_bytes: int, behind: Any = None) -> None:
    blocks.give_back(Block(name, num_bytes, 1000 + name), behind or Behind())  # type: ignore[arg-type]


def test_the_smallest_that_all_ranks_offer() -> None:
    offers = [[[1, 100], [2, 50], [3, 70]], [[3, 70], [1, 100]], [[1, 100], [3, 70], [2, 50]]]
    assert blocks.choose(offers, 40) == 3
    assert blocks.choose(offers, 71) == 1
    assert blocks.choose(offers, 101) is None
    assert blocks.choose([*offers, []], 1) is None
    assert blocks.choose([[[8, 5], [7, 5]], [[7, 5], [8, 5]]], 5) == 7


def test_two_rounds_at_once_are_not_offered_the_same() -> None:
    late = Behind(False)
    give_back(1, 10)
    give_back(2, 20, late)
    with blocks.offered() as idle:
        assert list(idle) == [1]
        with blocks.offered() as other:
            assert not other
        give_back(3, 30)
    late.is_over = True
    with pytest.raises(ValueError, match="on another rank"), blocks.offered() as idle:
        assert sorted(idle) == [1, 2, 3]
        assert idle.pop(2).address == 1002
        raise ValueError("wrong arguments on another rank")
    with blocks.offered() as idle:
        assert sorted(idle) == [1, 3]


@pytest.mark.parametrize("seed", range(20))
def test_ranks_agree_whatever_each_has_finished_with(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers come and go on ranks whose GPUs are late at random. No block is taken that another buffer has or some rank's GPU
    still uses; and there are never more blocks of a size than were in use at once."""
    chance, ranks = random.Random(seed), range(3)
    lists: list[list[Any]] = [[] for _ in ranks]
    under_way: list[list[tuple[int, Behind]]] = [[] for _ in ranks]
    alive: list[Block] = []
    held: dict[int, int] = {}  # bytes of every block that there is
    most = 0

    def used(name: int) -> bool:
        late = any(not behind.is_over for of_rank in under_way for n, behind in of_rank if n == name)
        return late or any(block.name == name for block in alive)

    def on(rank: int) -> None:
        monkeypatch.setattr(blocks, "_given_back", lists[rank])

    for number in range(150):
        for of_rank in under_way:
            for _, behind in of_rank:
                behind.is_over |= chance.random() < 0.3
        if alive and chance.random() < 0.45:
            gone = alive.pop(chance.randrange(len(alive)))
            for r in ranks:
                on(r)
                under_way[r].append((gone.name, Behind(chance.random() < 0.5)))
                blocks.give_back(gone, under_way[r][-1][1])  # type: ignore[arg-type]
            continue
        num_bytes, rounds, offers = chance.choice((10, 20, 35, 50)), [], []
        for r in ranks:
            on(r)
            rounds.append((context := blocks.offered(), idle := context.__enter__()))
            offers.append([[block.name, block.num_bytes] for block in idle.values()])
        again = blocks.choose(offers, num_bytes)
        if again is not None:
            assert not used(again) and held[again] >= num_bytes
        else:
            assert all(used(name) for name, size in held.items() if size >= num_bytes)
            held[number] = num_bytes
        for r, (context, idle) in zip(ranks, rounds, strict=True):
            on(r)
            if again is not None:
                idle.pop(again)
            context.__exit__(None, None, None)
        name = number if again is None else again
        alive.append(Block(name, held[name], 0))
        most = max(most, sum(map(used, held)))
        assert all(list(held.values()).count(size) <= most for size in held.values())
    assert len(held) < number / 3
