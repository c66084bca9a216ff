"""Two ranks of one process, of which one destroys its buffer first: what the other may still write to is not freed.

    PYTHONPATH=tests python tests/gpu/destroy_in_process.py

Between processes a mapping might keep the memory anyway; here nothing but the library does.
"""

from __future__ import annotations

import ctypes
import gc
import threading
from typing import Any

import torch
from in_process import Threads, in_threads

from deepep_train.engines.base import DispatchRequest, Payload, Prepared
from deepep_train.engines.nvlink import NvlinkEngine
from deepep_train.errors import PeerTimeoutError

ARENA = 48 << 20
TIMEOUT = 2.0
DRIVER = ctypes.CDLL("libcuda.so.1")


def pair() -> list[Any]:
    engines: list[Any] = [None, None]

    def live(rank: int, meeting: threading.Barrier, table: list[Any]) -> None:
        engines[rank] = NvlinkEngine(Threads(rank, 2, meeting, table, TIMEOUT), ARENA, lambda: 4)

    in_threads(2, live)
    return engines


def is_there(address: int) -> bool:
    """Whether this process has memory there, as CUDA's driver says; how much is free depends on other processes, too."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    base, size = ctypes.c_uint64(), ctypes.c_size_t()
    return DRIVER.cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address)) == 0


def dispatch(engine: NvlinkEngine) -> None:
    with torch.cuda.device(engine.device):  # the ranks may have a GPU each
        x = torch.ones(64, 512, dtype=torch.bfloat16, device="cuda")
        idx = torch.zeros(64, 1, dtype=torch.int64, device="cuda")
        request = DispatchRequest(Payload(x), engine.layout(idx, 2), idx, None, 2, "rank", 1, 0)
        engine.dispatch(Prepared(lambda: request))


def late_call() -> None:
    first, late = pair()
    memory = first._comm.base
    first.destroy()
    assert is_there(memory), "a peer's memory was freed while this rank could write to it"
    others = [torch.full((ARENA,), 7, dtype=torch.uint8, device="cuda") for _ in range(4)]
    try:
        dispatch(late)
    except PeerTimeoutError as error:
        assert error.ranks == (0,), (error, error.ranks)
    else:
        raise AssertionError("a call without its peer returned")
    torch.cuda.synchronize()
    assert all(bool((t == 7).all()) for t in others), "a late rank wrote to memory that is another's"
    others.clear()
    late.destroy()  # its own failed, and is kept
    assert not is_there(memory), "what nobody can reach any more was not freed"


def in_turn(how: str) -> None:
    engines = pair()
    memory = [engine._comm.base for engine in engines]
    assert all(is_there(address) for address in memory)
    while engines:
        engine = engines.pop()
        if how == "destroy":
            engine.destroy()
        del engine
        gc.collect()
    assert not any(is_there(address) for address in memory), f"{how}: memory was not given back"


if __name__ == "__main__":
    late_call()
    for how in ("destroy", "drop"):
        in_turn(how)
    print("fine")
