"""recipes/megatron: the training script on two CPU ranks, and the batch file with stand-ins for SLURM and Megatron-LM."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import slurm_stand_ins

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "megatron"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
TINY = ("--hidden", "32", "--ffn", "16", "--sequence", "32", "--micro-batch", "2", "--data", str(RECIPE))


def train(*arguments: str, launcher: tuple[str, ...] = TORCHRUN, **more: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | more
    command = [sys.executable, *launcher, str(RECIPE / "pretrain.py"), *TINY, *arguments]
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
    shutil.copytree(whole, halves)
    for left in (halves / "step-00000008", halves / "log.json"):  # as if it had been stopped after step 4
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    again = train("--steps", "8", "--save-every", "4", "--resume", "--out", str(halves))
    assert again.returncode == 0, again.stderr[-3000:]
    assert losses(halves) == losses(whole)  # to the last bit
    assert train("--steps", "8", "--dispatcher", "alltoall", "--out", str(stock)).returncode == 0
    for ours, theirs in zip(losses(whole), losses(stock), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize(("wrong", "text"), [(("--experts", "7"), "--experts 7"), (("--steps", "0"), "--steps")])
def test_wrong_options_are_named(wrong: tuple[str, ...], text: str) -> None:
    pytest.importorskip("megatron.core", reason="megatron-core is not installed (it needs Python 3.12)")
    done = train(*wrong, launcher=(), WORLD_SIZE="2")  # as a rank of two; options are read before they meet
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


def test_a_job_trains_with_megatrons_flags_and_ends(job: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("megatron.core", reason="megatron-core is not installed (it needs Python 3.12)")
    done = submit(job | {"REACHED": "100", "STATUS": "0"}, "--seq-length", "8192")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "finished at step 100" in done.stdout
    passed = (tmp_path / "out" / "arguments.txt").read_text().split()
    assert passed == ["flex", "deepep_train", "256", "8192", "225"]  # the user's sequence length wins


# In the place of Python: a doctor who is content, a training that does nothing else than to save.
QUICK = """#!/bin/sh
case "$*" in *doctor*) exit 0 ;; esac
echo "$REACHED" >"$OUT/latest_checkpointed_iteration.txt"
exit "$STATUS"
"""


@pytest.mark.parametrize(
    ("saved", "reached", "status", "restarts", "stalled", "then"),
    [
        (0, 60, 0, 0, 0, 0),
        (0, 60, 1, 3, 3, 0),
        (60, 60, 1, 0, 3, 1),
        (60, 60, 1, 7, 2, 3),
        (60, 60, 1, 4, 3, "gives up"),
        (60, 60, 0, 4, 3, "gives up"),
        (120, 120, 0, 4, 3, "ends"),
    ],
    ids=["out of time", "failed further on", "earlier job stalled", "failed again", "failed", "saves nothing", "has more"],
)
def test_a_job_goes_back_into_the_queue(
    job: dict[str, str], tmp_path: Path, saved: int, reached: int, status: int, restarts: int, stalled: int, then: Any
) -> None:
    """`saved` and `stalled` are what it finds, `then` how often in a row it has stalled when it is requeued."""
    out, python = tmp_path / "out", tmp_path / "python"
    out.mkdir()
    (out / "latest_checkpointed_iteration.txt").write_text(str(saved))
    (out / "stalled").write_text(str(stalled))
    python.write_text(QUICK)
    python.chmod(0o755)
    more = {"REACHED": str(reached), "STATUS": str(status), "SLURM_RESTART_COUNT": str(restarts), "PYTHON": str(python)}
    done = submit(job | more)
    assert done.returncode == (1 if then == "gives up" else 0), done.stdout + done.stderr
    is_requeued = f"requeue {job['SLURM_JOB_ID']}" in (tmp_path / "scontrol.log").read_text()
    assert is_requeued == isinstance(then, int)
    assert not is_requeued or (out / "stalled").read_text().split() == [str(then)]


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ("--train-iters=500", "set STEPS in place of --train-iters"),
        ("--save", "set OUT in place of --save"),
        ("STEPS=0100", "STEPS=0100 must be"),
        ("RETRIES=none", "RETRIES=none must be"),
        ("LAYERS=3", "LAYERS=3 must be a whole number, 4 or more"),
    ],
)
def test_what_would_never_end_is_refused(job: dict[str, str], tmp_path: Path, wrong: str, text: str) -> None:
    name, _, value = wrong.partition("=")
    done = submit(job, wrong) if wrong.startswith("-") else submit(job | {name: value})
    assert done.returncode == 2
    assert text in done.stderr
    assert not (tmp_path / "scontrol.log").exists()


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
