"""recipes/moe_lm as its users run it: under torchrun, with small models."""

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

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "moe_lm"
SMALL = (
    "--layers 2 --dim 16 --heads 2 --ffn 16 --batch 2 --seq 32 --warmup 5 --eval-every 4 --eval-sequences 4 --sample-bytes 8"
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text that a model can learn something of."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"the number {i % 97} follows {i % 97 - 1}; " for i in range(2000)))
    return path


def _command(ranks: int, *args: object) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, *(torchrun if ranks else []), str(RECIPE / "train.py"), *SMALL.split(), *map(str, args)]


def _train(ranks: int, *args: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """0 ranks: without torchrun."""
    done = subprocess.run(_command(ranks, *args), capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def _log(out: Path) -> dict:
    return json.loads((out / "log.json").read_text())


def _losses(out: Path) -> list[float]:
    return [entry["loss"] for entry in _log(out)["history"]["steps"]]


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 8 steps on 2 ranks."""
    out = tmp_path_factory.mktemp("whole")
    _train(2, "--data", text, "--out", out, "--steps", 8, "--save-every", 3)
    return out


def test_a_run_leaves_what_it_promises(whole: Path) -> None:
    log = _log(whole)
    assert log["finished"] and len(log["history"]["steps"]) == 8 and log["history"]["evals"][-1]["step"] == 8
    assert log["text"]["unigram_entropy"] > 1
    for entry in log["history"]["steps"]:
        assert entry["tokens_per_second"] > 0 and len(entry["load_balance"]) == 2 and min(entry["load_balance"]) >= 1
    assert (whole / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert (whole / "sample.txt").stat().st_size > 0
    assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == ["step-00000006", "step-00000008"]


def test_resume_is_the_uninterrupted_run(whole: Path, text: Path, tmp_path: Path) -> None:
    _train(2, "--data", text, "--out", tmp_path, "--steps", 5, "--save-every", 100)
    _train(2, "--data", text, "--out", tmp_path, "--steps", 8, "--save-every", 100, "--resume")
    assert _losses(tmp_path) == _losses(whole)  # to the bit: JSON keeps every digit of a float
    assert _log(tmp_path)["saved"][-1]["fingerprint"] == _log(whole)["saved"][-1]["fingerprint"]
    assert _log(tmp_path)["resumed"]["step"] == 5


@pytest.mark.parametrize("ranks", [0, 4])
def test_another_number_of_ranks_loads_the_same_bits(whole: Path, text: Path, tmp_path: Path, ranks: int) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    _train(ranks, "--data", text, "--out", tmp_path, "--steps", 9, "--resume")
    log = _log(tmp_path)
    # The fingerprint covers every bit of parameters, buffers and optimizer state.
    assert log["resumed"] == {"step": 8, "fingerprint": _log(whole)["saved"][-1]["fingerprint"]}
    assert len(log["history"]["steps"]) == 9


def test_check_agrees_with_one_process(text: Path) -> None:
    done = _train(2, "--data", text, "--check")
    verdict = done.stdout.splitlines()[-1]
    assert "agree" in verdict and done.stdout.count("\n") >= 20


def test_replicas_of_experts_train(text: Path, tmp_path: Path) -> None:
    _train(4, "--data", text, "--out", tmp_path, "--steps", 3, "--expert-parallel", 2)
    assert _log(tmp_path)["finished"]


def test_a_signal_saves_and_resume_goes_on(whole: Path, text: Path, tmp_path: Path) -> None:
    command = _command(2, "--data", text, "--out", tmp_path, "--steps", 100000, "--save-every", 100000)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if "held-out loss" in line:
                break
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout.split()
        os.kill(int(children[-1]), signal.SIGUSR1)  # one rank alone: it has to tell the other
        rest = process.stdout.read()
        assert process.wait(timeout=60) == 0, rest
    finally:
        process.kill()
    log = _log(tmp_path)
    steps = len(log["history"]["steps"])
    assert not log["finished"] and steps < 100000
    _train(2, "--data", text, "--out", tmp_path, "--steps", steps + 1, "--resume")
    common = min(8, steps + 1)
    assert _losses(tmp_path)[:common] == _losses(whole)[:common]


BROKEN = {
    "no such file": (2, ["--data", "/nowhere/at/all"], "/nowhere/at/all"),
    "too short": (2, ["--data", str(RECIPE / "README.md"), "--seq", "100000"], "--seq 100000"),
    "experts and ranks": (2, ["--experts", "7"], "--experts 7"),
    "unknown option": (0, ["--frobnicate"], "--frobnicate"),
    "not a number": (0, ["--steps", "many"], "many"),
    "zero": (0, ["--batch", "0"], "--batch"),
    "top-k": (0, ["--top-k", "99"], "--top-k 99"),
    "heads": (0, ["--heads", "3"], "--heads 3"),
    "out is a file": (0, ["--out", str(RECIPE / "README.md")], "README.md"),
    "expert-parallel": (0, ["--expert-parallel", "3"], "--expert-parallel 3"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_input_ends_in_one_line(name: str) -> None:
    ranks, args, named = BROKEN[name]
    done = _train(ranks, "--steps", 1, *args, code=1 if ranks else 2)  # torchrun makes every failure a 1
    said = [line for line in done.stderr.splitlines() if "train.py: error:" in line]
    assert len(said) == 1 and named in said[0]
    assert f'File "{RECIPE}' not in done.stderr  # torchrun prints a traceback of its own, but there is none from inside


def test_a_checkpoint_of_another_model_is_refused(whole: Path, text: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    done = _train(0, "--data", text, "--out", tmp_path, "--ffn", 24, "--resume", code=2)
    said = [line for line in done.stderr.splitlines() if line.startswith("train.py: error:")]
    assert len(said) == 1 and "another model" in said[0]


# SLURM ---------------------------------------------------------------------------------------------------------------

STUBS = {
    # Runs the command here and passes USR1 on to everything it started, as SLURM does for a step.
    "srun": """
while [ "${1#--}" != "$1" ]; do shift; done
setsid "$@" & child=$!
trap 'kill -USR1 -- -$child' USR1
while kill -0 $child 2>/dev/null; do wait $child; code=$?; done
exit $code
""",
    "scontrol": """
case $1 in show) echo localhost ;; requeue) echo "requeued $2" ;; esac
""",
}


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """An environment in which this machine is a cluster of one node."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in STUBS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}")
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "localhost", "SLURM_SUBMIT_DIR": str(ROOT)}
    job |= {"SLURM_NODEID": "0"}
    here = {"OUT": str(tmp_path / "out"), "PYTHON": sys.executable, "GPUS_PER_NODE": "2", "DEVICE": "cpu"}
    return os.environ | job | here | {"PATH": f"{folder}:{os.environ['PATH']}"}


def test_the_batch_file_is_clean() -> None:
    scripts = [RECIPE / "slurm.sbatch", RECIPE / "node.sh"]
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)
    shellcheck = shutil.which("shellcheck") or str(Path(sys.executable).with_name("shellcheck"))
    subprocess.run([shellcheck, *scripts], check=True)


def test_the_batch_file_trains_is_preempted_and_goes_on(cluster: dict[str, str], text: Path, tmp_path: Path) -> None:
    batch = ["bash", str(RECIPE / "slurm.sbatch"), *SMALL.split(), "--data", str(text)]
    log = tmp_path / "job.log"
    with log.open("w") as file:
        job = subprocess.Popen([*batch, "--steps", "100000"], env=cluster, stdout=file, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 120
        while "held-out loss" not in log.read_text():
            assert time.monotonic() < deadline and job.poll() is None, log.read_text()
            time.sleep(0.2)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(timeout=90) == 0, log.read_text()
    finally:
        job.kill()
    assert "requeued 4711" in log.read_text()
    steps = len(_log(tmp_path / "out")["history"]["steps"])
    again = [*batch, "--steps", str(steps + 2)]
    done = subprocess.run(again, env=cluster, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed" in done.stdout and "engines collective" in done.stdout + done.stderr
    assert "requeued" not in done.stdout and _log(tmp_path / "out")["finished"]


def test_a_node_that_is_not_fit_stops_the_job(cluster: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "bin" / "python-without-anything").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin" / "python-without-anything").chmod(0o755)
    broken = cluster | {"PYTHON": str(tmp_path / "bin" / "python-without-anything")}
    done = subprocess.run(
        ["bash", RECIPE / "slurm.sbatch"], env=broken, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1 and "a node cannot run deepep_train" in done.stderr


def test_text_from_a_checkpoint_on_another_number_of_ranks(whole: Path, tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    script = str(RECIPE / "generate.py")
    command = [sys.executable, *torchrun, script, "--folder", str(whole), "--bytes", "12", "--exchange", "both"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 8, low-latency exchange on 4 rank(s)" in done.stdout and "the same text for 12 of 12 bytes" in done.stdout
    command = [sys.executable, script, "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and "is not what train.py leaves" in done.stderr
