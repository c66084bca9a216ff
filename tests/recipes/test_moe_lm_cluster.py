"""recipes/moe_lm where test_moe_lm.py does not reach: two nodes under SLURM, and a `--check` that has to fail."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import slurm_stand_ins
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "moe_lm"
TINY = (
    *("--data", str(RECIPE), "--layers", "2", "--dim", "16", "--heads", "2", "--ffn", "16", "--seq", "32", "--batch", "2"),
    *("--warmup", "4", "--eval-every", "5", "--eval-sequences", "5", "--sample-bytes", "8"),
)


def _start(arguments: list[str], env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    pipe = subprocess.PIPE
    return subprocess.Popen(arguments, stdout=pipe, stderr=pipe, text=True, cwd=ROOT, env=env, start_new_session=True)


def _finish(arguments: list[str], env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    process = _start(arguments, env)
    try:
        out, err = process.communicate(timeout=150)
    finally:
        _end(process)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def _end(process: subprocess.Popen[str]) -> None:
    """Ask what is left of the command and its children to end, then make it. The ranks are in sessions of their own, where
    only torchrun reaches them: it must have time to."""
    for number, seconds in ((signal.SIGTERM, 40), (signal.SIGKILL, 5)):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            process.poll()
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                return
            time.sleep(1)


# --check: the experts' gradient stays a sum over the ranks where it should be the mean, which one process cannot get wrong.
WRONG = """
    def _reduce_dense_only(self):
        for p in moe.dense_parameters(self.model):
            dist.all_reduce(p.grad, group=self.world.everyone)
            p.grad /= self.world.size
"""


def test_check_sees_a_wrong_gradient(tmp_path: Path) -> None:
    recipe = tmp_path / "moe_lm"
    shutil.copytree(RECIPE, recipe)
    trainer = (recipe / "trainer.py").read_text()
    right = "moe.reduce_gradients(self.model, self.world.everyone, self.world.replicas)"
    assert right in trainer
    (recipe / "trainer.py").write_text(trainer.replace(right, "self._reduce_dense_only()") + WRONG)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = _finish([*torchrun, str(recipe / "train.py"), *TINY, "--device", "cpu", "--check"])
    assert done.returncode != 0
    assert "losses and gradients DISAGREE" in done.stdout, done.stdout + done.stderr


SBATCH = ["bash", str(RECIPE / "slurm.sbatch"), *TINY]


@pytest.fixture
def two_nodes(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on two nodes of one rank each, all on this machine."""
    return slurm_stand_ins.job(tmp_path, 2) | {"DEVICE": "cpu"}


def test_two_nodes_are_preempted_and_one_process_reads_the_same_bits(two_nodes: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = _start([*SBATCH, "--steps", "100000", "--save-every", "5"], two_nodes)
    try:
        deadline = time.monotonic() + 120
        while not list(out.glob("checkpoints/step-*5")):
            assert job.poll() is None, "".join(job.communicate())
            assert time.monotonic() < deadline, "no checkpoint in time"
            time.sleep(0.1)
        job.send_signal(signal.SIGUSR1)
        text, err = job.communicate(timeout=60)
    finally:
        _end(job)
    assert job.returncode == 0, text + err
    assert "starting afresh" in text  # --resume of a job that never ran
    assert (tmp_path / "scontrol.log").read_text().splitlines()[-1] == f"requeue {os.getpid()}"
    log = json.loads((out / "log.json").read_text())
    steps = len(log["history"]["steps"])
    assert log["environment"]["ranks"] == 2 and log["arguments"]["expert_parallel"] == 1  # the nodes are replicas
    assert log["saved"][-1]["step"] == steps

    dcp_to_torch_save(out / "checkpoints" / f"step-{steps:08d}", tmp_path / "whole.pt")
    weights = torch.load(tmp_path / "whole.pt", weights_only=False)["model"]
    assert weights["blocks.0.moe.experts.w1"].shape == (8, 16, 32)  # all experts, each once

    alone = [sys.executable, str(RECIPE / "train.py"), *TINY, "--device", "cpu", "--out", str(out)]
    again = _finish([*alone, "--resume", "--steps", str(steps + 1)])
    assert again.returncode == 0, again.stdout + again.stderr
    assert json.loads((out / "log.json").read_text())["resumed"] == log["saved"][-1]


def test_a_node_that_fails_doctor_ends_the_job(two_nodes: dict[str, str], tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no engine works here\nexit 1\n")
    python.chmod(0o755)
    done = _finish(SBATCH, two_nodes | {"PYTHON": str(python)})
    assert done.returncode == 1
    assert "a node cannot run deepep_train" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_node_script_is_clean() -> None:
    shellcheck = shutil.which("shellcheck") or str(Path(sys.executable).with_name("shellcheck"))
    subprocess.run([shellcheck, RECIPE / "node.sh"], check=True)
