"""The GPU table as text, JSON and a plot."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from deepep_train.cli import bench_report as b
from deepep_train.cli.bench_model import LARGE

H100 = b.Machine("NVIDIA H100 80GB HBM3", 1, 132, "580.1", "2.11", "13.0", "3.12", "here", 8, True, 3.01e12, None)


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


ROWS = [
    b.Row("dispatch bf16, cached", 16, 1.131, 0.98, 1.25, 271.9),
    b.Row("dispatch bf16, cached", 4, 1.9, 0.98, 1.75, 271.9),
    b.Row("get_dispatch_layout", 0, 0.055, None, None, 0.0),
]


def test_the_peer_has_a_column() -> None:
    row = replace(ROWS[0], peer_ms=3.27)
    assert b.line(row).split()[-2:] == ["271.9", "3.270"]
    assert row.as_json()["peer_ms"] == 3.27
    assert b.HEADER.endswith("DeepEP V1")
    assert len(b.line(row)) == len(b.HEADER)


def test_lines_of_the_table() -> None:
    lines = [b.line(row) for row in ROWS]
    assert lines[0].split() == ["dispatch", "bf16,", "cached", "16", "1.131", "0.980", "1.15", "1.250", "met", "271.9"]
    assert lines[1].split()[-3:] == ["1.750", "MISSED", "271.9"]
    assert lines[2].split() == ["get_dispatch_layout", "0.055", "0.0"]
    assert len({len(text) for text in [b.HEADER, *lines]}) == 1


def test_json_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    b.write(H100, LARGE, 5, ROWS, tmp_path)
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
    b.write(H100, LARGE, 5, ROWS, tmp_path)
    assert (tmp_path / "bench.json").exists()
    assert not (tmp_path / "bench.png").exists()
    assert "matplotlib is not installed" in capsys.readouterr().err
