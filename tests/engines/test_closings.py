"""Which ranks have closed a buffer: what an arena's memory waits for before it is freed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Any

import pytest
from needs import need_built

from deepep_train.engines import processes

OTHER = """
import sys
from deepep_train import _C
closings = _C.Closings(3, int(sys.argv[1]), int(sys.argv[2]))
input()
closings.say(2)
print(closings.all(), flush=True)
input()
"""


@pytest.fixture
def kernels() -> Any:
    need_built("_C")
    from deepep_train import _C  # type: ignore[attr-defined]

    return _C


def test_all_ranks_are_heard_wherever_they_are(kernels: Any) -> None:
    """Ranks of this process and of another, which is killed at once: what it has said stays."""
    made = kernels.Closings(3)
    beside = kernels.Closings(3, os.getpid(), made.descriptor)
    command = [sys.executable, "-c", OTHER, str(os.getpid()), str(made.descriptor)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None and child.stdout is not None
        made.say(0)
        child.stdin.write("\n")
        child.stdin.flush()
        assert child.stdout.readline().strip() == "False"
        child.send_signal(signal.SIGKILL)
    made.seal()
    assert not made.all() and not beside.all()
    beside.say(1)
    assert made.all() and beside.all()


def test_a_descriptor_that_is_closed_is_refused(kernels: Any) -> None:
    made = kernels.Closings(2)
    descriptor = made.descriptor
    made.seal()
    assert made.descriptor == -1
    with pytest.raises(RuntimeError, match=f"fd/{descriptor}"):
        kernels.Closings(2, os.getpid(), descriptor)


def test_processes_that_cannot_reach_each_other_have_none(kernels: Any) -> None:
    from deepep_train.engines.node_memory import _closings_of

    made, mine = kernels.Closings(2), processes.identity()
    maker = {"closings": made.descriptor, "identity": mine}
    assert _closings_of(maker, mine, 2) is not None
    assert _closings_of(maker, ["another machine", *mine[1:]], 2) is None
    assert _closings_of(maker, [], 2) is None
    assert _closings_of(maker | {"closings": -1}, mine, 2) is None
