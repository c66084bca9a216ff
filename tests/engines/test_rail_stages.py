"""Which turns of the rail a stage has, and what is launched when."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import deepep_train as dt
from deepep_train.engines.rail_stages import VARIABLE, Turns, asked, in_order, stages_of


@given(st.integers(1, 256), st.integers(1, 300))
def test_every_turn_is_in_one_stage(num_nodes: int, most: int) -> None:
    forth, back = stages_of(num_nodes, most)
    for stages, turns in ((forth, range(num_nodes)), (back, range(1, num_nodes + 1))):
        assert len(stages) == max(1, min(most, num_nodes - 1))
        assert [turn for stage in stages for turn in range(*stage)] == list(turns)
        crossing = [len(range(max(1, first), min(end, num_nodes))) for first, end in stages]
        assert max(crossing) - min(crossing) <= 1
        assert num_nodes == 1 or min(crossing) >= 1


@given(st.data(), st.integers(1, 40), st.integers(1, 8))
def test_both_ends_of_a_stream_are_in_the_same_stage(data: st.DataObject, num_nodes: int, most: int) -> None:
    """By the places that kernels are told: `count` nodes from the first on, counted round."""
    node = data.draw(st.integers(0, num_nodes - 1))

    def nodes_of(first: int, stage: Turns) -> list[int]:
        return [(first + i) % num_nodes for i in range(stage.end - stage.first)]

    forth, back = stages_of(num_nodes, most)
    for stages, own in ((forth, 0), (back, -1)):
        came = [nodes_of(stage.sources(node, num_nodes), stage) for stage in stages]
        assert sorted(n for stage in came for n in stage) == list(range(num_nodes))
        assert node in came[own]
        for stage, sources in zip(stages, came, strict=True):
            for source in sources:
                assert node in nodes_of(stage.destinations(source, num_nodes), stage)


def test_the_first_hop_is_one_stage_ahead() -> None:
    assert in_order("rail", "dispatch", 1) == ("rail", "dispatch")
    assert in_order("combine", "rail", 3) == ("combine", "combine", "rail", "combine", "rail", "rail")


@pytest.mark.parametrize("word", ["0", "-1", "two", ""])
def test_what_is_no_number_is_refused(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, word)
    with pytest.raises(dt.ArgumentError, match=f"{VARIABLE} must be a number from 1 on, got {word!r}"):
        asked()
    monkeypatch.delenv(VARIABLE)
    assert asked() == 1
