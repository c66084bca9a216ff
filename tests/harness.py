"""Runs a function on several ranks: processes joined by gloo over 127.0.0.1, with a deadline, so that no test can hang.

A test sends a top-level function and picklable arguments to every rank and gets every rank's result back. The processes
live as long as the pytest session, one pool per number of ranks; a pool in which anything went wrong is killed and the next
test starts a new one. Results are compared in the test's own process, where a mismatch costs no pool.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

HOST = "127.0.0.1"
_START_SECONDS = 90.0  # importing torch on a busy machine
_GRACE_SECONDS = 3.0  # for the other ranks to tell what they saw, once one has failed
_LEAVE_SECONDS = 20.0
_LAST_WORDS = 6000  # characters: torch's tracebacks of C++ are long, and the reason stands before them
# A C++ thread that nobody has joined when its process ends. gloo, left without destroy_process_group, does this now and then,
# more often under load and without this library, too, which starts no C++ threads (docs/troubleshooting.md).
_GLOO_LEAVES = "terminate called without an active exception"


class RankFailure(AssertionError):
    """A rank raised, died or missed the deadline; the text holds every traceback, the first failure first."""


def run_ranks(
    size: int, fn: Callable[..., Any], *args: Any, timeout: float = 60.0, fresh: bool = False, dead: Collection[int] = ()
) -> list[Any]:
    """`[fn(rank, size, group, *args) for rank in range(size)]`, each in its own process.

    Args:
        fn: a top-level function of an importable module.
        args: travel by pickle, and so do the results.
        timeout: seconds until everything is killed and the test fails.
        fresh: use new processes, which afterwards must exit on their own, without destroy_process_group, with status 0, or
            as gloo does (`_GLOO_LEAVES`).
        dead: ranks that are meant to die on the way (with `fresh`); their result is None.
    """
    __tracebackhide__ = True
    if fresh:
        pool = _Pool(size)
        try:
            results = pool.run(fn, args, timeout, dead)
            pool.leave(dead)
        finally:
            pool.kill()
        return results
    assert not dead, "ranks may die only in fresh processes"
    if size not in _pools:
        _pools[size] = _Pool(size)
    try:
        return _pools[size].run(fn, args, timeout)
    except BaseException:
        _pools.pop(size).kill()
        raise


def close_pools() -> None:
    """End every process that `run_ranks` keeps."""
    while _pools:
        _pools.popitem()[1].kill()


def torch_release() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def same_bits(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Whether two tensors have one dtype, shape and content down to the sign of zero and the payload of NaN."""
    if a is None or b is None:
        return a is b
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    # Cloned, since a lone element counts as contiguous whatever its stride is.
    flat = (t.detach().cpu().reshape(-1).clone(memory_format=torch.contiguous_format) for t in (a, b))
    return torch.equal(*(t.view(torch.uint8) for t in flat))


def assert_same_bits(got: torch.Tensor | None, expected: torch.Tensor | None, what: str = "tensor") -> None:
    assert same_bits(got, expected), f"{what}:\n got {_shown(got)}\n expected {_shown(expected)}"


def _shown(t: torch.Tensor | None) -> str:
    return "None" if t is None else f"{t.dtype} {list(t.shape)}\n{t.detach().cpu()}"


# The processes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reply:
    ok: bool
    value: Any  # the result, or the traceback's text


def _pack(value: Any) -> bytes:
    """Tensors travel by value; plain pickle cannot carry FP8."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _unpack(message: bytes) -> Any:
    return torch.load(io.BytesIO(message), weights_only=False)


def _serve(rank: int, size: int, port: int, pipe: connection.Connection, errors: str) -> None:
    """A rank's life: join the others, then run what arrives until the pipe closes. `errors`: a file for what it, and libraries
    that end it, write to the standard error output."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.TCPStore(HOST, port, is_master=False, timeout=timedelta(seconds=_START_SECONDS))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=_START_SECONDS))
    while True:
        try:
            message = pipe.recv_bytes()
        except (EOFError, OSError):
            return
        try:
            fn, args = _unpack(message)
            reply = _pack(_Reply(True, fn(rank, size, dist.group.WORLD, *args)))
        except BaseException:  # noqa: BLE001 - the test must hear of it, whatever it is
            reply = _pack(_Reply(False, traceback.format_exc()))
        pipe.send_bytes(reply)


class _Pool:
    def __init__(self, size: int) -> None:
        # The store lives here, as torchrun's does in its agent: a dying rank does not take it along.
        self._store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
        context = get_context("spawn")
        self._pipes, self._processes = [], []
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, size, self._store.port, there, self._errors(rank)), daemon=True
            )
            process.start()
            there.close()  # so that a dead rank reads as end of file
            self._pipes.append(here)
            self._processes.append(process)
        self._started = False

    def run(self, fn: Callable[..., Any], args: tuple, timeout: float, dead: Collection[int] = ()) -> list[Any]:
        __tracebackhide__ = True
        starting, self._started = not self._started, True
        message = _pack((fn, args))
        replies: dict[int, Any] = {}
        failures: dict[int, str] = {}
        waiting = dict(zip(self._pipes, range(len(self._pipes)), strict=True))
        deadline = time.monotonic() + timeout + (_START_SECONDS if starting else 0)
        try:
            for pipe in self._pipes:
                pipe.send_bytes(message)
        except OSError as error:
            raise RankFailure("a rank had died before the test began") from error
        while waiting:
            ready = connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                late = f"no answer {_GRACE_SECONDS:g} s after that" if failures else f"no answer within {timeout:g} s"
                failures |= dict.fromkeys(waiting.values(), late)
                break
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    reply = _unpack(pipe.recv_bytes())
                except (EOFError, OSError):
                    self._processes[rank].join(_GRACE_SECONDS)
                    reply = _Reply(rank in dead, self._end_of(rank))
                    replies[rank] = None
                else:
                    replies[rank] = reply.value
                if not reply.ok:
                    failures[rank] = reply.value
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        if failures:
            raise RankFailure("\n".join(f"rank {r} of {len(self._pipes)}: {text}" for r, text in failures.items()))
        return [replies[r] for r in range(len(self._pipes))]

    def _errors(self, rank: int) -> str:
        return str(Path(self._folder.name) / f"{rank}.txt")

    def _end_of(self, rank: int) -> str:
        with contextlib.suppress(OSError):
            said = Path(self._errors(rank)).read_text(errors="replace")[-_LAST_WORDS:].strip()
            return f"died with exit code {self._processes[rank].exitcode}" + (f"; its last words:\n{said}" if said else "")
        return f"died with exit code {self._processes[rank].exitcode}"

    def leave(self, dead: Collection[int]) -> None:
        """Every process must exit on its own once it has nothing to do."""
        for pipe in self._pipes:
            pipe.close()
        deadline = time.monotonic() + _LEAVE_SECONDS
        for rank, process in enumerate(self._processes):
            process.join(max(0.0, deadline - time.monotonic()))
            if rank not in dead and process.exitcode != 0:
                end = self._end_of(rank)
                if process.exitcode == -signal.SIGABRT and end.endswith(f"its last words:\n{_GLOO_LEAVES}"):
                    continue
                raise RankFailure(f"rank {rank} did not exit cleanly (exit code None: it hangs): {end}")

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._folder.cleanup()


_pools: dict[int, _Pool] = {}
