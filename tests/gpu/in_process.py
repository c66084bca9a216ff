"""N ranks as threads and streams of one process on one GPU: what sanitizers and debuggers can look at.

    CUDA_MODULE_LOADING=EAGER CUDA_DEVICE_MAX_CONNECTIONS=32 python tests/gpu/in_process.py [ranks] [rounds]

Kernels of different ranks wait for each other, so nothing may stop them from running at once: no lazy loading, enough
connections, and no cudaMalloc or cudaFree on the way (torch's cache is filled first).
"""

from __future__ import annotations

import itertools
import json
import sys
import threading
from typing import Any

import torch
from torch import Tensor

from deepep_train.engines.base import CombineRequest, DispatchRequest, Payload, Prepared, RedispatchRequest
from deepep_train.engines.nvlink import NvlinkEngine
from deepep_train.engines.peers import Peers

HIDDEN, TOP_K, LOCAL_EXPERTS, TOKENS = 520, 3, 3, 50


class Threads(Peers):
    """The ranks of one process."""

    def __init__(self, rank: int, size: int, meeting: threading.Barrier, table: list[Any]) -> None:
        super().__init__(None, 60.0)
        self.rank, self.size = rank, size
        self._meeting, self._table = meeting, table

    def gather_objects(self, mine: Any, operation: str) -> list[Any]:
        self._table[self.rank] = json.dumps(mine)
        self._meeting.wait()
        everyone = [json.loads(text) for text in self._table]
        self._meeting.wait()
        return everyone


def given(rank: int, size: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1000 * seed + rank)
    x = torch.randn(max(0, TOKENS - 9 * rank), HIDDEN, generator=g).to(torch.bfloat16)
    idx = torch.rand(x.size(0), size * LOCAL_EXPERTS, generator=g).topk(TOP_K, 1).indices
    idx[torch.rand(idx.shape, generator=g) < 0.2] = -1
    return x, idx, torch.rand(idx.shape, generator=g)


def round_trip(engine: NvlinkEngine, rank: int, size: int, seed: int, layout: str) -> None:
    """Dispatch, dispatch again and combine; the sum of a token's own rows is known without the other ranks."""
    x, idx, weights = (t.cuda() for t in given(rank, size, seed))
    experts = size * LOCAL_EXPERTS
    payload = Payload(x)
    request = DispatchRequest(payload, engine.layout(idx, experts), idx, weights, experts, layout, 4)
    got = engine.dispatch(Prepared(lambda: request))
    again = engine.redispatch(Prepared(lambda: RedispatchRequest(payload, got.plan)))
    z, w = engine.combine(Prepared(lambda: CombineRequest(again.data, got.plan, got.topk_weights)))
    torch.cuda.current_stream().synchronize()
    engine.check()
    assert torch.equal(again.data, got.payload.data)
    assert w is not None
    assert torch.equal(w, weights.masked_fill(idx < 0, 0.0))
    assert torch.equal(z.cpu(), expected(x.cpu(), idx.cpu(), size, layout))


def expected(x: Tensor, idx: Tensor, size: int, layout: str) -> Tensor:
    """Each rank returns the token's row, in expert layout once for every expert there, summed and rounded."""
    total = torch.zeros(x.shape)
    for rank in range(size):
        copies = ((idx >= 0) & (idx // LOCAL_EXPERTS == rank)).sum(1, keepdim=True)
        if layout == "rank":
            copies = copies.clamp(max=1)
        part = torch.zeros(x.shape)
        for i in range(TOP_K):
            part += torch.where(copies > i, x.float(), 0.0)
        total += torch.where(copies > 0, part.to(torch.bfloat16).float(), 0.0)
    return total.to(torch.bfloat16)


def fill_cache() -> None:
    """torch keeps what dies here for this stream, large and small, and need not ask CUDA for memory later."""
    kept = [torch.empty(64 << 20, dtype=torch.uint8, device="cuda")]
    kept += [torch.empty(500_000, dtype=torch.uint8, device="cuda") for _ in range(40)]
    del kept


def main(size: int, rounds: int) -> None:
    meeting, table, errors = threading.Barrier(size), [None] * size, []

    def live(rank: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                engine = NvlinkEngine(Threads(rank, size, meeting, table), 192 << 20, lambda: 4)
                fill_cache()
                meeting.wait()
                for seed, layout in itertools.product(range(rounds), ("rank", "expert")):
                    round_trip(engine, rank, size, seed, layout)
                    meeting.wait()
                engine.destroy()
        except BaseException as error:
            errors.append(f"rank {rank}: {type(error).__name__}: {error}")
            meeting.abort()
            raise

    threads = [threading.Thread(target=live, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise SystemExit("\n".join(errors))
    print(f"{size} ranks, {rounds} rounds: fine")


if __name__ == "__main__":
    main(*(int(a) for a in (sys.argv[1:] + ["4", "5"][len(sys.argv) - 1 :])))
