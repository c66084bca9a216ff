"""The rdma engine's fresh dispatches on CPUs: the engine's own Python, and the text of its own kernels for counts and tables,
which g++ compiles (fresh_on_cpu.cpp). What moves rows, and what is nvlink's, is done by gloo and torch."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from rail_twins import arranged, placed_picks
from torch import Tensor

from deepep_train.engines.nvlink_failures import counts_error
from deepep_train.engines.peers import Peers
from deepep_train.engines.rail_fresh import Fresh
from deepep_train.engines.rail_rows import as_elements, as_rows
from deepep_train.engines.rail_tables import ExpertTables, Tables, to_everyone
from deepep_train.engines.rails import Rails
from deepep_train.engines.rdma import RdmaEngine
from deepep_train.engines.v1_handle import channels
from deepep_train.errors import DeepEPError
from deepep_train.handle import LAYOUTS
from deepep_train.routing import rank_layout

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
TYPES = {"uint64_t": ctypes.c_uint64, "int64_t": ctypes.c_int64, "int": ctypes.c_int}


def compile_kernels(to: Path) -> str | None:
    """The library's path; None if there is no compiler that can."""
    out = str(to / "fresh_on_cpu.so")
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", str(ROOT / "tests/fresh_on_cpu.cpp"), "-o", out]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    assert done.returncode == 0, done.stderr
    return out


def params() -> dict[str, Any]:
    """The structs of csrc/rdma/fresh.hpp."""
    found = re.findall(r"struct (\w+Params) \{(.*?)\n\};", (ROOT / "csrc/rdma/fresh.hpp").read_text(), re.S)
    made = {}
    for name, body in found:
        fields = [(field, TYPES[kind]) for kind, field in re.findall(r"^\s+(uint64_t|int64_t|int) (\w+) =", body, re.M)]
        made[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return made


def view(address: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    size = torch.Size(shape).numel() * dtype.itemsize
    if not size:
        return torch.empty(tuple(shape), dtype=dtype)
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype).view(tuple(shape))


class End:
    """Launches, one after another."""

    def __init__(self, library: str, segment_bytes: int) -> None:
        self._lib = ctypes.CDLL(library)
        self._lib.make_flags.restype = ctypes.c_void_p
        self._flags = ctypes.c_void_p(self._lib.make_flags())
        self.segment_bytes = segment_bytes

    def __getattr__(self, name: str) -> Callable[[Any, int], None]:
        kernel = getattr(self._lib, f"run_{name}")
        return lambda p, _: kernel(self._flags, ctypes.byref(p))

    def cause(self) -> int:
        return int(self._lib.cause(self._flags))

    def has_failed(self) -> bool:
        return bool(self._lib.failed(self._flags))

    def fail(self) -> None:
        self._lib.fail(self._flags)

    def resize(self, segment_bytes: int) -> None:
        self.segment_bytes = segment_bytes


def layout(idx: int, num_tokens: int, top_k: int, num_experts: int, num_ranks: int, out: int, _: int) -> None:
    topk_idx = view(idx, (num_tokens, top_k), torch.int64)
    in_range = (topk_idx >= -1) & (topk_idx < num_experts)
    per_rank, _, per_expert, in_rank = rank_layout(torch.where(in_range, topk_idx, -1), num_experts, num_ranks)
    words = view(out, (num_ranks + num_experts + 1,), torch.int32)
    words.copy_(torch.cat([per_rank, per_expert, (~in_range.all()).view(1).to(torch.int32)]))
    view(out + 4 * (words.numel() + in_rank.numel()), in_rank.shape, torch.bool).copy_(in_rank)


def place_picks(p: Any, _: int) -> None:
    idx, base = view(p.topk_idx, (p.num_tokens, p.top_k), torch.int64), view(p.expert_base, (p.num_experts,), torch.int32)
    view(p.pick_row, idx.shape, torch.int32).copy_(placed_picks(idx, base))


def arrange_rows(p: Any, _: int) -> None:
    received = int(view(p.num_received, (1,), torch.int32))
    rows_of, row_slot = view(p.rows_of, (received, p.top_k), torch.int32), view(p.row_slot, (p.num_rows,), torch.int32)
    for out, made in zip((rows_of, row_slot), arranged(rows_of.clone(), p.num_rows), strict=True):
        out.copy_(made)


class CpuRails(Rails):
    def __init__(self, peers: Peers, local: int, library: str, segment_bytes: int) -> None:
        self.peers, self.local, self.nodes = peers, local, peers.size // local
        self.node, self.rail = divmod(peers.rank, local)
        self.device, self.low_latency = CPU, None
        self.kernels = SimpleNamespace(head_words=5, found_words=8, report_head=3, **params())
        self.end: Any = End(library, segment_bytes)
        self.report = torch.zeros(3 + 3 * peers.size, dtype=torch.int64)
        # What nobody writes to is what nobody may read.
        self.arena: Any = SimpleNamespace(temporary=lambda shape, dtype: torch.full(tuple(shape), 77, dtype=dtype))
        self.comm: Any = SimpleNamespace(layout=layout, place_picks=place_picks, arrange_rows=arrange_rows)
        self.everyone = to_everyone(peers.rank, local, self.nodes, CPU, 0)
        self.received: Any = None

    @contextmanager
    def operation(self, tables: Tables | None, *steps: str, also: ExpertTables | None = None) -> Iterator[int]:
        yield 0

    def stream(self) -> int:
        return 0

    def sms(self, asked: int, operation: str) -> int:
        return 1

    def failure(self) -> DeepEPError | None:
        if self.end.cause() != 7:
            return None
        return counts_error(self.report.tolist(), 1, self.peers.rank, self.bytes_for)

    def _everybody(self, mine: Any) -> list[Any]:
        out: list[Any] = [None] * self.peers.size
        dist.all_gather_object(out, mine, self.peers.group)
        return out

    def exchange(self, tables: Tables, data: Sequence[Tensor], wire_bytes: int, *_: int) -> Tensor:
        addresses = torch.zeros(len(data), tables.capacity, dtype=torch.int64)
        if self.end.has_failed():  # on every rank
            return addresses
        at = tables.send_at.tolist()
        sent = [[part[tables.token[at[n] : at[n + 1]].long()] for part in data] for n in range(self.nodes)]
        everyone = self._everybody(sent)
        self.received = []
        at = tables.recv_at.tolist()
        for n, theirs in enumerate(everyone[self.rail :: self.local]):
            for i, rows in enumerate(theirs[self.node]):
                assert rows.size(0) == at[n + 1] - at[n]
                self.received.append(rows)  # lives while its addresses do
                addresses[i, at[n] : at[n + 1]] = rows.data_ptr() + torch.arange(rows.size(0)) * rows.size(1)
        return addresses

    def forward(self, tables: Tables, data: Sequence[Tensor], addresses: Tensor, visible: Sequence[Tensor], *_: int) -> None:
        if self.end.has_failed():
            return
        num_rows = int(tables.recv_at[-1])
        assert num_rows <= tables.capacity
        rows = [
            torch.cat([view(int(a), (1, part.size(1)), torch.uint8) for a in addresses[i, :num_rows]] or [part[:0]])
            for i, part in enumerate(data)
        ]
        for slots, theirs in self._everybody((tables.slot[:num_rows], rows))[self.node * self.local :][: self.local]:
            here = slots[:, self.rail]
            for out, come in zip(visible, theirs, strict=True):
                out[here[here >= 0].long()] = come[here >= 0]

    def dispatch(
        self,
        tables: Tables,
        parts: Sequence[Tensor],
        num_rows: int,
        received: Tensor | None,
        experts: ExpertTables | None,
        signature: int,
        num_sms: int = 0,
    ) -> list[Tensor]:
        data = [as_rows(part) for part in parts]
        addresses = self.exchange(tables, data, 0)
        num_came = num_rows if experts is None else experts.rows_of.size(0)
        came = [self.arena.temporary((num_came, d.size(1)), torch.uint8) for d in data]
        self.forward(tables, data, addresses, came)
        got = []
        for rows in came:
            if experts is None:
                if received is not None:
                    rows[int(received) :] = 0
                got.append(rows)
                continue
            out = torch.zeros(num_rows, rows.size(1), dtype=torch.uint8)
            is_row = experts.row_slot >= 0
            out[is_row] = rows[experts.row_slot[is_row].long()]
            got.append(out)
        return [as_elements(rows, part) for rows, part in zip(got, parts, strict=True)]


def engine_on_cpu(group: dist.ProcessGroup, local: int, library: str, segment_bytes: int) -> RdmaEngine:
    torch.cuda.is_current_stream_capturing = lambda: False  # there may be no driver to ask
    engine = RdmaEngine.__new__(RdmaEngine)
    peers = engine.peers = Peers(group, 20)
    engine.rank, engine.num_local_ranks, engine.num_nodes, engine.forwards = peers.rank, local, peers.size // local, True
    engine.rails = rails = CpuRails(peers, local, library, segment_bytes)
    engine.device, engine.low_latency, engine._token = CPU, None, object()
    engine._fresh = Fresh(rails)
    engine._no_offset = {layout: channels(peers.size, layout, torch.device("cpu")) for layout in LAYOUTS}
    return engine
