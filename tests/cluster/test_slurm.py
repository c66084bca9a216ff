"""tests/cluster/slurm.sbatch on this machine, with stand-ins for SLURM."""

from __future__ import annotations

import os
import socket
import subprocess
import tarfile
from pathlib import Path

import pytest
import slurm_stand_ins

ROOT = Path(__file__).resolve().parents[2]
SBATCH = ROOT / "tests" / "cluster" / "slurm.sbatch"

# A Python that writes down what it is asked to run; `doctor` fails on the node that BROKEN names, the rdma engine on all.
PRETENDER = """#!/bin/sh
echo "$SLURM_NODEID|$RANK|$WORLD_SIZE|$MASTER_ADDR|$*" >>"$ASKED"
case "$*" in
*doctor*) [ "$SLURM_NODEID" != "$BROKEN" ] || { echo "no engine works here"; exit 1; } ;;
*"--engine rdma"*) exit 3 ;;
esac
"""


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on two nodes of one CPU rank each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return slurm_stand_ins.job(tmp_path, 2) | {"DEVICE": "cpu", "PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}


@pytest.fixture
def pretender(tmp_path: Path) -> dict[str, str]:
    path = tmp_path / "python"
    path.write_text(PRETENDER)
    path.chmod(0o755)
    return {"PYTHON": str(path), "ASKED": str(tmp_path / "asked"), "BROKEN": "none"}


def run(job: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SBATCH)], cwd=ROOT, env=os.environ | job, capture_output=True, text=True, timeout=400, check=False
    )


def packed(job: dict[str, str]) -> set[str]:
    with tarfile.open(job["OUT"] + ".tar.gz") as tar:
        return {Path(name).name for name in tar.getnames()} - {"out"}


def test_what_every_node_is_asked(job: dict[str, str], pretender: dict[str, str]) -> None:
    job |= pretender | {"GPUS_PER_NODE": "24"}
    done = run(job)
    assert done.returncode == 1, done.stdout + done.stderr  # the rdma engine's checks fail; the rest goes on
    asked = Path(job["ASKED"]).read_text().splitlines()
    for node in (0, 1):
        mine = [line.split("|", 4) for line in asked if line.startswith(f"{node}|")]
        assert mine[0][4] == "-m deepep_train doctor --need rdma collective"
        assert any("-m pytest" in line[4] and line[4].endswith("tests/gpu") for line in mine)
        internode = [line for line in mine if "test_internode.py" in line[4]]
        assert [line[4].split("--engine ")[1].split()[0] for line in internode] == ["rdma", "collective"]
        assert any(line[4].endswith(f"bench --deadline 590 --out {job['OUT']}/bench-{node}") for line in mine)
        for line in internode:
            assert line[1:4] == [str(node), "2", "localhost"]
            assert "--device cpu --num-processes 24 --num-experts 288 " in line[4]  # 48 ranks
    assert sum("plan --nodes 2 --gpus-per-node 24 --num-experts 288" in line for line in asked) == 1
    assert "across-rdma: FAILED with status 3" in done.stdout and "across-collective: done" in done.stdout
    logs = {"doctor", "network", "plan", "bench", "suite", "across-rdma", "across-collective"}
    assert packed(job) == {f"{name}.log" for name in logs} | {"summary.txt"}


def test_a_node_that_fails_doctor_ends_the_job(job: dict[str, str], pretender: dict[str, str]) -> None:
    done = run(job | pretender | {"BROKEN": "1"})
    assert done.returncode == 1
    assert "no engine works here" in done.stderr and "nothing else was started" in done.stderr
    assert "pytest" not in Path(pretender["ASKED"]).read_text()
    assert packed(job) == {"doctor.log"}


@pytest.mark.parametrize(("engines", "asked"), [("rdma", "rdma ibgda"), ("collective", "collective")])
def test_rdma_is_to_put_from_gpus(job: dict[str, str], pretender: dict[str, str], engines: str, asked: str) -> None:
    done = run(job | pretender | {"DEVICE": "cuda", "ENGINES": engines, "PARTS": "doctor"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "puts of rdma: NVSHMEM_IB_ENABLE_IBGDA=1" in done.stdout
    lines = Path(pretender["ASKED"]).read_text().splitlines()
    assert len(lines) == 2 and all(line.endswith(f"doctor --need {asked}") for line in lines)


def test_two_nodes_for_real(job: dict[str, str]) -> None:
    """Two processes of a CPU rank each meet as SLURM's tasks do."""
    done = run(job | {"ENGINES": "collective", "PARTS": "plan across", "SIZES": "--num-tokens 20 --hidden 128", "EXPERTS": "8"})
    assert done.returncode == 0, done.stdout + done.stderr
    log = (Path(job["OUT"]) / "across-collective.log").read_text()
    assert "2 ranks, 2 nodes, collective engine" in log and log.count("passed") == 23
    assert "2 nodes x 1 GPUs, 20 tokens x 128 a GPU, top-8 of 8 experts" in (Path(job["OUT"]) / "plan.log").read_text()
