"""What the ranks of tests/gpu/test_low_latency_kernels.py and test_low_latency_nodes.py do; every function runs on every rank.

`local`: ranks of a node; None: all.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from low_latency_cases import Case, bits, check_received, fill, finish, round_trip, wrong
from torch import Tensor

import deepep_train as dt
from deepep_train.cli.live import as_lines, measure
from deepep_train.engines import low_latency_blocks
from deepep_train.moe import MoELayer

ARENA = 1 << 30
_buffers: dict[tuple[int, int | None], dt.Buffer] = {}


def buffer_of(group: dist.ProcessGroup, local: int | None = None) -> dt.Buffer:
    """One per process and mesh."""
    key = (group.size(), local)
    if key not in _buffers:
        _buffers[key] = new_buffer(group, ARENA if local is None else ARENA // 2, 30, local)  # spaces lie elsewhere then
    return _buffers[key]


def new_buffer(group: dist.ProcessGroup, num_bytes: int, timeout: float, local: int | None) -> dt.Buffer:
    made = dt.Buffer(group, num_nvl_bytes=num_bytes, low_latency_mode=True, timeout=timeout, num_local_ranks=local)
    assert made.engine == ("low_latency" if local is None else "rdma"), made.engine_reasons
    made._engine.low_latency.in_slices = True  # wherever it can be: of small rows no combine would be
    return made


def round_trips(rank: int, size: int, group: dist.ProcessGroup, cases: Sequence[Case], local: int | None = None) -> list[str]:
    buffer = buffer_of(group, local)
    errors = []
    calls = buffer._engine.low_latency
    here = calls.keeps_rows, calls.in_slices
    for number, given in enumerate(cases):
        case = given if given.hook else replace(given, asynchronous=("", "combine", "both", "")[number % 4])
        # With a hook, rows wait at their source if the ranks share a GPU, else they are pushed: each rank as it likes.
        calls.keeps_rows = (number + rank) % 3 != 0
        # All combine in slices, none, or each as it likes.
        calls.in_slices = (True, False, rank % 2 == 0)[number % 3]
        errors += [f"{case}: {error}" for error in round_trip(buffer, rank, case, "cuda")]
    calls.keeps_rows, calls.in_slices = here
    torch.cuda.synchronize()
    buffer.check()
    return errors


def in_slices(rank: int, size: int, group: dist.ProcessGroup, cases: Sequence[Case]) -> list[str]:
    """Combines in slices: of all ranks; beside ranks that pull by a hook, and late; beside ranks that copy nothing."""
    buffer = buffer_of(group)
    errors = []
    for number, of_all in enumerate(cases):
        other = number % 3 if (rank + number) % 2 else 0
        case = replace(of_all, hook=other == 1, zero_copy=other == 2)
        time.sleep(0.003 * ((rank + number) % 3))
        for _ in range(2):
            errors += [f"{case}: {error}" for error in round_trip(buffer, rank, case, "cuda")]
    buffer.check()
    return errors


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for t in tensors:
        digest.update(bits(t.detach().cpu().contiguous().view(-1).view(torch.uint8)).numpy().tobytes())
    return digest.hexdigest()


def _weighed(t: Tensor, valid: Tensor | None = None) -> Tensor:
    whole = t.contiguous().view(torch.int16 if t.dtype.itemsize < 4 else torch.int32).long()
    if valid is not None:
        whole = whole * valid
    return (whole.view(-1) * (1 + 2 * torch.arange(whole.numel(), device=t.device))).sum()  # modulo 2**64


def soak(
    rank: int, size: int, group: dist.ProcessGroup, case: Case, iterations: int, local: int | None = None
) -> tuple[set[str], list[str]]:
    """The hashes of all iterations' results, and what is wrong with the last one's."""
    buffer = buffer_of(group, local)
    finish()
    x, idx, weights = (t.cuda() for t in case.inputs(rank))
    shape = (case.num_experts // size, size * case.most, case.hidden)
    y, valid = torch.empty(shape, dtype=torch.bfloat16, device="cuda"), None
    seen, sums = set(), []
    recv, count, handle = None, None, ()
    for i in range(iterations):
        del handle
        recv, count, handle, _, hook = buffer.low_latency_dispatch(x, idx, case.most, case.num_experts, **case.arguments)
        if hook is not None:
            hook()
        if valid is None:
            finish()
            fill(case, rank, y, recv, count)
            valid = (torch.arange(shape[1], device="cuda") < count.unsqueeze(1)).unsqueeze(2)
        # All combine in slices, none, or some ranks do: the same bits.
        buffer._engine.low_latency.in_slices = (True, False, rank % 2 == 0)[i % 3]
        z = buffer.low_latency_combine(y, idx, weights, handle)[0]
        data, scales = recv if case.kind != "bf16" else (recv, None)
        # Sums in which every place weighs differently stand for the bits, and for where they are.
        parts = [data, *([] if scales is None else [scales]), handle[0].unsqueeze(2)]
        sums.append(torch.stack([*(_weighed(t, valid) for t in parts), *(_weighed(t) for t in (handle[1], count, z))]))
        if i % 50 == 49 or i == iterations - 1:
            finish()
            seen |= {_digest(s) for s in sums}
            sums.clear()
    finish()
    buffer._engine.low_latency.in_slices = True
    return seen, check_received(case, rank, recv, count, handle, frozenset()) + wrong("combined", z, case.combined(rank))


def combined_bits(rank: int, size: int, group: dist.ProcessGroup, case: Case, local: int | None = None) -> str:
    """A hash of what combine gives of values at random."""
    buffer = buffer_of(group, local)
    x, idx, weights = (t.cuda() for t in case.inputs(rank))
    *_, handle, _, _ = buffer.low_latency_dispatch(x, idx, case.most, case.num_experts, **case.arguments)
    shape = (case.num_experts // size, size * case.most, case.hidden)
    y = torch.randn(shape, generator=torch.Generator().manual_seed(rank)).bfloat16().cuda()
    if case.zero_copy:
        y = buffer.get_next_low_latency_combine_buffer(handle).copy_(y)
    return _digest(buffer.low_latency_combine(y, idx, weights, handle, zero_copy=case.zero_copy)[0])


def _capture(graph: torch.cuda.CUDAGraph) -> AbstractContextManager[Any]:
    return torch.cuda.graph(graph, capture_error_mode="thread_local")


def graphs(
    rank: int,
    size: int,
    group: dist.ProcessGroup,
    cases: Sequence[Case],
    local: int | None = None,
    capture: Callable[[torch.cuda.CUDAGraph], AbstractContextManager[Any]] = _capture,
) -> list[str]:
    """Dispatch and combine of two layers in one graph, replayed with the inputs of other cases of the same shape."""
    buffer = buffer_of(group, local)
    first = cases[0]
    held = [t.cuda() for t in first.inputs(rank)]
    shape = (first.num_experts // size, size * first.most, first.hidden)
    ys = [torch.zeros(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2)]

    def layers() -> list[Any]:
        kept = []
        for y in ys:
            got = buffer.low_latency_dispatch(held[0], held[1], first.most, first.num_experts, **first.arguments)
            if first.hook:
                got[4]()
            z, _, hook = buffer.low_latency_combine(y, held[1], held[2], got[2], return_recv_hook=first.hook)
            if first.hook:
                hook()
            kept.append((*got[:3], z))
        return kept

    layers()
    finish()
    graph = torch.cuda.CUDAGraph()
    with capture(graph):
        kept = layers()
    errors = []
    for case in cases:
        for to, t in zip(held, case.inputs(rank), strict=True):
            to.copy_(t)
        graph.replay()
        finish()
        for y, (recv, count, handle, _) in zip(ys, kept, strict=True):
            errors += check_received(case, rank, recv, count, handle, frozenset())
            fill(case, rank, y, recv, count)
        graph.replay()
        finish()
        errors += [e for *_, z in kept for e in wrong(f"combined, {case}", z, case.combined(rank))]
    del kept, graph
    return errors


def overlapping(rank: int, size: int, group: dist.ProcessGroup, cases: Sequence[Case], local: int | None = None) -> list[str]:
    """Two results in flight: both sent before either is received, hooks late and on another stream."""
    buffer = buffer_of(group, local)
    other = torch.cuda.Stream()
    errors, flying = [], []
    for case in cases:
        x, idx, weights = (t.cuda() for t in case.inputs(rank))
        got = buffer.low_latency_dispatch(x, idx, case.most, case.num_experts, **case.arguments)
        flying.append((case, idx, weights, got))
    time.sleep(0.01 * rank)
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        for *_, got in flying:
            got[4]()
    torch.cuda.current_stream().wait_stream(other)
    finish()
    combined = []
    for case, idx, weights, (recv, count, handle, _, _) in flying:
        errors += check_received(case, rank, recv, count, handle, frozenset())
        y = buffer.get_next_low_latency_combine_buffer(handle)
        fill(case, rank, y, recv, count)
        combined.append((case, *buffer.low_latency_combine(y, idx, weights, handle, zero_copy=True, return_recv_hook=True)))
    time.sleep(0.01 * (size - rank))
    for case, z, _, hook in combined:
        hook()
        finish()
        errors += wrong(f"combined, {case}", z, case.combined(rank))
    return errors


def rebuilt(rank: int, size: int, group: dist.ProcessGroup, case: Case, local: int) -> tuple[list[str], list[int]]:
    """Buffers after one another, from the second on with a smaller shape besides, each overwriting what the last has left:
    what is wrong, and how many blocks of NVSHMEM's memory there are after each."""
    errors, blocks = [], []
    for number in range(6):
        buffer = new_buffer(group, 64 << 20, 10, local)
        for _ in range(3):
            errors += round_trip(buffer, rank, replace(case, seed=number), "cuda")
            if number:
                errors += round_trip(buffer, rank, replace(case, most=7, tokens=(7, 0, 3, 5)[:size], seed=number), "cuda")
        time.sleep(0.02 * ((rank + number) % size))
        buffer.destroy()
        blocks.append(len(low_latency_blocks._given_back))
    return errors, blocks


def layer(rank: int, size: int, group: dist.ProcessGroup, local: int | None = None) -> tuple[Tensor, Tensor, str]:
    """What `MoELayer(low_latency=True)` gives without gradients, and with them, by the normal calls."""
    torch.manual_seed(11)
    how: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"} | (
        {} if local is None else {"buffer": buffer_of(group, local)}
    )
    made = MoELayer(256, 128, 2 * size, 2, low_latency=True, low_latency_tokens=6, **how).eval()
    x = torch.randn((5, 0, 6, 1)[rank % 4], 256, generator=torch.Generator().manual_seed(rank)).bfloat16().cuda()
    with torch.no_grad():
        one = made(x[: int(rank == 0)])  # most ranks get no rows
        fast = made(x)
    torch.testing.assert_close(one, fast[: int(rank == 0)], rtol=2**-6, atol=2**-8)
    return fast.cpu(), made(x).detach().cpu(), made.buffer.engine


def live(rank: int, size: int, group: dist.ProcessGroup, late_rank: int) -> str:
    """What `doctor --live` prints when a rank is late, on rank 0."""
    with tempfile.TemporaryDirectory() as folder:
        measure(out := Path(folder) / "live.json", late_rank, 0.001)
        return "\n".join(as_lines(json.loads(out.read_text()))) if rank == 0 else ""


def refusals(rank: int, size: int, group: dist.ProcessGroup, local: int | None = None) -> list[str]:
    """What wrong calls say; none of them harms the buffer."""
    buffer = buffer_of(group, local)
    case = Case((4,) * size, 4, 512, 2 * size, 2)
    x, idx, weights = (t.cuda() for t in case.inputs(rank))
    y = torch.zeros(2, size * 4, 512, dtype=torch.bfloat16, device="cuda")
    said = []

    def refused(call: Any) -> None:
        try:
            call()
        except dt.DeepEPError as error:
            said.append(str(error))
        else:
            said.append("nothing")

    def dispatch(x: Tensor = x, idx: Tensor = idx, most: int = 4, experts: int = 2 * size, **how: Any) -> Any:
        return buffer.low_latency_dispatch(x, idx, most, experts, **how)

    one, two = dispatch(), dispatch()
    refused(dispatch)  # a third
    buffer.low_latency_combine(y, idx, weights, one[2])
    three = dispatch()
    refused(lambda: buffer.low_latency_combine(y, idx, weights, one[2]))  # its slots have been taken
    del two, three
    refused(lambda: dispatch(torch.cat([x, x]), torch.cat([idx, idx])))
    refused(lambda: dispatch(torch.zeros(4, 100, dtype=torch.bfloat16, device="cuda")))
    refused(lambda: dispatch(torch.zeros(4, 16384 + 128, dtype=torch.bfloat16, device="cuda")))
    refused(lambda: dispatch(idx=torch.zeros(4, 17, dtype=torch.int64, device="cuda")))
    refused(lambda: dispatch(experts=1024 * size + size))
    refused(lambda: dispatch(most=5 if rank else 6))
    refused(lambda: dispatch(async_finish=True, return_recv_hook=True))
    refused(lambda: buffer.low_latency_combine(y, idx, weights, (1, 2, 3)))
    refused(lambda: buffer.low_latency_combine(y, idx, weights, dispatch()[2], zero_copy=True))
    refused(lambda: buffer.low_latency_combine(y, idx, weights, dispatch()[2], zero_copy=True, use_logfmt=True))
    dispatch(idx=torch.where(idx == 0, 2 * size, idx) if rank == 0 else idx)
    torch.cuda.synchronize()
    refused(buffer.check)
    errors = round_trip(buffer, rank, case, "cuda")
    return [*said, *errors]


def put_bytes(
    rank: int, size: int, group: dist.ProcessGroup, case: Case, local: int
) -> tuple[tuple[int, int], tuple[int, int], int]:
    """What a dispatch and a combine put, by the buffer's counter, and what they must; and three replays of both in a graph."""
    buffer = buffer_of(group, local)
    x, idx, weights = (t.cuda() for t in case.inputs(rank))
    y = torch.zeros(case.num_experts // size, size * case.most, case.hidden, dtype=torch.bfloat16, device="cuda")

    def so_far() -> int:
        return buffer.memory_stats()["network bytes put"]

    def dispatch() -> Any:
        return buffer.low_latency_dispatch(x, idx, case.most, case.num_experts, **case.arguments)[2]

    buffer.low_latency_combine(y, idx, weights, dispatch())
    torch.cuda.synchronize()
    dist.barrier(group)
    before = so_far()
    handle = dispatch()
    middle = so_far()
    buffer.low_latency_combine(y, idx, weights, handle)
    after = so_far()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        buffer.low_latency_combine(y, idx, weights, dispatch())
    captured = so_far()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    replayed = so_far() - captured
    del graph
    here, experts, flag = rank // local, case.num_experts // size, 8
    far = [r for r in range(size) if r // local != here]
    values = case.hidden * (2 if case.kind == "bf16" else 1)
    row = values + {"bf16": 0, "ue8m0": case.hidden // 128}.get(case.kind, case.hidden // 32)

    def picks(source: int, at: int) -> Tensor:
        """bool [T, K]: of a source's picks, those that rank `at` serves."""
        return case.inputs(source)[1].div(experts, rounding_mode="floor") == at

    sent = flag * 2 * len(far)  # `sent`, and `taken` to those that have sent
    for peer in far:
        tokens = int(picks(rank, peer).any(1).sum())
        sent += 4 * (2 + experts) + tokens * (4 + 4 * case.top_k + row)
    back = flag * 2 * len(far) + sum(int(picks(source, rank).sum()) * case.hidden * 2 for source in far)
    return (middle - before, sent), (after - middle, back), replayed
