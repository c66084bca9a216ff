"""The table of links: bytes against numbers counted by hand, and its text, JSON and plot from made-up times."""

from __future__ import annotations

import argparse
import json
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deepep_train import compat
from deepep_train.cli import bench, bench_peer
from deepep_train.cli import bench_links as b
from deepep_train.cli import bench_links_report as r
from deepep_train.cli.bench_model import Shape, traffic, traffic_of
from deepep_train.cli.bench_report import Machine

TWO = Machine("NVIDIA H100 80GB HBM3", 2, 132, "580.1", "2.11", "13.0", "3.12", "here", 2, False, 3.0e12, 3.5e11)
RATE = 3.5e11


def test_only_rows_for_other_gpus_count_as_link_bytes() -> None:
    """Three tokens of rank 0: to itself, to both ranks, to rank 1; two of rank 1: to itself, to rank 0."""
    t = traffic((torch.tensor([[0, 1], [0, 2], [-1, 3]]), torch.tensor([[2, 3], [1, -1]])), 4)
    there, back = (b.load_of(t, key, 100, 1e6, 1e3) for key in ("dispatch", "combine"))
    assert (there.link, there.local) == (200, 150)  # two rows leave rank 0, one leaves rank 1
    assert (back.link, back.local) == (200, 150)  # and they come back to it
    assert there.floor_ms == pytest.approx(200.0)
    assert b.load_of(t, "dispatch", 100, 1e3, 1e6).floor_ms == pytest.approx(600.0)  # 3 rows read and 3 written bound it


def test_with_two_ranks_nearly_every_token_goes_to_both() -> None:
    shape = Shape(4096, 7168, 256, 8)
    load = b.load_of(traffic_of(shape, 2), "dispatch", 14336, 3e12, RATE)
    for part in (load.link, load.local):
        assert 4096 * 14336 * 0.99 < part <= 4096 * 14336


def test_the_arena_holds_what_graphs_keep() -> None:
    traffic = {shape: traffic_of(shape, 2) for shape in (Shape(4096, 7168, 256, 8), Shape(8192, 7168, 256, 8))}
    rows = 3 * 4096 * 14336 * 2  # received, both shapes
    assert 2 * 5 * 2 * rows * 0.99 < b.arena_bytes(traffic, 5) * 3 // 4 < 40e9


ROWS = [
    r.Row(r.NCCL, "dispatch bf16, cached", 4096, 7168, 0, 0.25, None, 58.5, 58.4, 0.17),
    r.Row(r.OURS, "dispatch bf16, cached", 4096, 7168, 4, 0.30, 0.29, 58.5, 58.4, 0.17),
    r.Row(r.OURS, "dispatch bf16, cached", 4096, 7168, 8, 0.21, 0.181, 58.5, 58.4, 0.17),
    r.Row(r.OURS, "dispatch bf16, cached", 4096, 7168, 16, 0.19, 0.18, 58.5, 58.4, 0.17),
    r.Row(r.PEER, "dispatch bf16, cached", 4096, 7168, 16, 0.39, None, 58.5, 58.4, 0.17),
    r.Row(r.OURS, "dispatch bf16, fresh", 4096, 7168, 16, 0.39, None, 58.5, 58.4, 0.17),
]


def test_lines_and_summary() -> None:
    words = r.line(ROWS[3], RATE).split()
    assert words[-8:] == ["16", "0.190", "0.180", "0.170", "58.5", "58.4", "325", "93%"]
    assert len({len(text) for text in [r.HEADER, *(r.line(row, RATE) for row in ROWS)]}) == 1
    first, second = r.summary(ROWS, RATE)
    assert "NCCL all_to_all 234, deepep_train 325 (16 SMs), DeepEP V1 150 (16 SMs); 95% of it with 8 SMs" in first
    assert "fresh" in second


def test_json_and_plot(tmp_path: Path) -> None:
    rows = ROWS + [replace(row, hidden=2048, link_mb=16.7) for row in ROWS]
    r.write(TWO, RATE, 5, rows, tmp_path)
    result = json.loads((tmp_path / "bench_links.json").read_text())
    assert result["machine"]["num_devices"] == 2
    assert result["rows"][3]["link_gb_s"] == pytest.approx(325.0)
    assert result["rows"][3]["share_of_link"] == pytest.approx(0.9286, abs=1e-4)
    assert (tmp_path / "bench_links.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("gpus", "ranks", "asked", "table"),
    [(2, None, None, "links"), (2, 2, None, "links"), (2, 8, None, "gpu"), (1, None, None, "gpu"), (2, None, "gpu", "gpu")],
)
def test_the_table_follows_from_the_gpus(
    monkeypatch: pytest.MonkeyPatch, gpus: int, ranks: int | None, asked: str | None, table: str
) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert bench._table(argparse.Namespace(num_processes=ranks, table=asked)) == table


# DeepEP V1 --------------------------------------------------------------------------------------------------------------


def test_the_peer_is_the_one_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"--peer .*cannot be imported"):
        bench_peer.load(tmp_path)
    compat.install()
    try:
        with pytest.raises(ValueError, match=r"gave deepep_train.compat instead"):
            bench_peer.load(tmp_path)
    finally:
        compat.uninstall()
    package = tmp_path / "deep_ep"
    package.mkdir()
    (package / "__init__.py").write_text("import deep_ep_cpp\n")
    monkeypatch.setitem(sys.modules, "deep_ep_cpp", types.ModuleType("deep_ep_cpp"))
    path = list(sys.path)
    assert bench_peer.load(tmp_path).__file__ == str(package / "__init__.py")
    assert sys.path == path
    del sys.modules["deep_ep"]
