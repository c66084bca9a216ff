"""recipes/megatron: the training script on two CPU ranks, and the batch file with stand-ins for SLURM and Megatron-LM."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import slurm_stand_ins

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "megatron"
TINY = ("--hidden", "32", "--ffn", "16", "--sequence", "32", "--micro-batch", "2", "--data", str(RECIPE))


def train(*arguments: str) -> subprocess.CompletedProcess[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*torchrun, str(RECIPE / "pretrain.py"), *TINY, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=150, check=False, cwd=ROOT, env=environment)


def losses(out: Path) -> list[tuple[float, float]]:
    return [(entry["loss"], entry["grad_norm"]) for entry in json.loads((out / "log.json").read_text())["steps"]]


def test_it_learns_and_resumes_where_it_was(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core", reason="megatron-core is not installed (it needs Python 3.12)")
    whole, halves, stock = tmp_path / "whole", tmp_path / "halves", tmp_path / "stock"
    done = train("--steps", "8", "--save-every", "4", "--out", str(whole))
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(whole)[-1][0] < losses(whole)[0][0] - 0.5
    assert "tokens/s" in done.stdout
    assert (whole / "loss_curve.png").read_bytes()[:4] == b"\x89PNG"
    assert train("--steps", "4", "--save-every", "4", "--out", str(halves)).returncode == 0
    again = train("--steps", "8", "--save-every", "4", "--resume", "--out", str(halves))
    assert again.returncode == 0, again.stderr[-3000:]
    assert losses(halves) == losses(whole)  # to the last bit
    assert train("--steps", "8", "--dispatcher", "alltoall", "--out", str(stock)).returncode == 0
    for ours, theirs in zip(losses(whole), losses(stock), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize(("wrong", "text"), [(("--experts", "7"), "--experts 7"), (("--steps", "0"), "--steps")])
def test_wrong_options_are_named(wrong: tuple[str, ...], text: str) -> None:
    pytest.importorskip("megatron.core", reason="megatron-core is not installed (it needs Python 3.12)")
    done = train(*wrong)
    assert done.returncode != 0
    assert text in done.stderr


# The batch file -----------------------------------------------------------------------------------------------------------

# In the place of Megatron-LM's script: reads its arguments with Megatron's own parser, which refuses flags that it does not
# know, and pretends to have trained.
PRETRAIN = """import argparse, os, sys
from pathlib import Path
from megatron.training.arguments import add_megatron_arguments
given = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)).parse_args()
assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
names = ("moe_token_dispatcher_type", "moe_flex_dispatcher_backend", "num_experts", "seq_length", "exit_duration_in_mins")
save = Path(given.save)
save.mkdir(parents=True, exist_ok=True)
(save / "arguments.txt").write_text(" ".join(str(getattr(given, name)) for name in names))
(save / "latest_checkpointed_iteration.txt").write_text(os.environ["REACHED"])
sys.exit(int(os.environ["STATUS"]))
"""


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on one node of one rank, on this machine."""
    megatron = tmp_path / "Megatron-LM"
    megatron.mkdir()
    (megatron / "pretrain_gpt.py").write_text(PRETRAIN)
    wanted = {"MEGATRON": str(megatron), "DATA": "/data/prefix", "TOKENIZER": "/data/tokenizer", "STEPS": "100"}
    return slurm_stand_ins.job(tmp_path, 1) | wanted


def submit(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(RECIPE / "slurm.sbatch"), *arguments]
    env = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=150, check=False, cwd=ROOT, env=env)


@pytest.mark.parametrize(
    ("reached", "status", "restarts", "requeued", "code"),
    [("100", 0, 0, False, 0), ("60", 0, 0, True, 0), ("60", 1, 1, True, 0), ("60", 1, 3, False, 1)],
    ids=["finished", "out of time", "failed", "failed too often"],
)
def test_a_job_ends_or_goes_back_into_the_queue(
    job: dict[str, str], tmp_path: Path, reached: str, status: int, restarts: int, requeued: bool, code: int
) -> None:
    pytest.importorskip("megatron.core", reason="megatron-core is not installed (it needs Python 3.12)")
    more = {"REACHED": reached, "STATUS": str(status), "SLURM_RESTART_COUNT": str(restarts)}
    done = submit(job | more, "--seq-length", "8192")
    assert done.returncode == code, done.stdout + done.stderr
    assert (f"requeue {job['SLURM_JOB_ID']}" in (tmp_path / "scontrol.log").read_text()) == requeued
    passed = (tmp_path / "out" / "arguments.txt").read_text().split()
    assert passed == ["flex", "deepep_train", "256", "8192", "225"]  # the user's sequence length wins


def test_a_node_that_fails_doctor_ends_the_job(job: dict[str, str], tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no engine works here\nexit 1\n")
    python.chmod(0o755)
    done = submit(job | {"PYTHON": str(python)})
    assert done.returncode == 1
    assert "a node cannot run deepep_train" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["MEGATRON", "DATA", "TOKENIZER"])
def test_what_is_missing_is_named(job: dict[str, str], missing: str) -> None:
    del job[missing]
    done = submit(job)
    assert done.returncode != 0
    assert missing in done.stderr


def test_the_batch_file_is_clean() -> None:
    batch = RECIPE / "slurm.sbatch"
    subprocess.run(["bash", "-n", batch], check=True)
    shellcheck = shutil.which("shellcheck") or str(Path(sys.executable).with_name("shellcheck"))
    subprocess.run([shellcheck, batch], check=True)
