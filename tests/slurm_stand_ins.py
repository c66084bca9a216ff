"""A cluster on this machine: `srun` starts the command once per node and passes SIGUSR1 on, `scontrol` writes down what it was
asked."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys
command = sys.argv[1:]
while command[0].startswith("-"):
    command.pop(0)
nodes = []
signal.signal(signal.SIGUSR1, lambda number, frame: [node.send_signal(number) for node in nodes])
for number in range(int(os.environ["SLURM_JOB_NUM_NODES"])):
    nodes.append(subprocess.Popen(command, env={{**os.environ, "SLURM_NODEID": str(number)}}))
sys.exit(max(node.wait() for node in nodes))
"""
SCONTROL = """#!/bin/sh
echo "$@" >>"$SCONTROL_LOG"
if [ "$1" = show ]; then printf 'localhost\\nlocalhost\\n'; fi
"""


def job(folder: Path, nodes: int) -> dict[str, str]:
    """The environment of a job on so many nodes of one rank each; its scontrol writes to `folder`/scontrol.log."""
    stubs = folder / "bin"
    stubs.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)
    return {
        "PATH": f"{stubs}:{os.environ['PATH']}",
        "SCONTROL_LOG": str(folder / "scontrol.log"),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_JOB_NODELIST": f"node[1-{nodes}]",
        "PYTHON": sys.executable,
        "GPUS_PER_NODE": "1",
        "OUT": str(folder / "out"),
    }
