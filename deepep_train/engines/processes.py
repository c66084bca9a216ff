"""Whether other processes of this machine still run: after a failure, what tells a rank that died from one that is late."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

_ENDED = ("Z", "X")  # states of /proc/PID/stat: ended, though nobody has taken notice


def identity() -> list[str]:
    """This process, in a form to send to others: the machine's boot, the namespace of process numbers, number, start time.

    Empty where there is no /proc.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        state_and_start = _state_and_start(os.getpid())
        return [boot, os.readlink("/proc/self/ns/pid"), str(os.getpid()), state_and_start[1]]
    except OSError:
        return []


def has_ended(process: Sequence[str]) -> bool:
    """Whether the process of this `identity` is known to have ended; False also where it cannot be seen from here."""
    mine = identity()
    if not mine or not process or mine[:2] != list(process[:2]):
        return False
    try:
        state, start = _state_and_start(int(process[2]))
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return state in _ENDED or start != process[3]


def _state_and_start(pid: int) -> tuple[str, str]:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # the name before may hold anything
    return fields[0], fields[19]
