"""The GPU table of `bench`: every call of the nvlink engine beside the least time in which its bytes can be moved.

The first half is arithmetic and text and needs no GPU; the second half runs on every rank.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import gc
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepep_train import engines, fp8
from deepep_train.buffer import Buffer
from deepep_train.cli.launch import run_ranks
from deepep_train.errors import DeepEPError
from deepep_train.ops import combine, dispatch

CALLS = 10  # in a round
LAYOUT_CALLS = 50  # 40 us a call: ten of them would be lost in the noise
ROUNDS, QUICK_ROUNDS = 5, 2
# A graph holds few calls and is replayed often: what it captured stays in the arena as long as the buffer.
GRAPH_CALLS = 2
ALIGNMENT = 16
GIB = 1 << 30
TIMEOUT_SECONDS = 60.0  # of the buffer; the deadline of the whole is the launcher's
_GRACE_SECONDS = 5.0  # for the other ranks to say what they saw, once one has failed
_TELL_SECONDS = 3.0  # before the deadline, ranks print where they are


@dataclass(frozen=True)
class Shape:
    """What every rank sends; rows are bfloat16 unless a line of the table says otherwise."""

    num_tokens: int
    hidden: int
    num_experts: int
    num_topk: int


LARGE = Shape(4096, 7168, 256, 8)
SMALL = Shape(4096, 2048, 64, 8)

# Milliseconds, set for 8 ranks that share one H100 under MPS: (case, SMs a rank, shape) -> at most.
LIMIT_RANKS, LIMIT_GPU = 8, "H100"
LIMITS: dict[tuple[str, int, Shape], float] = {
    ("dispatch", 16, LARGE): 1.25,
    ("dispatch", 4, LARGE): 1.75,
    ("dispatch fresh", 16, LARGE): 1.45,
    ("dispatch fp8", 16, LARGE): 0.65,
    ("combine", 16, LARGE): 1.20,
    ("combine any", 16, LARGE): 3.0,
    ("expert dispatch", 16, LARGE): 2.2,
    ("expert combine", 16, LARGE): 2.6,
    ("expert combine any", 16, LARGE): 3.5,
    ("layout", 0, LARGE): 0.040,
    ("dispatch", 16, SMALL): 0.42,
    ("combine", 16, SMALL): 0.40,
}


def limit_ms(key: str, sms: int, shape: Shape, num_ranks: int) -> float | None:
    """The limit of exactly this work, None if none was set for it."""
    return LIMITS.get((key, sms, shape)) if num_ranks == LIMIT_RANKS else None


# What must be moved -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traffic:
    """Rows that a routing moves, int64; [R] by rank, [R, R] from rank to rank.

    Attributes:
        sent: tokens of the rank.
        from_to: rows of a dispatch, a token once for each destination rank.
        received: rows that arrive, in rank layout.
        expert_rows: rows of the expert layout without its padding.
        several, grouped: of the received tokens those with more than one expert here, and these tokens' expert rows.
    """

    sent: Tensor
    from_to: Tensor
    received: Tensor
    expert_rows: Tensor
    several: Tensor
    grouped: Tensor


def traffic(topk_idx: Sequence[Tensor], num_experts: int) -> Traffic:
    """Count the rows of a routing; `topk_idx[r]` is rank r's, -1 where a pick goes nowhere."""
    size = len(topk_idx)
    from_to = torch.zeros(size, size, dtype=torch.int64)
    expert_rows, several, grouped = (torch.zeros(size, dtype=torch.int64) for _ in range(3))
    for source, idx in enumerate(topk_idx):
        owner = torch.where(idx >= 0, idx // (num_experts // size), size)
        picks = torch.zeros(idx.size(0), size + 1, dtype=torch.int64)
        picks = picks.scatter_add_(1, owner, torch.ones_like(owner))[:, :size]
        from_to[source] = (picks > 0).sum(0)
        expert_rows += picks.sum(0)
        several += (picks > 1).sum(0)
        grouped += (picks * (picks > 1)).sum(0)
    sent = torch.tensor([idx.size(0) for idx in topk_idx])
    return Traffic(sent, from_to, from_to.sum(0), expert_rows, several, grouped)


def rows_moved(t: Traffic) -> dict[str, Tensor]:
    """Rows read plus rows written in each rank's own memory, [R]: every input read once, every output written once.

    A sender reads its tokens and the rows land in the receiver's memory; a combine's receiver pulls rows out of theirs, so
    each row counts where it lies.
    """
    once = t.sent + t.received
    copies = t.expert_rows - t.received
    return {
        "dispatch": once,
        "combine": once,
        "combine any": once + 2 * t.received,  # first copied to where peers can read it
        "expert dispatch": once + 2 * copies,  # a row crosses once; each further one is a copy of it
        # Tokens with several rows are summed first, to one row each; the others are pulled from where they are.
        "expert combine": once + t.grouped + t.several,
        "expert combine any": once + t.expert_rows + t.received,
    }


def by_device(per_rank: Tensor, num_devices: int) -> Tensor:
    """[R] -> [D] sums; rank r has GPU r modulo their number."""
    device = torch.arange(per_rank.size(0)) % num_devices
    return torch.zeros(num_devices, *per_rank.shape[1:], dtype=per_rank.dtype).index_add_(0, device, per_rank)


def floor_ms(moved: Tensor, crossing: Tensor, num_devices: int, copy_rate: float, link_rate: float | None) -> float:
    """The time of the busiest GPU's memory or, if that is longer, of the busiest link.

    Args:
        moved: bytes read plus bytes written in each rank's memory, [R].
        crossing: bytes from rank to rank, [R, R].
        copy_rate: bytes a second of a device copy, reads and writes counted.
        link_rate: bytes a second from one GPU to another; None with one GPU, where nothing crosses a link.
    """
    memory = int(by_device(moved, num_devices).max()) / copy_rate
    if link_rate is None:
        return 1e3 * memory
    between = by_device(by_device(crossing, num_devices).t(), num_devices).t()
    between = between - between.diagonal().diag()
    busiest = max(int(between.sum(0).max()), int(between.sum(1).max()))
    return 1e3 * max(memory, busiest / link_rate)


def bytes_to_others(crossing: Tensor) -> float:
    """Bytes that a rank sends to other ranks, the mean over ranks, from [R, R]."""
    return float((crossing.sum(1) - crossing.diagonal()).double().mean())


def arena_bytes(t: Traffic, shape: Shape) -> int:
    """Peer-visible memory for all that the cases keep and make, without counting on any of it being used twice: a result
    that had to be staged would be copied, and the time wrong."""
    row = shape.hidden * torch.bfloat16.itemsize
    padded = int(t.expert_rows.max()) + ALIGNMENT * (shape.num_experts // t.sent.numel())
    heap = ((5 + GRAPH_CALLS) * int(t.received.max()) + 4 * padded) * row + (256 << 20)
    return heap * 4 // 3  # a quarter of the arena is staging


def routing(shape: Shape, rank: int) -> tuple[Tensor, Tensor]:
    """topk_idx and topk_weights of `rank` on the CPU, from its number alone: so every rank can count what all send."""
    generator = torch.Generator().manual_seed(1000 + rank)
    scores = torch.rand(shape.num_tokens, shape.num_experts, generator=generator)
    return scores.topk(shape.num_topk, dim=1).indices, torch.rand(shape.num_tokens, shape.num_topk, generator=generator)


def traffic_of(shape: Shape, num_ranks: int) -> Traffic:
    return traffic([routing(shape, rank)[0] for rank in range(num_ranks)], shape.num_experts)


def resident_sms(wanted: Iterable[int], sm_count: int, ranks_per_device: int) -> list[int]:
    """Even numbers of SMs, largest first, that the ranks of one GPU can have at the same time: the engine's own cap."""
    most = max(2, (sm_count - sm_count // 32) // ranks_per_device // 2 * 2)
    return sorted({min(n, most) for n in wanted}, reverse=True)


# The report -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One line of the table: the median over rounds of the slowest rank's time of a call, and what to compare it with."""

    name: str
    sms: int  # a rank; 0 where it makes no difference
    ms: float
    floor_ms: float | None
    limit_ms: float | None
    mb_to_others: float

    @property
    def ratio(self) -> float | None:
        return None if self.floor_ms is None else self.ms / self.floor_ms

    @property
    def is_met(self) -> bool | None:
        return None if self.limit_ms is None else self.ms <= self.limit_ms

    def as_json(self) -> dict[str, Any]:
        numbers = asdict(self) | {"ratio": self.ratio}
        rounded = {name: round(value, 4) if isinstance(value, float) else value for name, value in numbers.items()}
        return rounded | {"limit_is_met": self.is_met}


@dataclass(frozen=True)
class Machine:
    """What the times were measured on; rates in bytes a second."""

    device: str
    num_devices: int
    sms: int
    driver: str
    torch: str
    cuda: str
    python: str
    host: str
    ranks: int
    mps: bool
    copy_rate: float
    link_rate: float | None

    @property
    def takes_turns(self) -> bool:
        """Whether ranks share a GPU and cannot run at the same time."""
        return self.ranks > self.num_devices and not self.mps

    @property
    def has_limits(self) -> bool:
        """Whether the limits were set for a machine like this one."""
        return self.num_devices == 1 and LIMIT_GPU in self.device and not self.takes_turns


HEADER = f"{'':46s}{'SMs':>4s}{'ms':>9s}{'floor':>8s}{'ratio':>7s}{'limit':>8s}{'':8s}{'MB sent':>9s}"


def line(row: Row) -> str:
    """A row under `HEADER`; empty where there is nothing to say."""
    sms = f"{row.sms or '':>4}"
    floor = f"{'':15s}" if row.floor_ms is None else f"{row.floor_ms:8.3f} {row.ratio:6.2f}"
    limit = f"{'':16s}" if row.limit_ms is None else f"{row.limit_ms:8.3f}  {'met' if row.is_met else 'MISSED':6s}"
    return f"{row.name:46s}{sms}{row.ms:9.3f}{floor}{limit}{row.mb_to_others:9.1f}"


def title(machine: Machine, shape: Shape) -> str:
    return (
        f"{machine.ranks} ranks on {machine.num_devices} × {machine.device}, {shape.num_tokens} tokens × {shape.hidden}, "
        f"top-{shape.num_topk} of {shape.num_experts}"
    )


def about(machine: Machine) -> str:
    link = "" if machine.link_rate is None else f", link {machine.link_rate / 1e9:.0f} GB/s one way"
    return (
        f"{machine.sms} SMs a GPU, MPS {'on' if machine.mps else 'off'}, copy {machine.copy_rate / 1e12:.2f} TB/s "
        f"(read + write){link}; driver {machine.driver}, torch {machine.torch}"
    )


def turns_warning(machine: Machine) -> str:
    return (
        f"THESE TIMES MEAN NOTHING: {machine.ranks} ranks share {machine.num_devices} GPU(s) without MPS and take turns; "
        "start MPS with `nvidia-cuda-mps-control -d`"
    )


def write(machine: Machine, shape: Shape, rounds: int, rows: Sequence[Row], out: Path) -> None:
    """bench.json and, where matplotlib is installed, bench.png."""
    result = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python -m deepep_train", *sys.argv[1:]]),
        "machine": asdict(machine),
        "ranks": machine.ranks,
        "engine": "nvlink",
        "times_mean_something": not machine.takes_turns,
        "work": asdict(shape) | {"rounds": rounds, "calls": CALLS, "alignment": ALIGNMENT},
        "rows": [row.as_json() for row in rows],
    }
    (out / "bench.json").write_text(json.dumps(result, indent=2) + "\n")
    plt = pyplot()
    if plt is not None:
        plot(plt, title(machine, shape), rows, out / "bench.png")
    print(f"wrote {out}/bench.json" + ("" if plt is None else f" and {out}/bench.png"))


def pyplot() -> Any:
    """matplotlib.pyplot, drawing to files; None, with a line that says so, where it is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed (pip install 'deepep_train[recipes]')", file=sys.stderr)
        return None
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plot(plt: Any, heading: str, rows: Sequence[Row], path: Path) -> None:
    """Horizontal bars of the times, the floors as thin bars within them, the limits as ticks."""
    figure, axes = plt.subplots(figsize=(9.5, 1.2 + 0.36 * len(rows)), layout="constrained")
    axes.barh(range(len(rows)), [row.ms for row in rows], height=0.75, color="#8fb3d9", label="measured")
    floors = [(i, row.floor_ms) for i, row in enumerate(rows) if row.floor_ms is not None]
    axes.barh([i for i, _ in floors], [f for _, f in floors], height=0.25, color="#1f4e79", label="floor")
    limits = [(i, row.limit_ms) for i, row in enumerate(rows) if row.limit_ms is not None]
    axes.scatter([f for _, f in limits], [i for i, _ in limits], marker="|", s=250, color="#c0392b", zorder=3, label="limit")
    axes.set_yticks(range(len(rows)), [f"{row.name}, {row.sms} SMs" if row.sms else row.name for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("median time of the slowest rank, ms")
    axes.set_title(heading, fontsize=9)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


# Processes --------------------------------------------------------------------------------------------------------------


def spawn(num_ranks: int, function: Callable[..., None], args: tuple, deadline: float, use_cuda: bool) -> None:
    """Call `function(*args)` on ranks in processes of their own, joined by gloo; `function` must be importable.

    A rank that fails prints its traceback and ends the others; after `deadline` seconds all of them print where they are
    and are killed. Both raise `DeepEPError` here.
    """
    context = get_context("spawn")
    tell_at = time.time() + deadline - _TELL_SECONDS
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = f"file://{folder}/rendezvous"
        processes = [
            context.Process(target=_rank, args=(r, num_ranks, rendezvous, use_cuda, tell_at, function, args), daemon=True)
            for r in range(num_ranks)
        ]
        try:
            for process in processes:
                process.start()
            _wait(processes, deadline)
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()


def _wait(processes: Sequence[Any], deadline: float) -> None:
    end = time.monotonic() + deadline
    failed: dict[int, int] = {}
    at_work = {process.sentinel: rank for rank, process in enumerate(processes)}
    while at_work:
        ready = connection.wait(list(at_work), max(0.0, end - time.monotonic()))
        if not ready:
            break
        for rank in [at_work.pop(sentinel) for sentinel in ready if isinstance(sentinel, int)]:
            processes[rank].join()
            if code := processes[rank].exitcode:
                failed[rank] = code
                end = min(end, time.monotonic() + _GRACE_SECONDS)
    if failed:
        first = next(iter(failed))
        raise DeepEPError(f"rank {first} failed first (exit code {failed[first]}); what it said is above")
    if at_work:
        raise DeepEPError(f"ranks {sorted(at_work.values())} had not finished after {deadline:g} s and were killed")


def _rank(
    rank: int, size: int, rendezvous: str, use_cuda: bool, tell_at: float, function: Callable[..., None], args: tuple
) -> None:
    faulthandler.dump_traceback_later(max(0.1, tell_at - time.time()), exit=False)
    try:
        # The ranks share the cores; more threads than cores make every rank slower.
        torch.set_num_threads(1 if use_cuda else max(1, (os.cpu_count() or 1) // size))
        if use_cuda:
            torch.cuda.set_device(rank % torch.cuda.device_count())
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=size)
        function(*args)
        gc.collect()  # a buffer in a reference cycle keeps the group alive, and gloo aborts a process that exits with one
        dist.destroy_process_group()
    except BaseException:  # noqa: BLE001 - whatever it is, the user must see it
        sys.stderr.write("".join(f"[rank {rank}] {text}\n" for text in traceback.format_exc().splitlines()))
        sys.stderr.flush()
        os._exit(1)  # no clean-up that waits for ranks which are gone
    faulthandler.cancel_dump_traceback_later()


# The measurement --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What `bench` was asked for."""

    shape: Shape
    sms: tuple[int, ...]
    quick: bool
    out: Path


@dataclass(frozen=True)
class Case:
    """One line to measure.

    Attributes:
        key: names the limit.
        call: what is timed, `calls` times; it stands for `inner` operations.
        moved, crossing: bytes for `floor_ms`; None where moving bytes is not the point.
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


def obstacle() -> str:
    """Why there can be no GPU table in this process; "" if there can."""
    nvlink = next(engine for engine in engines.survey() if engine.name == "nvlink")
    return "" if nvlink.usable else nvlink.reason


def run(num_ranks: int, plan: Plan, deadline: float) -> None:
    """Measure on ranks started here, or on torchrun's."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        run_ranks(num_ranks, measure, plan)
    else:
        spawn(num_ranks, measure, (plan,), deadline, use_cuda=True)


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
    rounds = QUICK_ROUNDS if plan.quick else ROUNDS
    rows = []
    with torch.no_grad():
        for case in _cases(buffer, plan, sms, is_first):
            rows.append(_timed(case, machine, rounds))
            del case  # and with it its tensors, before the next group's are made
            if is_first:
                _say(line(rows[-1]))
    staged = buffer.memory_stats().get("tensors staged", 0)
    if is_first:
        if staged:
            print(f"the arena was too small: {staged} results were staged and copied, so times above are too long")
        if machine.takes_turns:
            print(turns_warning(machine))
        write(machine, plan.shape, rounds, rows, plan.out)
    dist.barrier()
    buffer.destroy()


def _say(text: str) -> None:
    """Print beside a progress bar."""
    with contextlib.suppress(ImportError):
        from tqdm import tqdm

        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
        return
    print(text, flush=True)


def _cases(buffer: Buffer, plan: Plan, sms: list[int], is_first: bool) -> Iterable[Case]:
    """All lines, a group at a time: a group's tensors go before the next group's are made."""
    shape, most = plan.shape, sms[0]
    groups: list[Callable[[], list[Case]]] = [
        lambda: _rank_cases(buffer, shape, sms),
        lambda: _expert_cases(buffer, shape, most),
        lambda: _layout_cases(buffer, shape),
    ]
    small = Shape(shape.num_tokens, SMALL.hidden, SMALL.num_experts, shape.num_topk)
    fits = small.hidden < shape.hidden and small.num_experts % dist.get_world_size() == 0
    if fits and small.num_topk <= small.num_experts and not plan.quick:
        groups.append(lambda: _small_cases(buffer, small, most))
    groups.append(lambda: _graph_cases(buffer, shape, most))
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


def _timed(case: Case, machine: Machine, rounds: int) -> Row:
    if case.sms:
        Buffer.set_num_sms(case.sms)
    ms = slowest_ms(case.call, case.calls, rounds) / case.inner
    floor = None
    if case.moved is not None and case.crossing is not None:
        floor = floor_ms(case.moved, case.crossing, machine.num_devices, machine.copy_rate, machine.link_rate)
    sent = 0.0 if case.crossing is None else bytes_to_others(case.crossing)
    limit = limit_ms(case.key, case.sms, case.shape, machine.ranks) if machine.has_limits else None
    return Row(case.name, case.sms, ms, floor, limit, sent / 1e6)


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


def _inputs(shape: Shape) -> tuple[Tensor, Tensor, Tensor, Traffic]:
    rank = dist.get_rank()
    idx, weights = routing(shape, rank)
    generator = torch.Generator("cuda").manual_seed(rank)
    x = torch.randn(shape.num_tokens, shape.hidden, generator=generator, device="cuda", dtype=torch.bfloat16)
    return x, idx.cuda(), weights.cuda(), traffic_of(shape, dist.get_world_size())


def _visible(buffer: Buffer, rows: Tensor) -> Tensor:
    """A copy that peers can read in place, as an expert's last GEMM would leave it."""
    return buffer.empty_like(rows).copy_(rows)


def _rank_cases(buffer: Buffer, shape: Shape, sms: list[int]) -> list[Case]:
    x, idx, weights, t = _inputs(shape)
    most, row, rows = sms[0], 2 * shape.hidden, rows_moved(t)
    Buffer.set_num_sms(most)
    got = dispatch(x, idx, weights, buffer=buffer, num_experts=shape.num_experts)
    handle, visible, anywhere = got.handle, _visible(buffer, got.x), got.x.clone()
    del got

    def again() -> Any:
        return dispatch(x, buffer=buffer, handle=handle)

    def fresh() -> Any:
        return dispatch(x, idx, weights, buffer=buffer, num_experts=shape.num_experts)

    def case(key: str, name: str, n: int, call: Callable[[], Any], width: int, moved: str) -> Case:
        back = t.from_to.t() if moved.startswith("combine") else t.from_to
        return Case(key, name, shape, n, call, rows[moved] * width, back * width)

    cases = [case("dispatch", "dispatch bf16, cached", n, again, row, "dispatch") for n in sms]
    row_and_picks = row + shape.num_topk * (8 + 4)
    name = "dispatch bf16, fresh, indices and weights"
    cases.append(case("dispatch fresh", name, most, fresh, row_and_picks, "dispatch"))
    if shape.hidden % fp8.BLOCK == 0:
        pair = fp8.quantize_blocks(x)
        row_and_scales = shape.hidden + 4 * (shape.hidden // fp8.BLOCK)

        def again_fp8() -> Any:
            return dispatch(pair, buffer=buffer, handle=handle)

        cases.append(case("dispatch fp8", "dispatch FP8 + scales, cached", most, again_fp8, row_and_scales, "dispatch"))
    name = "combine bf16, peer-visible input"
    cases += [case("combine", name, n, lambda: combine(visible, handle), row, "combine") for n in sms]
    name = "combine bf16, any input"
    cases.append(case("combine any", name, most, lambda: combine(anywhere, handle), row, "combine any"))
    return cases


def _expert_cases(buffer: Buffer, shape: Shape, most: int) -> list[Case]:
    x, idx, weights, t = _inputs(shape)
    row, rows = 2 * shape.hidden, rows_moved(t)
    Buffer.set_num_sms(most)

    def fresh() -> Any:
        how: dict[str, Any] = {"num_experts": shape.num_experts, "layout": "expert", "alignment": ALIGNMENT}
        return dispatch(x, idx, weights, buffer=buffer, **how)

    got = fresh()
    handle, visible, anywhere = got.handle, _visible(buffer, got.x), got.x.clone()
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


def _layout_cases(buffer: Buffer, shape: Shape) -> list[Case]:
    _, idx, _, _ = _inputs(shape)

    def call() -> Any:
        return buffer.get_dispatch_layout(idx, shape.num_experts)

    return [Case("layout", "get_dispatch_layout", shape, 0, call, None, None, calls=LAYOUT_CALLS)]


def _small_cases(buffer: Buffer, shape: Shape, most: int) -> list[Case]:
    """Short rows and few experts, where fixed costs show."""
    what = f", hidden {shape.hidden}, {shape.num_experts} experts"
    cases = [c for c in _rank_cases(buffer, shape, [most]) if c.key in ("dispatch", "combine")]
    return [replace(c, name=c.name.removesuffix(", peer-visible input") + what) for c in cases]


def _graph_cases(buffer: Buffer, shape: Shape, most: int) -> list[Case]:
    """The same from CUDA graphs, which no Python slows down; made last, since they keep their part of the arena."""
    cases = []
    for c in _rank_cases(buffer, shape, [most]):
        if c.key in ("dispatch", "combine"):
            how: dict[str, Any] = {"call": captured(c.call, GRAPH_CALLS), "calls": CALLS // GRAPH_CALLS, "inner": GRAPH_CALLS}
            cases.append(replace(c, key=f"{c.key} graph", name=f"{c.name}, CUDA graph", **how))
    return cases


def captured(call: Callable[[], Any], times: int) -> Callable[[], None]:
    """Replays a graph of `times` calls."""
    call()  # loads every kernel
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
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
    return done.returncode == 0 and "cannot find" not in (done.stdout + done.stderr).lower()


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.split("\n")[0].strip() or "unknown"
