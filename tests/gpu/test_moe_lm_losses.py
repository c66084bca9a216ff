"""recipes/moe_lm on GPUs, in bf16 over nvlink, learns as it does on this machine's CPUs, in float32 over gloo."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TRAIN = Path(__file__).parents[2] / "recipes" / "moe_lm" / "train.py"
SMALL = ["--steps=40", "--batch=2", "--eval-every=40", "--eval-sequences=16", "--save-every=1000", "--sample-bytes=0"]
MOST_APART = 0.01  # of the loss; 0.003 when it was first measured


def losses(ranks: int, device: str, folder: Path) -> list[float]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        str(TRAIN),
        *SMALL,
    ]
    done = subprocess.run(
        [*command, "--device", device, "--out", str(folder)], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    return [row["loss"] for row in json.loads((folder / "log.json").read_text())["history"]["steps"]]


@pytest.mark.parametrize("ranks", [4, 8])
def test_the_losses_are_those_of_the_cpu(ranks: int, tmp_path: Path) -> None:
    gpu, cpu = (losses(ranks, device, tmp_path / device) for device in ("cuda", "cpu"))
    assert len(gpu) == len(cpu) == 40
    print(json.dumps({str(ranks): list(zip(range(1, 41), cpu, gpu, strict=True))}))
    assert gpu == pytest.approx(cpu, rel=MOST_APART)
