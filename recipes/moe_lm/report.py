"""What a run leaves for people and programs: log.json and loss_curve.png."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from trainer import Trainer

import deepep_train


def environment_of(trainer: Trainer) -> dict[str, Any]:
    """Where the run took place."""
    on_gpu = trainer.world.device.type == "cuda"
    return {
        "ranks": trainer.world.size,
        "expert_parallel": trainer.options.expert_parallel,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "engine": trainer.layers[0].buffer.engine,
        "threads_per_rank": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepep_train": deepep_train.__version__,
        "command": sys.argv,
    }


def arguments_of(options: argparse.Namespace) -> dict[str, Any]:
    """Options as JSON knows them."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}


def write_log(path: Path, log: dict[str, Any]) -> None:
    """Write the file whole or not at all, also when the run is killed."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(log, indent=1) + "\n")
    partial.replace(path)


def plot(path: Path, history: dict[str, list[dict[str, Any]]], unigram_entropy: float) -> None:
    """Loss over steps: training, held-out, and what counting bytes gives."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    steps = [entry["step"] for entry in history["steps"]]
    losses = [entry["loss"] for entry in history["steps"]]
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8, label="training, every step")
    axes.plot(steps, _smooth(losses), color="tab:blue", label="training, smoothed")
    evals = history["evals"]
    axes.plot([e["step"] for e in evals], [e["loss"] for e in evals], "o-", color="tab:orange", label="held-out text")
    entropy = f"unigram entropy of the text, {unigram_entropy:.3f}"
    axes.axhline(unigram_entropy, color="tab:gray", linestyle="--", label=entropy)
    axes.set(title="Byte-level MoE language model", xlabel="optimizer step", ylabel="loss (nats per byte)", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _smooth(values: list[float], reach: int = 10) -> list[float]:
    """Means over up to `reach` neighbours on either side."""
    windows = (values[max(i - reach, 0) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]
