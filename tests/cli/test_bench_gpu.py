"""The GPU table's arithmetic, text and processes: all that needs no GPU."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from deepep_train import DeepEPError
from deepep_train.cli import bench_gpu as b

# Two ranks with two experts each. Rank 0: token 0 to both experts of rank 0, token 1 to both ranks, token 2 to rank 1 only.
# Rank 1: token 0 to both experts of rank 1, token 1 to rank 0.
TINY = (torch.tensor([[0, 1], [0, 2], [-1, 3]]), torch.tensor([[2, 3], [1, -1]]))
H100 = b.Machine("NVIDIA H100 80GB HBM3", 1, 132, "580.1", "2.11", "13.0", "3.12", "here", 8, True, 3.01e12, None)


def test_traffic_counts_rows() -> None:
    t = b.traffic(TINY, 4)
    assert t.sent.tolist() == [3, 2]
    assert t.from_to.tolist() == [[2, 2], [1, 1]]
    assert t.received.tolist() == [3, 3]
    assert t.expert_rows.tolist() == [4, 4]
    assert t.several.tolist() == [1, 1]
    assert t.grouped.tolist() == [2, 2]


def test_every_row_is_read_once_and_written_once() -> None:
    """Rank 0: 3 tokens out, 3 rows in, of which one has a copy for its second expert."""
    moved = {name: rows.tolist() for name, rows in b.rows_moved(b.traffic(TINY, 4)).items()}
    assert moved == {
        "dispatch": [6, 5],
        "combine": [6, 5],
        "combine any": [6 + 2 * 3, 5 + 2 * 3],
        "expert dispatch": [6 + 2, 5 + 2],
        "expert combine": [6 + 3, 5 + 3],  # two rows read and their sum written before it is pulled
        "expert combine any": [6 + 4 + 3, 5 + 4 + 3],
    }


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
        ("expert combine any", 3.06),
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


def test_machines_that_the_limits_are_for() -> None:
    assert H100.has_limits
    assert not H100.takes_turns
    turns = replace(H100, mps=False)
    assert turns.takes_turns
    assert not turns.has_limits
    assert "MEAN NOTHING" in b.turns_warning(turns)
    eight = replace(H100, num_devices=8, mps=False, link_rate=4e11)
    assert not eight.takes_turns
    assert not eight.has_limits
    assert "link 400 GB/s" in b.about(eight)
    assert not replace(H100, device="NVIDIA H200").has_limits


def test_sms_that_fit_at_the_same_time() -> None:
    assert b.resident_sms((4, 16), 132, 8) == [16, 4]
    assert b.resident_sms((32, 16, 4), 132, 8) == [16, 4]
    assert b.resident_sms((16, 4), 132, 1) == [16, 4]
    assert b.resident_sms((16,), 132, 100) == [2]


ROWS = [
    b.Row("dispatch bf16, cached", 16, 1.131, 0.98, 1.25, 271.9),
    b.Row("dispatch bf16, cached", 4, 1.9, 0.98, 1.75, 271.9),
    b.Row("get_dispatch_layout", 0, 0.055, None, None, 0.0),
]


def test_lines_of_the_table() -> None:
    lines = [b.line(row) for row in ROWS]
    assert lines[0].split() == ["dispatch", "bf16,", "cached", "16", "1.131", "0.980", "1.15", "1.250", "met", "271.9"]
    assert lines[1].split()[-3:] == ["1.750", "MISSED", "271.9"]
    assert lines[2].split() == ["get_dispatch_layout", "0.055", "0.0"]
    assert len({len(text) for text in [b.HEADER, *lines]}) == 1


def test_json_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    b.write(H100, b.LARGE, 5, ROWS, tmp_path)
    result = json.loads((tmp_path / "bench.json").read_text())
    assert result["machine"]["driver"] == "580.1"
    assert result["ranks"] == 8
    assert result["times_mean_something"]
    assert [row["limit_is_met"] for row in result["rows"]] == [True, False, None]
    assert result["rows"][0]["ratio"] == pytest.approx(1.1541)
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert "bench.png" in capsys.readouterr().out


def test_without_matplotlib_there_is_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(b.importlib.util, "find_spec", lambda name: None)
    b.write(H100, b.LARGE, 5, ROWS, tmp_path)
    assert (tmp_path / "bench.json").exists()
    assert not (tmp_path / "bench.png").exists()
    assert "matplotlib is not installed" in capsys.readouterr().err


def test_without_mps_control_its_pipe_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    assert not b.mps_is_running()
    (tmp_path / "control").touch()
    assert b.mps_is_running()
    program = tmp_path / "nvidia-cuda-mps-control"
    program.write_text("#!/bin/sh\necho Cannot find MPS control daemon process\nexit 1\n")
    program.chmod(0o755)
    assert not b.mps_is_running()


# Processes --------------------------------------------------------------------------------------------------------------


def only_rank_1_fails() -> None:
    if dist.get_rank() == 1:
        raise RuntimeError("the bridge is out")
    time.sleep(300)


def waits_for_ever() -> None:
    time.sleep(300)


def test_a_failing_rank_ends_the_others(capfd: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    with pytest.raises(DeepEPError, match="rank 1 failed first"):
        b.spawn(2, only_rank_1_fails, (), 120.0, use_cuda=False)
    assert time.monotonic() - start < 100
    assert "[rank 1] RuntimeError: the bridge is out" in capfd.readouterr().err


def test_the_deadline_ends_all_ranks(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DeepEPError, match=r"ranks \[0, 1\] had not finished after 15 s"):
        b.spawn(2, waits_for_ever, (), 15.0, use_cuda=False)
    assert "waits_for_ever" in capfd.readouterr().err  # where they were
