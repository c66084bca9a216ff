"""The GPU table of `bench` as text, JSON and a plot."""

from __future__ import annotations

import datetime
import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deepep_train.cli.bench_model import ALIGNMENT, LIMIT_GPU, Shape

CALLS = 10  # in a round


@dataclass(frozen=True)
class Row:
    """One line of the table: the median over rounds of the slowest rank's time of a call, and what to compare it with."""

    name: str
    sms: int  # a rank; 0 where it makes no difference
    ms: float
    floor_ms: float | None
    limit_ms: float | None
    mb_to_others: float
    peer_ms: float | None = None  # DeepEP V1's on the same work in the same run

    @property
    def ratio(self) -> float | None:
        return None if self.floor_ms is None else self.ms / self.floor_ms

    @property
    def is_met(self) -> bool | None:
        return None if self.limit_ms is None else self.ms <= self.limit_ms

    def as_json(self) -> dict[str, Any]:
        numbers = asdict(self) | {"ratio": self.ratio}
        rounded = {name: round(value, 4) if isinstance(value, float) else value for name, value in numbers.items()}
        return rounded | {"limit_is_met": self.is_met}


@dataclass(frozen=True)
class Machine:
    """What the times were measured on; rates in bytes a second."""

    device: str
    num_devices: int
    sms: int
    driver: str
    torch: str
    cuda: str
    python: str
    host: str
    ranks: int
    mps: bool
    copy_rate: float
    link_rate: float | None

    @property
    def takes_turns(self) -> bool:
        """Whether ranks share a GPU and cannot run at the same time."""
        return self.ranks > self.num_devices and not self.mps

    @property
    def has_limits(self) -> bool:
        """Whether the limits were set for a machine like this one."""
        return self.num_devices == 1 and LIMIT_GPU in self.device and not self.takes_turns


HEADER = f"{'':46s}{'SMs':>4s}{'ms':>9s}{'floor':>8s}{'ratio':>7s}{'limit':>8s}{'':8s}{'MB sent':>9s}{'DeepEP V1':>11s}"


def line(row: Row) -> str:
    """A row under `HEADER`; empty where there is nothing to say."""
    sms = f"{row.sms or '':>4}"
    floor = f"{'':15s}" if row.floor_ms is None else f"{row.floor_ms:8.3f} {row.ratio:6.2f}"
    limit = f"{'':16s}" if row.limit_ms is None else f"{row.limit_ms:8.3f}  {'met' if row.is_met else 'MISSED':6s}"
    peer = "" if row.peer_ms is None else f"{row.peer_ms:.3f}"
    return f"{row.name:46s}{sms}{row.ms:9.3f}{floor}{limit}{row.mb_to_others:9.1f}{peer:>11s}"


def title(machine: Machine, shape: Shape) -> str:
    return (
        f"{machine.ranks} ranks on {machine.num_devices} × {machine.device}, {shape.num_tokens} tokens × {shape.hidden}, "
        f"top-{shape.num_topk} of {shape.num_experts}"
    )


def about(machine: Machine) -> str:
    link = "" if machine.link_rate is None else f", link {machine.link_rate / 1e9:.0f} GB/s one way"
    return (
        f"{machine.sms} SMs a GPU, MPS {'on' if machine.mps else 'off'}, copy {machine.copy_rate / 1e12:.2f} TB/s "
        f"(read + write){link}; driver {machine.driver}, torch {machine.torch}"
    )


def turns_warning(machine: Machine) -> str:
    return (
        f"THESE TIMES MEAN NOTHING: {machine.ranks} ranks share {machine.num_devices} GPU(s) without MPS and take turns; "
        "start MPS with `nvidia-cuda-mps-control -d`"
    )


def write(
    machine: Machine, shape: Shape, rounds: int, rows: Sequence[Row], out: Path, engine: str = "nvlink", mesh: str = ""
) -> None:
    """bench.json and, where matplotlib is installed, bench.png."""
    result = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python -m deepep_train", *sys.argv[1:]]),
        "machine": asdict(machine),
        "ranks": machine.ranks,
        "engine": engine,
        "times_mean_something": not machine.takes_turns,
        "work": asdict(shape) | {"rounds": rounds, "calls": CALLS, "alignment": ALIGNMENT},
        "rows": [row.as_json() for row in rows],
    }
    (out / "bench.json").write_text(json.dumps(result, indent=2) + "\n")
    plt = pyplot()
    if plt is not None:
        plot(plt, title(machine, shape) + mesh, rows, out / "bench.png")
    print(f"wrote {out}/bench.json" + ("" if plt is None else f" and {out}/bench.png"))


def pyplot() -> Any:
    """matplotlib.pyplot, drawing to files; None, with a line that says so, where it is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed (pip install 'deepep_train[recipes]')", file=sys.stderr)
        return None
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plot(plt: Any, heading: str, rows: Sequence[Row], path: Path) -> None:
    """Horizontal bars of the times, the floors as thin bars within them, the limits as ticks."""
    figure, axes = plt.subplots(figsize=(9.5, 1.2 + 0.36 * len(rows)), layout="constrained")
    axes.barh(range(len(rows)), [row.ms for row in rows], height=0.75, color="#8fb3d9", label="measured")
    floors = [(i, row.floor_ms) for i, row in enumerate(rows) if row.floor_ms is not None]
    axes.barh([i for i, _ in floors], [f for _, f in floors], height=0.25, color="#1f4e79", label="floor")
    limits = [(i, row.limit_ms) for i, row in enumerate(rows) if row.limit_ms is not None]
    axes.scatter([f for _, f in limits], [i for i, _ in limits], marker="|", s=250, color="#c0392b", zorder=3, label="limit")
    axes.set_yticks(range(len(rows)), [f"{row.name}, {row.sms} SMs" if row.sms else row.name for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("median time of the slowest rank, ms")
    axes.set_title(heading, fontsize=9)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
