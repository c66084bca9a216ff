"""recipes/moe_lm over the rdma engine, its ranks as two nodes, beside the nvlink engine; and compute-sanitizer."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from shared import run_ranks
from test_in_process import run
from test_rdma import USABLE

pytestmark = USABLE
RECIPE = Path(__file__).parents[2] / "recipes" / "moe_lm"
MODEL = "--layers 2 --dim 64 --heads 2 --ffn 64 --experts 16 --top-k 3 --batch 2 --seq 64 --warmup 3 --lr 1e-2"
STEPS = 8


def losses(rank: int, size: int, group: dist.ProcessGroup, engine: str, local: int) -> list[float]:
    """Of every step, the mean over the ranks."""
    sys.path.insert(0, str(RECIPE))
    from data import Corpus
    from options import parse
    from trainer import Trainer
    from world import World

    mesh = ["--num-local-ranks", str(local)] if engine == "rdma" else []
    with mock.patch.dict(os.environ, {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}):
        options = parse([*MODEL.split(), "--engine", engine, *mesh])
    device = torch.device("cuda", torch.cuda.current_device())
    trainer = Trainer(options, World(rank, size, device, group, group, None))
    assert trainer.layers[0].buffer.engine == engine
    text = "".join(f"the number {i % 97} follows {i % 97 - 1}; " for i in range(2000)).encode()
    corpus = Corpus(text, options.seq, options.seed)
    found = []
    for number in range(STEPS):
        loss = trainer.step(number, [corpus.batch(number, rank, options.batch)])
        found.append(trainer.share(loss, 1.0, False).loss)
    return found


@pytest.mark.parametrize("mesh", [(8, 4), (4, 2), (2, 1)], ids=str)
def test_moe_lm_learns_alike_over_either_engine(mesh: tuple[int, int]) -> None:
    """Float32 sums by node instead of by rank are all that differs."""
    rdma, nvlink = (run_ranks(mesh[0], losses, engine, mesh[1], timeout=100)[0] for engine in ("rdma", "nvlink"))
    assert rdma == pytest.approx(nvlink, rel=1e-3)
    assert rdma[-1] < rdma[0] - 0.5, "it does not learn"


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="there is no compute-sanitizer on PATH")
def test_racecheck_finds_nothing_over_rdma() -> None:
    """Four processes as two nodes. Not memcheck: under it NVSHMEM 3.8 does not start (docs/rdma.md)."""
    before = ("compute-sanitizer", "--target-processes", "all", "--tool", "racecheck", "--error-exitcode", "9")
    before += ("--report-api-errors", "no")  # NVSHMEM asks the driver for functions that it may lack; ours are exceptions
    before += ("--kernel-name", "kernel_substring=deepep_train")  # not torch's, nor NVSHMEM's own: what is inlined into ours is
    text = run(str(Path(__file__).with_name("two_nodes.py")), before=before, seconds=250, loading="LAZY")
    summaries = re.findall(r"SUMMARY: (\d+)", text)  # of all processes together
    assert summaries and set(summaries) == {"0"}, text[-2000:]
    assert "fine" in text
