"""The rdma engine, bit for bit against the picture of all ranks at once. Nodes are groups of ranks on one machine: puts between
them go through NVSHMEM, as between machines, and end as stores to the same GPU's memory."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from draws import STYLES, Exchange, row_values, values
from harness import assert_same_bits
from reference import Given, Picture
from shared import buffer_of, run_ranks, to
from test_nvlink import DTYPES, check, some_tokens
from test_nvlink_failures import KINDS, MPS, SLACK, TIMEOUT, work
from torch import Tensor

import deepep_train as dt
from deepep_train import engines

_SURVEYED = next(engine for engine in engines.survey() if engine.name == "rdma")
pytestmark = USABLE = pytest.mark.skipif(not _SURVEYED.usable, reason=_SURVEYED.reason)

MESHES = ((4, 2), (4, 1), (8, 4), (8, 2), (2, 1))  # ranks, of which so many are a node
meshes = pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"{m[0] // m[1]}x{m[1]}")
SOAK = int(os.environ.get("DEEPEP_TRAIN_SOAK", "60"))


def on(mesh: tuple[int, int]) -> dict[str, Any]:
    return {"engine": "rdma", "num_local_ranks": mesh[1]}


@pytest.mark.parametrize("layout", ["rank", "expert"])
@meshes
def test_random_exchanges(mesh: tuple[int, int], layout: str) -> None:
    shapes = itertools.product(STYLES, (8, 1032, 3))
    cases = [
        Exchange(
            some_tokens(mesh[0], seed), hidden, 1 + seed % 9, 1 + seed % 5, style, DTYPES[seed % 3], layout,
            (1, 4, 16)[seed % 3], strided=seed % 4 == 3, seed=seed,
        )
        for seed, (style, hidden) in enumerate(shapes)
    ]  # fmt: skip
    check(cases, num_biases=mesh[1] % 3, **on(mesh))


@pytest.mark.parametrize("layout", ["rank", "expert"])
def test_fp8_pairs(layout: str) -> None:
    base = Exchange((17, 0, 30, 9), 1024, 4, 3, "mixed", torch.float8_e4m3fn, layout, 8, torch.float32)
    kinds = itertools.product((torch.float8_e4m3fn, torch.uint8), (torch.float32, torch.int32), (False, True))
    check([replace(base, dtype=d, scales=s, strided=t, seed=i) for i, (d, s, t) in enumerate(kinds)], **on((4, 2)))


@pytest.mark.parametrize("layout", ["rank", "expert"])
@pytest.mark.parametrize("spare", [0, 7])
def test_num_worst_tokens(spare: int, layout: str) -> None:
    base = Exchange((9, 0, 21, 4), 64, 4, 3, "mixed", torch.bfloat16, layout, 4)
    check([replace(base, seed=s, style=style) for s, style in enumerate(STYLES)], spare=spare, **on((4, 2)))


def test_many_puts_to_a_node() -> None:
    """More rows than one put or one round of blocks carries."""
    check([Exchange((3000, 0, 1700, 2500), 512, 4, 16, "uniform", torch.bfloat16, "rank")], **on((4, 2)))


# Gradients --------------------------------------------------------------------------------------------------------------


def gradients(rank: int, size: int, group: dist.ProcessGroup, case: Exchange, local: int) -> None:
    """What the collective engine gives on CPUs, forwarding the same way."""
    rdma = buffer_of(group, "rdma", local)
    collective = dt.Buffer(group, timeout=30, engine="collective", num_local_ranks=local, two_level=True)
    mine, results = case.given()[rank], []
    for device, buffer in (("cpu", collective), ("cuda", rdma)):
        x = values(case.generator(), mine.num_tokens, case.hidden, case.dtype).to(device).requires_grad_()
        w = mine.topk_weights.detach().clone().to(device).requires_grad_()
        how = {"buffer": buffer, "num_experts": case.num_experts, "layout": case.layout, "alignment": case.alignment}
        out = dt.dispatch(x, mine.topk_idx.to(device), w, **how)
        z = dt.combine(out.x * out.x, out.handle)
        ((z * z).sum() + (out.topk_weights * out.topk_weights).sum()).backward()
        results.append([t.detach().cpu() for t in (out.x, out.topk_weights, z, x.grad, w.grad)])
    for a, b in zip(*results, strict=True):
        assert_same_bits(b, a)


@pytest.mark.parametrize("layout", ["rank", "expert"])
@meshes
def test_gradients(mesh: tuple[int, int], layout: str) -> None:
    tokens = (40, 0, 33, 11, 7, 5, 21, 2)[: mesh[0]]
    run_ranks(mesh[0], gradients, Exchange(tokens, 24, 6, 3, "uniform", torch.float32, layout, 4), mesh[1], timeout=120)


def layer(rank: int, size: int, group: dist.ProcessGroup, local: int) -> list[Any]:
    """`MoELayer` with recomputation, over both engines: output and gradients."""
    from deepep_train import moe

    collective = dt.Buffer(group, timeout=30, engine="collective", num_local_ranks=local, two_level=True)
    found = []
    for buffer in (buffer_of(group, "rdma", local), collective):
        torch.manual_seed(3)
        made = moe.MoELayer(64, 128, 2 * size, 2, buffer=buffer, device="cuda")
        x = torch.randn(40 - rank, 64, generator=torch.Generator().manual_seed(rank)).cuda().requires_grad_()
        y = torch.utils.checkpoint.checkpoint(made, x, use_reentrant=False)
        y.square().sum().backward()
        found.append([t.detach().cpu() for t in (y, x.grad, made.experts.w1.grad, made.experts.w2.grad)])
    return [(a, b) for a, b in zip(*found, strict=True)]


def test_moe_layer() -> None:
    for pairs in run_ranks(4, layer, 2):
        for got, expected in pairs:
            assert_same_bits(got, expected)


# Soak -------------------------------------------------------------------------------------------------------------------


def soak(rank: int, size: int, group: dist.ProcessGroup, local: int, count: int) -> int:
    """Dispatch and combine with routings drawn anew, nothing between them; rows come back times their ranks, or, in expert
    layout, their picks."""
    buffer, g = buffer_of(group, "rdma", local), torch.Generator().manual_seed(7)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for pair in range(count):
        of_all = torch.randint(0, 300, (size,), generator=g)
        tokens, layout = of_all[rank].item(), ("rank", "expert", "rank")[pair % 3]
        bound = int(of_all.sum()) + 1 if pair % 3 == 2 else 0
        hidden = 8 * int(torch.randint(1, 130, (), generator=g))
        idx = torch.randint(-1, 4 * size, (int(tokens), 5), generator=torch.Generator().manual_seed(size * pair + rank)).cuda()
        number = torch.arange(1, int(tokens) + 1, device="cuda", dtype=torch.float32)
        x = number[:, None].expand(-1, hidden).contiguous() + 1000.0 * rank
        out = dt.dispatch(x, idx, buffer=buffer, num_experts=4 * size, layout=layout, num_worst_tokens=bound)
        z = dt.combine(out.x, out.handle)
        ranks = torch.stack([((idx >= 4 * r) & (idx < 4 * r + 4)).any(1) for r in range(size)]).sum(0)
        copies = ranks if layout == "rank" else (idx >= 0).sum(1)
        wrong += (z != x * copies[:, None]).sum()
    buffer.check()
    return int(wrong.item())


@pytest.mark.parametrize("mesh", [(4, 2), (8, 4)], ids=str)
def test_soak(mesh: tuple[int, int]) -> None:
    assert run_ranks(mesh[0], soak, mesh[1], SOAK, timeout=max(120, SOAK)) == [0] * mesh[0]


# The network ------------------------------------------------------------------------------------------------------------


def count_bytes(
    rank: int, size: int, group: dist.ProcessGroup, case: Exchange, given: list[Given], local: int
) -> tuple[int, int]:
    buffer, mine = buffer_of(group, "rdma", local), given[rank]

    def put() -> int:
        torch.cuda.synchronize()
        return buffer.memory_stats()["network bytes put"]

    before = put()
    x, idx, w = to((mine.x, mine.topk_idx, mine.topk_weights), "cuda")
    out = dt.dispatch(x, idx, w, buffer=buffer, num_experts=case.num_experts)
    middle = put()
    rows, handle = out.x if isinstance(out.x, Tensor) else out.x[0].bfloat16(), out.handle
    del out  # the arena has no room for what came and a copy of wider rows
    dt.combine(rows, handle)
    return middle - before, put() - middle


@pytest.mark.parametrize(
    ("dtype", "scales", "row_bytes"), [(torch.bfloat16, None, 14336), (torch.float8_e4m3fn, torch.float32, 7168 + 224)], ids=str
)
def test_a_row_crosses_the_network_once_for_each_node(dtype: torch.dtype, scales: torch.dtype | None, row_bytes: int) -> None:
    """At most 2% more than the rows and their scales, at hidden 7168."""
    case, local = Exchange((600, 630, 670, 650), 7168, 8, 8, "uniform", dtype, "rank", 1, scales), 2
    given = case.given()
    picture = Picture(given, case.num_experts)
    got = run_ranks(4, count_bytes, case, given, local)
    per_node = [picture.num_tokens_per_node(r, local) for r in range(4)]
    for rank, (dispatched, combined) in enumerate(got):
        other = 1 - rank // local
        there = per_node[rank][other]
        back = per_node[other * local + rank % local][rank // local]
        assert there * row_bytes <= dispatched <= 1.02 * there * row_bytes
        assert back * 14336 <= combined <= 1.02 * back * 14336


def more_and_more(rank: int, size: int, group: dist.ProcessGroup) -> None:
    """Memory comes with the rows that need it; what is captured, or was received, before stays whole."""
    buffer = dt.Buffer(group, engine="rdma", num_local_ranks=2, timeout=30, num_nvl_bytes=512 << 20, num_rdma_bytes=1 << 20)
    outs: list[tuple[Any, Any, Any]] = []
    for tokens in (3, 700, 300, 1500):
        x = row_numbers(rank, tokens if rank == 1 else 3, 8192)
        idx = torch.arange(x.size(0), device="cuda").remainder(4)[:, None]
        out = dt.dispatch(x, idx, buffer=buffer, num_experts=4)
        outs.append((x, out, dt.combine(out.x, out.handle)))
    for x, out, z in outs:
        assert_same_bits(z, x)  # every token went to one rank
        assert_same_bits(dt.dispatch(x, buffer=buffer, handle=out.handle).x, out.x)
        assert_same_bits(dt.combine(out.x, out.handle), x)
    held = buffer.memory_stats()["rail"]
    assert held >= 2 * 2 * 750 * 16384
    with pytest.raises(dt.ArgumentError, match="num_rdma_bytes"):
        dt.combine(torch.zeros(outs[-1][1].x.size(0), 4 * 8192, device="cuda"), outs[-1][1].handle)


def row_numbers(rank: int, tokens: int, hidden: int) -> torch.Tensor:
    number = torch.arange(1, tokens + 1, device="cuda", dtype=torch.float32) + 4096 * rank
    return number[:, None].expand(-1, hidden).to(torch.bfloat16)


def test_memory_grows_with_the_rows() -> None:
    run_ranks(4, more_and_more)


def test_combine_of_other_rows() -> None:
    """Values whose sums show order and roundings, in wider nodes."""
    case = Exchange((40, 33, 20, 11, 5, 17, 9, 30), 40, 8, 3, "uniform", torch.bfloat16, "rank")
    picture = Picture(case.given(), case.num_experts)
    origins = [picture.arrive(r, "rank").rows for r in range(8)]
    ys = row_values(case.generator(), origins, 40, torch.bfloat16)
    assert not torch.equal(picture.combine(0, ys, origins, (), 4), picture.combine(0, ys, origins, (), 2))
    for mesh in ((8, 4), (8, 2)):
        check([case], num_biases=2, **on(mesh))


# Failures: last, in processes of their own ------------------------------------------------------------------------------


def survive(rank: int, size: int, group: dist.ProcessGroup, victim: int, kind: str) -> tuple[str, Any, float]:
    unhurried = dt.Buffer(group, engine="rdma", num_local_ranks=2, timeout=60)
    work(unhurried, rank, size, kind)  # a process's first kernels may take seconds to load
    buffer = dt.Buffer(group, engine="rdma", num_local_ranks=2, timeout=TIMEOUT)
    once = work(buffer, rank, size, kind)
    if rank == victim:
        threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    began = time.monotonic()
    while time.monotonic() - began < 40:
        call = time.monotonic()
        try:
            once()
        except Exception as error:  # noqa: BLE001 - under MPS it may be torch's
            return type(error).__name__, getattr(error, "ranks", None), time.monotonic() - call
    return "nothing", None, 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_is_killed(kind: str) -> None:
    victim = 3
    seen = run_ranks(4, survive, victim, kind, timeout=100, fresh=True, dead=[victim])
    for rank, (error, ranks, seconds) in enumerate(one or ("", None, 0.0) for one in seen):
        if rank == victim:
            continue
        assert error != "nothing"
        assert seconds < TIMEOUT + SLACK
        if not MPS:
            assert error == "PeerTimeoutError", seen
            assert victim in ranks, seen
