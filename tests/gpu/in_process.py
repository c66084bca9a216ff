"""N ranks as threads and streams of one process, spread over its GPUs: what sanitizers and debuggers can look at.

    CUDA_MODULE_LOADING=EAGER CUDA_DEVICE_MAX_CONNECTIONS=32 PYTHONPATH=tests python tests/gpu/in_process.py [ranks] [cases]

Kernels of different ranks wait for each other, so nothing may stop them from running at once: no lazy loading, enough
connections, and no cudaMalloc or cudaFree on the way (torch's cache is filled first).
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from draws import STYLES, Exchange, row_values, values
from harness import assert_same_bits
from reference import Arrived, Picture, Rows
from shared import device_of
from torch import Tensor

from deepep_train.engines.base import CombineRequest, DispatchRequest, Payload, Prepared, RedispatchRequest
from deepep_train.engines.nvlink import NvlinkEngine
from deepep_train.engines.peers import Peers


class Threads(Peers):
    """The ranks of one process."""

    def __init__(self, rank: int, size: int, meeting: threading.Barrier, table: list[Any], timeout: float = 60.0) -> None:
        super().__init__(None, timeout)
        self.rank, self.size = rank, size
        self._meeting, self._table = meeting, table

    def gather_objects(self, mine: Any, operation: str) -> list[Any]:
        self._table[self.rank] = json.dumps(mine)
        self._meeting.wait()
        everyone = [json.loads(text) for text in self._table]
        self._meeting.wait()
        return everyone


@dataclass(frozen=True)
class Case:
    """An exchange and, rank by rank, what else is passed and what must come back."""

    exchange: Exchange
    picture: Picture
    bounds: list[int]
    arrived: list[Arrived]
    ys: list[Tensor]
    biases: list[tuple[Tensor, ...]]
    zs: list[Tensor]
    weights: list[Tensor]


def cases_of(size: int, count: int) -> list[Case]:
    """The first `count` of: both layouts of bf16, FP8 pairs with scales, fp32, fp16, with a bound or without one."""
    dtypes = ((torch.bfloat16, None), (torch.float8_e4m3fn, torch.float32), (torch.float32, None), (torch.float16, None))
    kinds = itertools.product((None, 5), dtypes, ("rank", "expert"))
    return [_case(size, seed, *kind) for seed, kind in enumerate(itertools.islice(kinds, count))]


def _case(size: int, seed: int, spare: int | None, types: tuple[torch.dtype, torch.dtype | None], layout: str) -> Case:
    dtype, scales = types
    g = torch.Generator().manual_seed(seed)
    tokens = tuple(int(torch.randint(0, (12, 40)[seed % 2], (), generator=g)) for _ in range(size))
    hidden = 128 * (1 + seed % 3) if scales is not None else (8, 520, 1032)[seed % 3]
    style, alignment = STYLES[-1 - seed % len(STYLES)], (1, 4, 16)[seed % 3]
    exchange = Exchange(
        tokens, hidden, 1 + seed % 6, 1 + seed % 3, style, dtype, layout, alignment, scales, strided=seed % 4 == 3, seed=seed
    )
    picture = Picture(exchange.given(), exchange.num_experts)
    needed = [len(picture.arrive(r, layout, exchange.alignment).rows) for r in range(size)]
    bounds = [0 if spare is None else n + spare for n in needed]
    arrived = [picture.arrive(r, layout, exchange.alignment, bounds[r]) for r in range(size)]
    origins = [a.rows for a in arrived]
    back = torch.bfloat16 if scales is not None else dtype
    ys = row_values(g, origins, hidden, back)
    biases = [tuple(values(g, n, hidden, back) for _ in range(seed % 3)) for n in tokens]
    zs = [picture.combine(r, ys, origins, biases[r]) for r in range(size)]
    ws = [_weights(a) for a in arrived]
    weights = [picture.combine_weights(r, ws, origins) for r in range(size)]
    return Case(exchange, picture, bounds, arrived, ys, biases, zs, weights)


def _weights(arrived: Arrived) -> Tensor:
    assert arrived.topk_weights is not None
    return arrived.topk_weights


def round_trip(engine: NvlinkEngine, rank: int, case: Case) -> None:
    """Dispatch, dispatch again, and combine from any memory and from peer-visible memory, all against the picture."""
    exchange, given = case.exchange, case.picture.given[rank]
    parts = given.x if isinstance(given.x, tuple) else (given.x,)
    payload = Payload(*(t.cuda() for t in parts))
    assert given.topk_weights is not None
    idx, weights = given.topk_idx.cuda(), given.topk_weights.cuda()
    experts = exchange.num_experts
    request = DispatchRequest(
        payload, engine.layout(idx, experts), idx, weights, experts, exchange.layout, exchange.alignment, case.bounds[rank]
    )
    got = engine.dispatch(Prepared(lambda: request))
    again = engine.redispatch(Prepared(lambda: RedispatchRequest(payload, got.plan)))
    y, bias = case.ys[rank].cuda(), [b.cuda() for b in case.biases[rank]]
    visible = engine.empty(y.shape, y.dtype, y.device).copy_(y)

    def combine(rows: Tensor) -> tuple[Tensor, Tensor | None]:
        return engine.combine(Prepared(lambda: CombineRequest(rows, got.plan, got.topk_weights, bias)))

    results = [combine(y), combine(visible)]
    torch.cuda.current_stream().synchronize()
    engine.check()
    what = f"on rank {rank}, {exchange}"
    expected = case.arrived[rank]
    for rows in (got.payload, again):
        _same_rows(rows, expected.x, f"rows {what}")
    assert_same_bits(got.topk_idx, expected.topk_idx, f"topk_idx {what}")
    assert_same_bits(got.topk_weights, expected.topk_weights, f"topk_weights {what}")
    for z, w in results:
        assert_same_bits(z, case.zs[rank], f"z {what}")
        assert_same_bits(w, case.weights[rank], f"weights {what}")


def _same_rows(got: Payload, expected: Rows, what: str) -> None:
    parts = expected if isinstance(expected, tuple) else (expected,)
    for a, b in zip([t for t in got if t is not None], parts, strict=True):
        assert_same_bits(a, b, what)


def fill_cache() -> None:
    """torch keeps what dies here for this stream, large and small, and need not ask CUDA for memory later."""
    kept = [torch.empty(64 << 20, dtype=torch.uint8, device="cuda")]
    kept += [torch.empty(500_000, dtype=torch.uint8, device="cuda") for _ in range(60)]
    del kept


def in_threads(size: int, live: Callable[[int, threading.Barrier, list[Any]], None]) -> None:
    """`live(rank, …)` on a thread and a stream for every rank. Where they stand after 40 s is printed: all should be over."""
    faulthandler.dump_traceback_later(40)
    meeting, table, errors = threading.Barrier(size), [None] * size, []

    def guarded(rank: int) -> None:
        try:
            torch.cuda.set_device(device_of(rank))
            with torch.cuda.stream(torch.cuda.Stream()):
                live(rank, meeting, table)
        except BaseException as error:
            errors.append(f"rank {rank}: {type(error).__name__}: {error}")
            meeting.abort()
            raise

    threads = [threading.Thread(target=guarded, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    faulthandler.cancel_dump_traceback_later()
    if errors:
        raise SystemExit("\n".join(errors))


def use_every_kernel(count: int) -> None:
    """With one rank, which waits for nobody: sanitizers stop the device when they first meet a kernel."""
    engine = NvlinkEngine(Peers(None, 60.0), 48 << 20, lambda: 4)
    for case in cases_of(1, count):
        round_trip(engine, 0, case)
    engine.destroy()


def main(size: int, count: int) -> None:
    cases = cases_of(size, count)
    for device in {device_of(rank) for rank in range(size)}:
        with torch.cuda.device(device):
            use_every_kernel(count)

    def live(rank: int, meeting: threading.Barrier, table: list[Any]) -> None:
        engine = NvlinkEngine(Threads(rank, size, meeting, table), 48 << 20, lambda: 4)
        fill_cache()
        meeting.wait()
        for case in cases:
            round_trip(engine, rank, case)
            meeting.wait()
        engine.destroy()

    in_threads(size, live)
    print(f"{size} ranks, {len(cases)} cases: fine")


if __name__ == "__main__":
    main(*(int(a) for a in (sys.argv[1:] + ["4", "16"][len(sys.argv) - 1 :])))
