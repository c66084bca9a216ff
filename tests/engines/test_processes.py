from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deepep_train.engines import processes

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="there is no /proc")
SHOW = "from deepep_train.engines import processes; print(*processes.identity(), flush=True); input()"


def test_this_process_has_not_ended() -> None:
    assert not processes.has_ended(processes.identity())


def test_a_process_that_was_killed_has_ended_even_before_its_parent_noticed() -> None:
    child = subprocess.Popen([sys.executable, "-c", SHOW], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    who = child.stdout.readline().split()
    assert who[2] == str(child.pid)
    assert not processes.has_ended(who)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert processes.has_ended(who)
    child.communicate()
    assert processes.has_ended(who)


def test_another_process_of_the_same_number_is_not_taken_for_it() -> None:
    boot, namespace, number, start = processes.identity()
    assert processes.has_ended([boot, namespace, number, str(int(start) - 1)])


def test_what_cannot_be_seen_is_not_said_to_have_ended() -> None:
    _, namespace, _, start = processes.identity()
    assert not processes.has_ended(["another machine", namespace, "999999999", start])
    assert not processes.has_ended([])
