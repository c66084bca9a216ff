"""The rdma engine's fresh dispatches on CPUs: the engine's own Python, and the text of its own kernels for counts and tables,
which g++ compiles (fresh_on_cpu.cpp). What moves and adds rows, and what is nvlink's, is done by gloo and torch, from the very
parameters that the kernels would get, and where there are streams, in an order that they allow."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from rail_twins import arranged, placed_picks
from torch import Tensor

from deepep_train.engines.arena import Landing
from deepep_train.engines.base import MAX_NODES
from deepep_train.engines.peers import Peers
from deepep_train.engines.rail_domain import DISPATCH, RAIL
from deepep_train.engines.rail_failures import counts_error
from deepep_train.engines.rail_fresh import Fresh
from deepep_train.engines.rail_stages import in_order, stages_of
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
CONSTANTS = {"kMaxNodes": MAX_NODES}


def compile_kernels(to: Path) -> str | None:
    """The library's path; None if there is no compiler that can."""
    out = str(to / "fresh_on_cpu.so")
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", str(ROOT / "tests/fresh_on_cpu.cpp"), "-o", out]
    if "libasan" in os.environ.get("LD_PRELOAD", ""):
        command += ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    assert done.returncode == 0, done.stderr
    return out


def params() -> dict[str, Any]:
    """The structs of csrc/rdma/fresh.hpp and params.hpp."""
    text = "".join((ROOT / "csrc/rdma" / name).read_text() for name in ("fresh.hpp", "params.hpp"))
    found = re.findall(r"struct (\w+Params) \{(.*?)\n\};", text, re.S)
    made = {}
    for name, body in found:
        fields = re.findall(r"^\s+(uint64_t|int64_t|int) (\w+) = (\w+);", body, re.M)
        struct = type(name, (ctypes.Structure,), {"_fields_": [(field, TYPES[kind]) for kind, field, _ in fields]})
        values = {field: CONSTANTS.get(value) or int(value) for _, field, value in fields}
        made[name] = partial(struct, **values)
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


class CpuStream:
    """Launches that wait for their turn; what `wait_event` names must have run before those behind it."""

    def __init__(self, number: int) -> None:
        self.cuda_stream = number
        self.queue: deque[Callable[[], None] | Event] = deque()

    def record_event(self) -> Event:
        event = Event()
        self.queue.append(event.happen)
        return event

    def wait_event(self, event: Event) -> None:
        self.queue.append(event)

    def step(self) -> bool:
        """Run the next launch, if it may."""
        while self.queue:
            head = self.queue[0]
            if not isinstance(head, Event):
                self.queue.popleft()()
                return True
            if not head.is_over:
                return False
            self.queue.popleft()
        return False

    def wait_stream(self, other: CpuStream) -> None:
        """This one's launches as early as they may be."""
        while self.step() or other.step():
            pass
        assert not self.queue and not other.queue, "they wait for each other"


class Event:
    def __init__(self) -> None:
        self.is_over = False

    def happen(self) -> None:
        self.is_over = True


class CpuRails(Rails):
    """The kernels that move and add rows, by gloo and torch; the engine's own Python launches them."""

    def __init__(self, peers: Peers, local: int, library: str, segment_bytes: int, most_stages: int) -> None:
        self.peers, self.local, self.nodes = peers, local, peers.size // local
        self.node, self.rail = divmod(peers.rank, local)
        self.device, self.low_latency, self._lock = CPU, None, threading.RLock()
        self.kernels = SimpleNamespace(head_words=5, found_words=8, report_head=3, **params())
        self.end: Any = End(library, segment_bytes)
        self.end.failed_flag = self.end.send = 0
        for name in ("rail", "sum"):
            setattr(self.end, name, self._launched(getattr(self, f"_run_{name}"), "rail" if name == "rail" else None))
        self.report = torch.zeros(3 + 3 * peers.size, dtype=torch.int64)
        self.refused: list[list[str]] = []  # what would have been told to other ranks, operation by operation
        self.stayed = 0  # exchanges that did not take place, as the counts did not allow them
        # What nobody writes to is what nobody may read.
        room = lambda shape, dtype: torch.full(tuple(shape), 77, dtype=dtype)  # noqa: E731
        self._seen: dict[int, int] = {}  # bytes of tensors that others read, by their address
        self.arena: Any = SimpleNamespace(
            temporary=room,
            land=lambda wanted: [Landing(t, t) for t in (room(*one) for one in wanted)],
            watch=lambda _: None,
            holds=lambda _: False,
            offset=self._offset,
        )
        self.comm: Any = SimpleNamespace(layout=layout, place_picks=place_picks, arrange_rows=arrange_rows)
        for name in ("dispatch", "combine", "expand", "reduce"):
            step = name if name in ("dispatch", "combine") else None
            setattr(self.comm, name, self._launched(getattr(self, f"_run_{name}"), step))
        self.everyone = to_everyone(peers.rank, local, self.nodes, CPU, 0)
        self.stages = stages_of(self.nodes, most_stages)
        num_stages = len(self.stages.dispatch)
        self.dispatch_steps = in_order(*DISPATCH, num_stages)
        self.combine_steps = in_order("combine", RAIL, num_stages)
        self._main, self._network = CpuStream(1), CpuStream(2) if num_stages > 1 else None
        torch.cuda.current_stream = lambda _=None: self._main
        self._memory(segment_bytes)

    def _memory(self, segment_bytes: int) -> None:
        self._send, self._recv = (torch.full((self.nodes, segment_bytes), 77, dtype=torch.uint8) for _ in range(2))
        self.end.send = self._send.data_ptr()

    def _offset(self, t: Tensor) -> int:
        self._seen[t.data_ptr()] = t.numel() * t.element_size()
        return t.data_ptr()

    def _launched(self, kernel: Callable[[Any], None], step: str | None) -> Callable[[Any, int], None]:
        def launch(p: Any, stream: int) -> None:
            if step is not None:
                assert self._owed[0] == step, "what other ranks would wait for"
            if self._send.size(1) != self.end.segment_bytes:
                self._memory(self.end.segment_bytes)
            taken = SimpleNamespace(**{name: getattr(p, name) for name in dir(p) if not name.startswith("_")})
            if hasattr(taken, "parts"):
                parts = taken.parts
                taken.parts = SimpleNamespace(at=parts.at, num_parts=parts.num_parts, first=parts.first, count=parts.count)
            work = lambda: None if self.end.has_failed() else kernel(taken)  # noqa: E731
            queue = {s.cuda_stream: s.queue for s in (self._main, self._network) if s is not None}.get(stream)
            work() if queue is None else queue.append(work)

        return launch

    @contextmanager
    def operation(self, tables: Tables | None, *steps: str, also: ExpertTables | None = None) -> Iterator[int]:
        with self._lock:
            self._owed = list(steps)
            try:
                yield 0
            except BaseException:
                self.refused.append(list(self._owed))
                raise
            assert not self._owed

    def stream(self) -> int:
        return 0

    def sms(self, asked: int, operation: str) -> int:
        return 4

    def failure(self) -> DeepEPError | None:
        if self.end.cause() != 7:
            return None
        return counts_error(self.report.tolist(), 1, self.peers.rank, self.bytes_for)

    def _everybody(self, mine: Any) -> list[Any]:
        out: list[Any] = [None] * self.peers.size
        dist.all_gather_object(out, mine, self.peers.group)
        return out

    def _here(self, mine: Any) -> list[Any]:
        return self._everybody(mine)[self.node * self.local :][: self.local]

    def _run_rail(self, p: Any) -> None:
        if p.goes and not int(view(p.goes, (1,), torch.int32)):
            self.stayed += 1
            return
        nodes, node, wire = self.nodes, self.node, p.row_bytes + p.beside_bytes
        turns = range(p.first_turn, min(p.end_turn, nodes))
        send_at, recv_at = (view(at, (nodes + 1,), torch.int32).tolist() for at in (p.send_at, p.recv_at))
        sent = {}
        for n in ((node + turn) % nodes for turn in turns if turn):
            first, count = send_at[n], send_at[n + 1] - send_at[n]
            rows = self._send.view(-1)[first * wire : (first + count) * wire].view(count, wire)
            if p.rows:
                for i, t in enumerate(view(p.token + 4 * first, (count,), torch.int32).tolist()):
                    rows[i, : p.row_bytes] = view(p.rows + t * p.row_bytes, (p.row_bytes,), torch.uint8)
                    rows[i, p.row_bytes :] = view(p.beside + t * p.beside_bytes, (p.beside_bytes,), torch.uint8)
            sent[n] = p.recv_offset, rows.clone()
        everyone = self._everybody(sent)[self.rail :: self.local]
        for n in range(nodes):
            if (node - n) % nodes not in turns:
                assert node not in everyone[n], "nobody waits for these now"
                continue
            count = recv_at[n + 1] - recv_at[n]
            came = self._recv[n, p.recv_offset : p.recv_offset + count * wire].view(count, wire)
            if n != node:
                offset, rows = everyone[n][node]
                assert offset == p.recv_offset, "a put lands where its sender says"
                came.copy_(rows)
            for what, beside in ((p.addresses, 0), (p.beside_addresses, p.row_bytes)):
                if not what:
                    continue
                out = view(what + 8 * recv_at[n], (count,), torch.int64)
                out.copy_(came.data_ptr() + beside + wire * torch.arange(count))
                if n == node:
                    tokens = view(p.token + 4 * send_at[n], (count,), torch.int32).long()
                    out.copy_(p.beside + tokens * p.beside_bytes if beside else p.rows + tokens * p.row_bytes)

    def _taken(self, p: Any) -> list[int]:
        """csrc/nvlink/meeting.cuh's `Rows`."""
        all_rows = min(p.num_tokens, int(view(p.num_tokens_at, (1,), torch.int32)))
        if not p.parts.at:
            return list(range(all_rows))
        at, end = view(p.parts.at, (p.parts.num_parts + 1,), torch.int32).tolist(), p.parts.first + p.parts.count
        first = at[p.parts.first]
        last = at[end] if end <= p.parts.num_parts else all_rows + at[end - p.parts.num_parts]
        return [i % all_rows for i in range(first, last)]

    def _run_dispatch(self, p: Any) -> None:
        slot, parts = view(p.send_row, (p.num_tokens, self.local), torch.int32), []
        for which, (addresses, width) in enumerate(((p.row_from, p.row_bytes), (p.scales_from, 4 * p.scale_words))):
            if addresses:
                where = view(addresses, (p.num_tokens,), torch.int64)
                parts.append((which, width, {f: view(int(where[f]), (width,), torch.uint8) for f in self._taken(p)}))
        for slots, theirs in self._here((slot, parts)):
            for which, width, rows in theirs:
                for f, row in rows.items():
                    if (there := int(slots[f, self.rail])) >= 0:
                        view(p.offsets[which] + there * width, (width,), torch.uint8).copy_(row)

    def _run_expand(self, p: Any) -> None:
        x = view(p.x, (p.num_rows, p.row_bytes), torch.uint8)
        received = int(view(p.num_received, (1,), torch.int32))
        if not p.rows_of:
            x[received:] = 0
            return
        x[view(p.row_slot, (p.num_rows,), torch.int32) < 0] = 0
        source = view(p.source, (received, p.row_bytes), torch.uint8)
        for n, rows in enumerate(view(p.rows_of, (received, p.top_k), torch.int32).tolist()):
            x[[row for row in rows if row >= 0]] = source[n]

    def _run_reduce(self, p: Any) -> None:
        for n, rows in enumerate(view(p.rows_of, (int(view(p.num_tokens, (1,), torch.int32)), p.top_k), torch.int32).tolist()):
            add_up([p.y + row * p.row_bytes for row in rows if row >= 0], p.partials + n * p.row_bytes, p)

    def _run_combine(self, p: Any) -> None:
        everyone = self._here(view(p.y, (self._seen[p.offsets[0]],), torch.uint8))
        slot = view(p.pull_row, (p.num_tokens, self.local), torch.int32)
        for f in self._taken(p):
            rows = [y.data_ptr() + int(row) * p.row_bytes for y, row in zip(everyone, slot[f], strict=True) if row >= 0]
            add_up(rows, p.out + f * p.row_bytes, p)

    def _run_sum(self, p: Any) -> None:
        own = self.end.send + int(view(p.recv_at, (self.nodes + 1,), torch.int32)[self.node]) * p.row_bytes
        for t, places in enumerate(view(p.place, (p.num_tokens, self.nodes), torch.int32).tolist()):
            rows = [bias + t * p.row_bytes for bias in (p.bias_0, p.bias_1) if bias]
            for n, i in enumerate(places):
                if i >= 0:
                    rows.append((own if n == self.node else self._recv[n].data_ptr()) + i * p.row_bytes)
            add_up(rows, p.out + t * p.row_bytes, p)


def add_up(rows: Sequence[int], out: int, p: Any) -> None:
    """In this order, in float32, rounded once."""
    dtype = (torch.bfloat16, torch.float16, torch.float32)[p.dtype]
    total = torch.zeros(p.row_bytes // dtype.itemsize)
    for row in rows:
        total += view(row, (p.row_bytes // dtype.itemsize,), dtype)
    view(out, total.shape, dtype).copy_(total)


def engine_on_cpu(group: dist.ProcessGroup, local: int, library: str, segment_bytes: int, most_stages: int = 1) -> RdmaEngine:
    torch.cuda.is_current_stream_capturing = lambda: False  # there may be no driver to ask
    engine = RdmaEngine.__new__(RdmaEngine)
    peers = engine.peers = Peers(group, 20)
    engine.rank, engine.num_local_ranks, engine.num_nodes, engine.forwards = peers.rank, local, peers.size // local, True
    engine.rails = rails = CpuRails(peers, local, library, segment_bytes, most_stages)
    engine.device, engine.low_latency, engine._token = CPU, None, object()
    engine._fresh = Fresh(rails)
    engine._no_offset = {layout: channels(peers.size, layout, torch.device("cpu")) for layout in LAYOUTS}
    return engine
