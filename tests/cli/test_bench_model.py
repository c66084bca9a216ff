"""The least that must be moved, against numbers counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from deepep_train.cli import bench_model as b

# Two ranks with two experts each. Rank 0: token 0 to both experts of rank 0, token 1 to both ranks, token 2 to rank 1 only.
# Rank 1: token 0 to both experts of rank 1, token 1 to rank 0.
TINY = (torch.tensor([[0, 1], [0, 2], [-1, 3]]), torch.tensor([[2, 3], [1, -1]]))


def test_traffic_counts_rows() -> None:
    t = b.traffic(TINY, 4)
    assert t.sent.tolist() == [3, 2]
    assert t.from_to.tolist() == [[2, 2], [1, 1]]
    assert t.received.tolist() == [3, 3]
    assert t.expert_rows.tolist() == [4, 4]
    assert t.several.tolist() == [1, 1]
    assert t.grouped.tolist() == [2, 2]
    assert t.own_single.tolist() == [1, 0]


def test_every_row_is_read_once_and_written_once() -> None:
    """Rank 0: 3 tokens out, 3 rows in, of which one has a copy for its second expert."""
    moved = {name: rows.tolist() for name, rows in b.rows_moved(b.traffic(TINY, 4)).items()}
    assert moved == {
        "dispatch": [6, 5],
        "combine": [6, 5],
        "combine any": [6 + 2 * 3, 5 + 2 * 3],
        "expert dispatch": [6 + 2, 5 + 2],
        "expert combine": [6 + 3, 5 + 3],  # two rows read and their sum written before it is pulled
        "expert combine any": [6 + 4 + 3 - 2, 5 + 4 + 3],  # rank 0's token 1 is read where it is
    }


def test_between_nodes_rows_pass_through_a_cards_memory() -> None:
    """Nodes of one rank. Rank 0 sends 2 rows and gets 1, rank 1 the reverse; each forwards or sums its own as well."""
    to_node = b.tokens_to_nodes(TINY, 4, 1)
    assert to_node.tolist() == [[2, 2], [1, 1]]
    moved = {name: rows.tolist() for name, rows in b.rows_moved_across(b.traffic(TINY, 4), to_node, 1).items()}
    back = [3 + 3 + 1 + 2 + 4 + 3, 3 + 3 + 2 + 1 + 2 + 2]
    assert moved == {
        "dispatch": [3 * 2 + 1 + 3 + 3, 3 * 1 + 2 + 3 + 3],
        "combine": back,
        "combine any": [back[0] + 2 * 3, back[1] + 2 * 3],
        "expert dispatch": [13 + 3 + 4, 11 + 3 + 4],
        "expert combine": [back[0] + 4 + 3, back[1] + 4 + 3],
        "expert combine any": [back[0] + 4 + 3, back[1] + 4 + 3],
    }


def test_tokens_to_nodes_of_several_ranks() -> None:
    idx = [
        torch.tensor([[0, 3]]),
        torch.tensor([[-1, 5], [6, 7]]),
        torch.tensor([[-1, -1]]),
        torch.empty(0, 2, dtype=torch.int64),
    ]
    assert b.tokens_to_nodes(idx, 8, 2).tolist() == [[1, 0], [0, 2], [0, 0], [0, 0]]


@pytest.fixture(scope="module")
def large() -> b.Traffic:
    return b.traffic_of(b.LARGE, 8)


@pytest.mark.parametrize(
    "name,milliseconds",
    [
        ("dispatch", 0.98),
        ("combine", 0.98),
        ("combine any", 2.63),
        ("expert dispatch", 1.83),
        ("expert combine", 2.06),
        ("expert combine any", 2.93),
    ],
)
def test_floors_of_the_large_shape(large: b.Traffic, name: str, milliseconds: float) -> None:
    """As measured bandwidth and uniform routing gave them: 8 ranks share a memory of 3.01 TB/s."""
    row = 2 * b.LARGE.hidden
    floor = b.floor_ms(b.rows_moved(large)[name] * row, large.from_to * row, 1, 3.01e12, None)
    assert floor == pytest.approx(milliseconds, rel=0.01)


def test_bytes_of_the_large_shape(large: b.Traffic) -> None:
    row = 2 * b.LARGE.hidden
    received = large.received.double().mean().item() * row
    assert received == pytest.approx(310.7e6, rel=0.01)
    assert b.bytes_to_others(large.from_to * row) == pytest.approx(received * 7 / 8, rel=0.01)
    # 8 ranks' arenas and as much again as they need elsewhere fit into 80 GB.
    assert 4e9 < b.arena_bytes(large, b.LARGE) < 7e9


def test_floor_is_the_busiest_gpus() -> None:
    """Four ranks, GPU r modulo 2: ranks 0 and 2 on one, 1 and 3 on the other."""
    moved = torch.tensor([100, 1, 200, 2])
    crossing = torch.tensor([[9, 5, 9, 0], [0, 9, 7, 9], [9, 0, 9, 30], [0, 9, 0, 9]])  # 9: stays on a GPU
    assert b.by_device(moved, 2).tolist() == [300, 3]
    assert b.floor_ms(moved, crossing, 1, 1e3, None) == pytest.approx(303.0)
    assert b.floor_ms(moved, crossing, 2, 1e3, 1e3) == pytest.approx(300.0)  # the memory bounds it
    assert b.floor_ms(moved, crossing, 2, 1e3, 1e2) == pytest.approx(350.0)  # 35 bytes from the first GPU to the second
    assert b.bytes_to_others(crossing) == pytest.approx((14 + 16 + 39 + 9) / 4)


def test_limits_belong_to_one_kind_of_work() -> None:
    assert b.limit_ms("dispatch", 16, b.LARGE, 8) == 1.25
    assert b.limit_ms("dispatch", 4, b.LARGE, 8) == 1.75
    assert b.limit_ms("combine", 16, b.SMALL, 8) == 0.40
    assert b.limit_ms("layout", 0, b.LARGE, 8) == 0.040
    assert b.limit_ms("dispatch", 16, b.LARGE, 4) is None
    assert b.limit_ms("dispatch", 8, b.LARGE, 8) is None
    assert b.limit_ms("dispatch", 16, replace(b.LARGE, num_tokens=2048), 8) is None
    assert b.limit_ms("combine", 4, b.LARGE, 8) is None


def test_sms_that_fit_at_the_same_time() -> None:
    assert b.resident_sms((4, 16), 132, 8) == [16, 4]
    assert b.resident_sms((32, 16, 4), 132, 8) == [16, 4]
    assert b.resident_sms((16, 4), 132, 1) == [16, 4]
    assert b.resident_sms((16,), 132, 100) == [2]
