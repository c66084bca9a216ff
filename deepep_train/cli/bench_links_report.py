"""The table of links of `bench` as text, JSON and a plot."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deepep_train.cli.bench_report import CALLS, Machine, pyplot

OURS, NCCL, PEER = "deepep_train", "NCCL all_to_all", "DeepEP V1"
ENOUGH = 0.95  # of the best rate: fewer SMs that reach it are the better choice


@dataclass(frozen=True)
class Row:
    """One line: the median over rounds of the slowest rank's time of a call.

    Attributes:
        graph_ms: of the same call from a CUDA graph, which no Python slows down; None if not measured.
        link_mb, local_mb, floor_ms: see `bench_links.Load`.
    """

    by: str
    operation: str
    num_tokens: int
    hidden: int
    sms: int
    ms: float
    graph_ms: float | None
    link_mb: float
    local_mb: float
    floor_ms: float

    @property
    def best_ms(self) -> float:
        return self.ms if self.graph_ms is None else min(self.ms, self.graph_ms)

    @property
    def link_rate(self) -> float:
        """GB/s."""
        return self.link_mb / self.best_ms


HEADER = (
    f"{'':17s}{'':31s}{'tokens':>7s}{'hidden':>7s}{'SMs':>4s}{'ms':>8s}{'graph':>8s}{'floor':>8s}"
    f"{'link MB':>9s}{'local MB':>9s}{'GB/s':>7s}{'of link':>8s}"
)


def title(machine: Machine) -> str:
    return f"{machine.ranks} ranks on {machine.num_devices} × {machine.device}, one each"


def about_links(both_ways: float) -> str:
    return (
        f"peer copies, every GPU sending and receiving at once: {both_ways / 1e9:.0f} GB/s each way. GB/s: rows to other GPUs "
        "over the time of a call (the graph's if that is shorter); local MB: rows that stay on their GPU"
    )


def line(row: Row, both_ways: float) -> str:
    """A row under `HEADER`."""
    graph = "" if row.graph_ms is None else f"{row.graph_ms:.3f}"
    share = 1e9 * row.link_rate / both_ways
    return (
        f"{row.by:17s}{row.operation:31s}{row.num_tokens:7d}{row.hidden:7d}{row.sms or '':>4}{row.ms:8.3f}{graph:>8s}"
        f"{row.floor_ms:8.3f}{row.link_mb:9.1f}{row.local_mb:9.1f}{row.link_rate:7.0f}{share:8.0%}"
    )


def summary(rows: Sequence[Row], both_ways: float) -> list[str]:
    """For every operation and shape: everyone's best rate, and our fewest SMs that are nearly as good as our best."""
    lines = []
    for key in dict.fromkeys((r.operation, r.num_tokens, r.hidden) for r in rows):
        same = [r for r in rows if (r.operation, r.num_tokens, r.hidden) == key]
        best = {by: max((r for r in same if r.by == by), key=lambda r: r.link_rate) for by in dict.fromkeys(r.by for r in same)}
        parts = [f"{by} {r.link_rate:.0f}" + (f" ({r.sms} SMs)" if r.sms else "") for by, r in best.items()]
        ours = [r.sms for r in same if r.by == OURS and r.link_rate >= ENOUGH * best[OURS].link_rate]
        enough = f"; {ENOUGH:.0%} of it with {min(ours)} SMs" if ours else ""
        what = f"{key[0]}, {key[1]} × {key[2]}"
        lines.append(f"best GB/s over the link ({both_ways / 1e9:.0f}), {what}: {', '.join(parts)}{enough}")
    return lines


def write(machine: Machine, both_ways: float, rounds: int, rows: Sequence[Row], out: Path) -> None:
    """bench_links.json and, where matplotlib is installed, bench_links.png."""
    result = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python -m deepep_train", *sys.argv[1:]]),
        "machine": asdict(machine),
        "peer copies, both ways at once, bytes a second each way": round(both_ways),
        "rounds": rounds,
        "calls": CALLS,
        "rows": [_as_json(row, both_ways) for row in rows],
    }
    (out / "bench_links.json").write_text(json.dumps(result, indent=1) + "\n")
    plt = pyplot()
    if plt is not None:
        plot(plt, title(machine), both_ways, rows, out / "bench_links.png")
    print(f"wrote {out}/bench_links.json" + ("" if plt is None else f" and {out}/bench_links.png"))


def _as_json(row: Row, both_ways: float) -> dict[str, Any]:
    numbers = asdict(row) | {"link_gb_s": row.link_rate, "share_of_link": 1e9 * row.link_rate / both_ways}
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in numbers.items()}


def plot(plt: Any, heading: str, both_ways: float, rows: Sequence[Row], path: Path) -> None:
    """GB/s over SMs, a field for every operation and shape."""
    operations = list(dict.fromkeys(r.operation for r in rows))
    shapes = list(dict.fromkeys((r.num_tokens, r.hidden) for r in rows))
    size = (3.2 * len(operations), 2.6 * len(shapes) + 0.6)
    figure, grid = plt.subplots(len(shapes), len(operations), figsize=size, squeeze=False, sharey=True, layout="constrained")
    for axes, shape in zip(grid, shapes, strict=True):
        for ax, operation in zip(axes, operations, strict=True):
            same = [r for r in rows if r.operation == operation and (r.num_tokens, r.hidden) == shape]
            ax.axhline(both_ways / 1e9, color="black", linewidth=0.8, label="peer copies")
            for by, color in ((OURS, "tab:blue"), (PEER, "tab:orange"), (NCCL, "tab:green")):
                points = sorted((r.sms, r.link_rate) for r in same if r.by == by)
                if points and points[0][0] == 0:
                    ax.axhline(points[0][1], color=color, linestyle="--", label=by)
                elif points:
                    ax.plot(*zip(*points, strict=True), "o-", color=color, label=by)
            ax.set_title(f"{operation}, {shape[0]} × {shape[1]}", fontsize=8)
            ax.set_ylim(bottom=0)
    for ax in grid[-1]:
        ax.set_xlabel("SMs")
    for ax in grid[:, 0]:
        ax.set_ylabel("GB/s to other GPUs")
    grid[0][0].legend(fontsize=7)
    figure.suptitle(heading, fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)
