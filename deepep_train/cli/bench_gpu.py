"""The GPU table of `bench`: every call of the nvlink engine beside the least time in which its bytes can be moved."""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepep_train import engines, fp8
from deepep_train.buffer import Buffer
from deepep_train.cli import bench_peer
from deepep_train.cli.bench_model import (
    ALIGNMENT,
    GRAPH_CALLS,
    SMALL,
    Shape,
    Traffic,
    arena_bytes,
    bytes_to_others,
    floor_ms,
    limit_ms,
    resident_sms,
    routing,
    rows_moved,
    traffic_of,
)
from deepep_train.cli.bench_report import CALLS, HEADER, Machine, Row, about, line, title, turns_warning, write
from deepep_train.errors import DeepEPError
from deepep_train.ops import combine, dispatch

LAYOUT_CALLS = 50  # 40 us a call: ten of them would be lost in the noise
ROUNDS, QUICK_ROUNDS = 5, 2
GIB = 1 << 30
TIMEOUT_SECONDS = 60.0  # of the buffer; the deadline of the whole is the launcher's


@dataclass(frozen=True)
class Plan:
    """What `bench` was asked for."""

    shape: Shape
    sms: tuple[int, ...]
    quick: bool
    out: Path
    peer: Path | None = None


@dataclass(frozen=True)
class Case:
    """One line to measure.

    Attributes:
        key: names the limit.
        call: what is timed, `calls` times; it stands for `inner` operations.
        moved, crossing: bytes for `floor_ms`; None where moving bytes is not the point.
        peer: DeepEP V1's call for the same work, if it is measured beside and has one.
    """

    key: str
    name: str
    shape: Shape
    sms: int
    call: Callable[[], Any]
    moved: Tensor | None
    crossing: Tensor | None
    calls: int = CALLS
    inner: int = 1
    peer: Callable[[], Any] | None = None


def obstacle() -> str:
    """Why there can be no GPU table in this process; "" if there can."""
    nvlink = next(engine for engine in engines.survey() if engine.name == "nvlink")
    return "" if nvlink.usable else nvlink.reason


def measure(plan: Plan) -> None:
    """One rank's part: every rank runs all cases, rank 0 reports."""
    num_ranks, is_first = dist.get_world_size(), dist.get_rank() == 0
    machine = examine(num_ranks, is_first)
    if is_first:
        if machine.takes_turns:
            print(turns_warning(machine), file=sys.stderr, flush=True)
        print(f"{title(machine, plan.shape)}\n{about(machine)}\n{HEADER}", flush=True)
    num_bytes = arena_bytes(traffic_of(plan.shape, num_ranks), plan.shape)
    buffer = Buffer(dist.group.WORLD, num_nvl_bytes=num_bytes, timeout=TIMEOUT_SECONDS)
    if buffer.engine != "nvlink":
        raise DeepEPError(f"no GPU table, these ranks cannot use nvlink: {'; '.join(buffer.engine_reasons)}")
    sms = resident_sms(plan.sms, machine.sms, -(-num_ranks // machine.num_devices))
    peer = None if plan.peer is None else bench_peer.Peer(plan.peer, plan.shape.hidden, sms)
    rounds = QUICK_ROUNDS if plan.quick else ROUNDS
    rows = []
    with torch.no_grad():
        for case in _cases(buffer, plan, sms, peer, is_first):
            rows.append(timed(case, machine, rounds))
            del case  # and with it its tensors, before the next group's are made
            if is_first:
                say(line(rows[-1]))
    staged = buffer.memory_stats().get("tensors staged", 0)
    if is_first:
        if staged:
            print(f"the arena was too small: {staged} results were staged and copied, so times above are too long")
        if machine.takes_turns:
            print(turns_warning(machine))
        write(machine, plan.shape, rounds, rows, plan.out)
    dist.barrier()
    if peer is not None:
        peer.destroy()
    buffer.destroy()


def say(text: str) -> None:
    """Print beside a progress bar."""
    with contextlib.suppress(ImportError):
        from tqdm import tqdm

        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
        return
    print(text, flush=True)


def _cases(buffer: Buffer, plan: Plan, sms: list[int], peer: bench_peer.Peer | None, is_first: bool) -> Iterable[Case]:
    """All lines, a group at a time: a group's tensors go before the next group's are made."""
    shape, most = plan.shape, sms[0]
    groups: list[Callable[[], list[Case]]] = [
        lambda: rank_cases(buffer, shape, sms, peer),
        lambda: expert_cases(buffer, shape, most),
        lambda: _layout_cases(buffer, shape, peer, most),
    ]
    small = Shape(shape.num_tokens, SMALL.hidden, SMALL.num_experts, shape.num_topk)
    fits = small.hidden < shape.hidden and small.num_experts % dist.get_world_size() == 0
    if fits and small.num_topk <= small.num_experts and not plan.quick:
        groups.append(lambda: _small_cases(buffer, small, most, peer))
    groups.append(lambda: graph_cases(rank_cases(buffer, shape, [most]), ("dispatch", "combine")))
    yield from by_group(groups, is_first)


def by_group(groups: list[Callable[[], list[Case]]], is_first: bool) -> Iterable[Case]:
    for group in _progress(groups, is_first):
        yield from group()
        gc.collect()
        torch.cuda.empty_cache()  # the other ranks of this GPU may need the room


def _progress(groups: list[Any], is_first: bool) -> Iterable[Any]:
    try:
        from tqdm import tqdm
    except ImportError:
        return groups
    return tqdm(groups, desc="bench", disable=not is_first, file=sys.stderr)


def timed(case: Case, machine: Machine, rounds: int) -> Row:
    if case.sms:
        Buffer.set_num_sms(case.sms)
    ms = slowest_ms(case.call, case.calls, rounds) / case.inner
    floor = None
    if case.moved is not None and case.crossing is not None:
        floor = floor_ms(case.moved, case.crossing, machine.num_devices, machine.copy_rate, machine.link_rate)
    sent = 0.0 if case.crossing is None else bytes_to_others(case.crossing)
    limit = limit_ms(case.key, case.sms, case.shape, machine.ranks) if machine.has_limits else None
    peer_ms = None if case.peer is None else slowest_ms(case.peer, case.calls, rounds)
    return Row(case.name, case.sms, ms, floor, limit, sent / 1e6, peer_ms)


def slowest_ms(call: Callable[[], Any], calls: int, rounds: int) -> float:
    """Time of one of `calls` calls in a row: the slowest rank's, the median over rounds. The first round only warms up."""
    times = []
    for number in range(rounds + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        dist.barrier()
        torch.cuda.synchronize()
        call()  # brings the ranks together on the device, closer than a barrier of their CPUs does
        start.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize()
        slowest = torch.tensor([start.elapsed_time(end) / calls], dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        if number:
            times.append(slowest.item())
    return statistics.median(times)


# The cases --------------------------------------------------------------------------------------------------------------


def inputs(shape: Shape) -> tuple[Tensor, Tensor, Tensor, Traffic]:
    rank = dist.get_rank()
    idx, weights = routing(shape, rank)
    generator = torch.Generator("cuda").manual_seed(rank)
    x = torch.randn(shape.num_tokens, shape.hidden, generator=generator, device="cuda", dtype=torch.bfloat16)
    return x, idx.cuda(), weights.cuda(), traffic_of(shape, dist.get_world_size())


def visible_copy(buffer: Buffer, rows: Tensor) -> Tensor:
    """A copy that peers can read in place, as an expert's last GEMM would leave it."""
    return buffer.empty_like(rows).copy_(rows)


def rank_cases(
    buffer: Buffer,
    shape: Shape,
    sms: list[int],
    peer: bench_peer.Peer | None = None,
    rows: dict[str, Tensor] | None = None,
) -> list[Case]:
    """Rank layout's lines; `rows` that they move, if not `rows_moved`'s."""
    x, idx, weights, t = inputs(shape)
    most, row, rows = sms[0], 2 * shape.hidden, rows_moved(t) if rows is None else rows
    Buffer.set_num_sms(most)
    got = dispatch(x, idx, weights, buffer=buffer, num_experts=shape.num_experts)
    handle, visible, anywhere = got.handle, visible_copy(buffer, got.x), got.x.clone()
    del got
    theirs = {n: {} if peer is None else peer.calls(x, idx, weights, shape.num_experts, n) for n in sms}

    def again() -> Any:
        return dispatch(x, buffer=buffer, handle=handle)

    def fresh() -> Any:
        return dispatch(x, idx, weights, buffer=buffer, num_experts=shape.num_experts)

    def case(key: str, name: str, n: int, call: Callable[[], Any], width: int, moved: str) -> Case:
        back = t.from_to.t() if moved.startswith("combine") else t.from_to
        beside = theirs[n].get(key.removesuffix(" any"))  # V1 combines from any input
        return Case(key, name, shape, n, call, rows[moved] * width, back * width, peer=beside)

    cases = [case("dispatch", "dispatch bf16, cached", n, again, row, "dispatch") for n in sms]
    picks = shape.num_topk * (8 + 4)
    name = "dispatch bf16, fresh, indices and weights"
    cases.append(case("dispatch fresh", name, most, fresh, row + picks, "dispatch"))
    if shape.hidden % fp8.BLOCK == 0:
        pair = fp8.quantize_blocks(x)
        row_and_scales = shape.hidden + 4 * (shape.hidden // fp8.BLOCK)

        def again_fp8() -> Any:
            return dispatch(pair, buffer=buffer, handle=handle)

        def fresh_fp8() -> Any:
            return dispatch(pair, idx, weights, buffer=buffer, num_experts=shape.num_experts)

        cases.append(case("dispatch fp8", "dispatch FP8 + scales, cached", most, again_fp8, row_and_scales, "dispatch"))
        name = "dispatch FP8 + scales, fresh"
        cases.append(case("dispatch fp8 fresh", name, most, fresh_fp8, row_and_scales + picks, "dispatch"))
    name = "combine bf16, peer-visible input"
    cases += [case("combine", name, n, lambda: combine(visible, handle), row, "combine") for n in sms]
    name = "combine bf16, any input"
    cases.append(case("combine any", name, most, lambda: combine(anywhere, handle), row, "combine any"))
    return cases


def expert_cases(buffer: Buffer, shape: Shape, most: int, rows: dict[str, Tensor] | None = None) -> list[Case]:
    """Expert layout's lines; `rows` as above."""
    x, idx, weights, t = inputs(shape)
    row, rows = 2 * shape.hidden, rows_moved(t) if rows is None else rows
    Buffer.set_num_sms(most)

    def fresh() -> Any:
        how: dict[str, Any] = {"num_experts": shape.num_experts, "layout": "expert", "alignment": ALIGNMENT}
        return dispatch(x, idx, weights, buffer=buffer, **how)

    got = fresh()
    handle, visible, anywhere = got.handle, visible_copy(buffer, got.x), got.x.clone()
    del got

    def case(key: str, name: str, call: Callable[[], Any], moved: str) -> Case:
        back = t.from_to.t() if "combine" in moved else t.from_to
        return Case(key, name, shape, most, call, rows[moved] * row, back * row)

    def again() -> Any:
        return dispatch(x, buffer=buffer, handle=handle)

    return [
        case("expert dispatch", f"dispatch to experts, aligned to {ALIGNMENT}, cached", again, "expert dispatch"),
        case("expert dispatch fresh", f"dispatch to experts, aligned to {ALIGNMENT}, fresh", fresh, "expert dispatch"),
        case("expert combine", "combine from experts, peer-visible input", lambda: combine(visible, handle), "expert combine"),
        case("expert combine any", "combine from experts, any input", lambda: combine(anywhere, handle), "expert combine any"),
    ]


def _layout_cases(buffer: Buffer, shape: Shape, peer: bench_peer.Peer | None, most: int) -> list[Case]:
    x, idx, weights, _ = inputs(shape)
    theirs = {} if peer is None else peer.calls(x, idx, weights, shape.num_experts, most)

    def call() -> Any:
        return buffer.get_dispatch_layout(idx, shape.num_experts)

    return [Case("layout", "get_dispatch_layout", shape, 0, call, None, None, calls=LAYOUT_CALLS, peer=theirs.get("layout"))]


def _small_cases(buffer: Buffer, shape: Shape, most: int, peer: bench_peer.Peer | None) -> list[Case]:
    """Short rows and few experts, where fixed costs show."""
    what = f", hidden {shape.hidden}, {shape.num_experts} experts"
    cases = [c for c in rank_cases(buffer, shape, [most], peer) if c.key in ("dispatch", "combine")]
    return [replace(c, name=c.name.removesuffix(", peer-visible input") + what) for c in cases]


def graph_cases(of: Iterable[Case], keys: Sequence[str]) -> list[Case]:
    """Those with these keys from CUDA graphs, which no Python slows down; to be made last, since they keep their part of the
    arena."""
    cases = []
    for c in of:
        if c.key in keys:
            how: dict[str, Any] = {"call": captured(c.call, GRAPH_CALLS), "calls": CALLS // GRAPH_CALLS, "inner": GRAPH_CALLS}
            cases.append(replace(c, key=f"{c.key} graph", name=f"{c.name}, CUDA graph", **how))
    return cases


def captured(call: Callable[[], Any], times: int) -> Callable[[], None]:
    """Replays a graph of `times` calls."""
    call()  # loads every kernel
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's watchdog asks CUDA things meanwhile
        for _ in range(times):
            call()
    return partial(_replay, graph, call)


def _replay(graph: torch.cuda.CUDAGraph, _: Callable[[], Any]) -> None:
    """The call stands here to stay alive: the graph reads its tensors."""
    graph.replay()


# The machine ------------------------------------------------------------------------------------------------------------


def examine(num_ranks: int, is_first: bool) -> Machine:
    """The same on all ranks; the copies are rank 0's, while the others leave the GPU alone."""
    num_devices = min(num_ranks, torch.cuda.device_count())
    rates = [0.0, 0.0]
    if is_first:
        rates[0] = 2 * copied_bytes_a_second(torch.device("cuda", 0))  # read and written
        if num_devices > 1:
            rates[1] = copied_bytes_a_second(torch.device("cuda", 1))
    shared = torch.tensor(rates, dtype=torch.float64)
    dist.broadcast(shared, 0)
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Machine(
        device=properties.name,
        num_devices=num_devices,
        sms=properties.multi_processor_count,
        driver=_driver(),
        torch=torch.__version__,
        cuda=str(torch.version.cuda),
        python=platform.python_version(),
        host=platform.node(),
        ranks=num_ranks,
        mps=mps_is_running(),
        copy_rate=shared[0].item(),
        link_rate=shared[1].item() if num_devices > 1 else None,
    )


def copied_bytes_a_second(target: torch.device) -> float:
    """Of 1 GiB from the first GPU to `target`, itself or another."""
    source = torch.zeros(GIB, dtype=torch.uint8, device="cuda:0")
    copy = torch.empty(GIB, dtype=torch.uint8, device=target)
    times = []
    for _ in range(ROUNDS + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(CALLS):
            copy.copy_(source)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / CALLS)
    del source, copy
    torch.cuda.empty_cache()  # the other ranks may need the room
    return 1e3 * GIB / statistics.median(times[1:])


def mps_is_running() -> bool:
    """Asks the MPS control program, which finds its daemon as this process's CUDA does; where there is none (a container
    that was only given the daemon's pipes) the pipes must do."""
    try:
        done = subprocess.run(
            ["nvidia-cuda-mps-control"], input="get_server_list\n", capture_output=True, text=True, timeout=10, check=False
        )
    except FileNotFoundError:
        return Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY") or "/tmp/nvidia-mps", "control").exists()
    except (OSError, subprocess.SubprocessError):
        return False
    # Its status tells nothing: the daemon starts a server when its first client comes, and until then there is none to list.
    return "cannot find" not in (done.stdout + done.stderr).lower()


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.split("\n")[0].strip() or "unknown"
