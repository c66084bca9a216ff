"""The low-latency kernels with N ranks as threads and streams of one process, see in_process.py.

CUDA_MODULE_LOADING=EAGER CUDA_DEVICE_MAX_CONNECTIONS=32 PYTHONPATH=tests python tests/gpu/low_latency_in_process.py \
    [ranks] [cases] [iterations of the soak]
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import low_latency_ranks as ranks
import torch
from in_process import Threads, fill_cache, in_threads
from low_latency_cases import KINDS, STYLES, Case, finish, round_trip
from low_latency_masks import mask_and_unmask

from deepep_train.buffer_low_latency import LowLatencyCalls
from deepep_train.engines.nvlink import NvlinkEngine
from deepep_train.engines.peers import Peers
from deepep_train.streams import CommStream

ARENA = 48 << 20


class Calls(LowLatencyCalls):
    """Without the rest of `Buffer`, which wants a process group."""

    def __init__(self, peers: Peers) -> None:
        self._engine = NvlinkEngine(peers, ARENA, lambda: 4)
        self._comm = CommStream(self._engine.check, self._engine.device)
        self.engine = "low_latency"

    def check(self) -> None:
        self._engine.check()

    def destroy(self) -> None:
        self._engine.destroy()


def cases_of(size: int, count: int) -> list[Case]:
    tokens = [tuple((5 * r + 7 * i) % 9 for r in range(size)) for i in range(count)]
    return [
        Case(
            tokens[i],
            9,
            (128, 2560, 640)[i % 3] if i % 4 != 3 else 512,
            2 * size,
            2,
            STYLES[i % 6],
            KINDS[i % 4],
            i % 2 == 0,
            i % 3 == 0,
            i,
        )
        for i in range(count)
    ]


def in_turn(rank: int, size: int, meeting: threading.Barrier, graph: torch.cuda.CUDAGraph) -> Any:
    """torch waits for the whole device when a capture begins, and captures on one stream for all threads."""

    @contextmanager
    def capture() -> Iterator[None]:
        for turn in range(size):
            meeting.wait()
            if turn == rank:
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    yield
        meeting.wait()
        fill_cache()  # torch has emptied it
        meeting.wait()

    return capture()


def main(size: int, count: int, iterations: int) -> None:
    def as_processes_do(calls: Calls, rank: int, meeting: threading.Barrier) -> None:
        """What ranks in processes do, too: low_latency_ranks.py."""
        calls._engine.low_latency.in_slices = True
        shapes = [Case((6,) * size, 9, 2560, 2 * size, 2, style, "ue8m0", seed=i) for i, style in enumerate(STYLES)]
        late = [Case((9,) * size, 9, 256, 2 * size, 2, STYLES[1], kind, True, True) for kind in ("fp8", "bf16")]
        group: Any = calls
        seen, errors = ranks.soak(
            rank, size, group, Case(tuple(9 - r % 3 for r in range(size)), 9, 2560, 2 * size, 2), iterations
        )
        assert len(seen) == 1, f"{len(seen)} different results"
        meeting.wait()
        errors += ranks.graphs(rank, size, group, shapes, None, partial(in_turn, rank, size, meeting))
        meeting.wait()
        errors += ranks.overlapping(rank, size, group, late)
        finish()
        meeting.wait()
        errors += mask_and_unmask(calls, rank, size, Case((8,) * size, 8, 2560, 2 * size, 2), meeting.wait)
        assert not errors, errors[:3]

    def live(rank: int, meeting: threading.Barrier, table: list[Any]) -> None:
        calls = Calls(Threads(rank, size, meeting, table) if size > 1 else Peers(None, 60.0))
        fill_cache()
        meeting.wait()
        for number, case in enumerate(cases_of(size, count)):
            calls._engine.low_latency.in_slices = number % 2 == 0
            errors = round_trip(calls, rank, case, "cuda")
            torch.cuda.current_stream().synchronize()
            assert not errors, f"{case}: {errors[:3]}"
            meeting.wait()
        if iterations:
            as_processes_do(calls, rank, meeting)
            finish()
            meeting.wait()
        calls.destroy()

    ranks.buffer_of = lambda group, local=None: group  # each thread hands over its own
    torch.set_printoptions(threshold=16)  # of wrong rows, so that all errors fit into what pytest shows
    # With one rank, which waits for nobody: sanitizers stop the device when they first meet a kernel.
    first = Calls(Peers(None, 60.0))
    first._engine.low_latency.in_slices = True
    for case in cases_of(1, count):
        errors = round_trip(first, 0, case, "cuda")
        assert not errors, f"{case}: {errors[:3]}"
    first.destroy()
    if size > 1:
        in_threads(size, live)
    print(f"{size} ranks, {count} cases, {iterations} iterations: fine")


if __name__ == "__main__":
    main(*(int(a) for a in (sys.argv[1:] + ["4", "12", "0"][len(sys.argv) - 1 :])))
