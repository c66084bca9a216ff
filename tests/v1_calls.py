"""DeepEP V1's normal calls, between the ranks of one node or of several: checks against a reference, and timings.

The reference knows every rank's input from its number alone and works on whole tensors, so that it is quick at any size;
tests/reference.py, in loops, is for small ones.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable
from functools import cached_property, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from v1_runner import Work

from deepep_train import Buffer, Config, fp8
from deepep_train.cli import bench_gpu
from deepep_train.cli.bench_model import resident_sms

SMS = (4, 8, 16, 24)
ALIGNMENT = 16
ROUNDS, CALLS = 5, 10


# What every rank must get -------------------------------------------------------------------------------------------------


class Reference:
    """All ranks' inputs, and what follows from them for this rank. Shares nothing with the package.

    Nodes are `num_local_ranks` ranks (0: all) each; rows of `sums_of` ranks are summed and rounded before their sum is added.
    """

    def __init__(self, work: Work, rank: int, size: int, holes: bool, num_local_ranks: int = 0, sums_of: int = 1) -> None:
        self.work, self.rank, self.size = work, rank, size
        self.num_local_ranks, self.sums_of = num_local_ranks or size, sums_of
        self.num_local = work.num_experts // size
        self.x, self.idx, self.weights = [], [], []
        for source in range(size):
            g = torch.Generator().manual_seed(2 * source)
            scores = torch.rand(work.num_tokens, work.num_experts, generator=g)
            idx = scores.topk(work.num_topk, dim=1).indices
            if holes:  # picks that go nowhere
                idx = idx.masked_fill(torch.rand(idx.shape, generator=g) < 0.1, -1)
            self.idx.append(idx.to(work.device))
            self.weights.append(torch.rand(idx.shape, generator=g).to(work.device))
            g = torch.Generator(work.device).manual_seed(2 * source + 1)
            self.x.append(torch.randn(work.num_tokens, work.hidden, generator=g, device=work.device).bfloat16())
        owner = [torch.where(idx >= 0, idx // self.num_local, -1) for idx in self.idx]
        ranks = torch.arange(size, device=work.device)
        self.in_rank = [(o.unsqueeze(2) == ranks).any(1) for o in owner]  # [T, R] of every source

    @property
    def num_tokens_per_rank(self) -> Tensor:
        return self.in_rank[self.rank].sum(0).int()

    @property
    def num_tokens_per_node(self) -> Tensor:
        return self.in_rank[self.rank].unflatten(1, (-1, self.num_local_ranks)).any(2).sum(0).int()

    @property
    def num_tokens_per_expert(self) -> Tensor:
        picks = self.idx[self.rank]
        return torch.bincount(picks[picks >= 0], minlength=self.work.num_experts).int()

    @cached_property
    def prefix_matrix(self) -> Tensor:
        """[i, j]: rows that rank j gets from ranks 0 … i."""
        return torch.stack([m.sum(0) for m in self.in_rank]).cumsum(0).int()

    @property
    def num_received(self) -> int:
        return int(self.prefix_matrix[-1, self.rank])

    def arriving(self, of: Iterable[Tensor]) -> Tensor:
        """The rows of every rank's tensor that come here, by (source rank, token)."""
        return torch.cat([t[m[:, self.rank]] for t, m in zip(of, self.in_rank, strict=True)])

    @property
    def source_tokens(self) -> Tensor:
        return torch.cat([m[:, self.rank].nonzero().squeeze(1) for m in self.in_rank]).int()

    @property
    def topk_idx(self) -> Tensor:
        local = self.arriving(self.idx) - self.rank * self.num_local
        return torch.where((local >= 0) & (local < self.num_local), local, -1)

    @property
    def topk_weights(self) -> Tensor:
        return torch.where(self.topk_idx >= 0, self.arriving(self.weights), 0.0)

    def tokens_per_expert(self, alignment: int) -> list[int]:
        local = self.topk_idx
        counts = torch.bincount(local[local >= 0], minlength=self.num_local).tolist()
        return [-(-n // alignment) * alignment for n in counts]

    @staticmethod
    def expert_result(rows: Tensor, rank: int) -> Tensor:
        """What rank `rank` makes of rows: each rank something else, so that a row summed for the wrong one shows."""
        return rows * (rank + 1.5)

    def combined(self, biases: Iterable[Tensor] = ()) -> Tensor:
        """From +0.0 the biases, then each rank's row by ascending rank, in float32, rounded once; with sums of several ranks
        these are made and rounded first, in the same way."""
        x = self.x[self.rank]
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for bias in biases:
            total += bias.float()
        for first in range(0, self.size, self.sums_of):
            node, here = torch.zeros_like(total), self.in_rank[self.rank][:, first : first + self.sums_of]
            for rank in range(first, first + self.sums_of):
                goes = here[:, rank - first : rank - first + 1]
                node = torch.where(goes, node + self.expert_result(x, rank).float(), node)
            total = torch.where(here.any(1, keepdim=True), total + node.to(x.dtype).float(), total)
        return total.to(x.dtype)

    @property
    def combined_weights(self) -> Tensor:
        """Every pick's weight has come back from the one rank that had it."""
        return torch.where(self.idx[self.rank] >= 0, self.weights[self.rank], 0.0)


def same(got: Any, expected: Tensor, what: str) -> None:
    """Bit for bit; names the first element that is not."""
    assert isinstance(got, Tensor), f"{what} is {got!r}"
    assert got.dtype == expected.dtype, f"{what} is {got.dtype}, not {expected.dtype}"
    assert got.shape == expected.shape, f"{what} has shape {list(got.shape)}, not {list(expected.shape)}"
    ints = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    a, b = (t.contiguous().view(ints) for t in (got, expected))
    if not torch.equal(a, b):
        wrong = (a != b).nonzero()
        at = tuple(wrong[0].tolist())
        raise AssertionError(f"{what}: {len(wrong)} elements differ, the first at {list(at)}: {got[at]}, not {expected[at]}")


# The checks ---------------------------------------------------------------------------------------------------------------


class Checks:
    """One rank's checks; each raises AssertionError."""

    def __init__(self, buffer: Buffer, work: Work) -> None:
        self.buffer, self.work = buffer, work
        local = buffer.group_size // buffer.num_nodes
        sums_of = local if buffer.two_level else 1
        self.ref = Reference(work, buffer.rank, buffer.group_size, holes=True, num_local_ranks=local, sums_of=sums_of)
        self.x, self.idx, self.weights = (of[buffer.rank] for of in (self.ref.x, self.ref.idx, self.ref.weights))
        self.fp8 = work.hidden % fp8.BLOCK == 0

    def run(self) -> None:
        self.passed("get_dispatch_layout", self.layout)
        payloads = ["BF16", "FP8"] if self.fp8 else ["BF16"]
        for payload in payloads:
            for with_topk in (False, True):
                for async_finish in (False, True):
                    for previous in (False, True):
                        name = f"{payload}, {'with' if with_topk else 'without'} top-k (async={async_finish}, {previous=})"
                        how = (payload, with_topk, async_finish, previous)
                        self.passed(name, partial(self.dispatch_and_combine, *how))
        self.passed("num_worst_tokens", self.worst)
        self.passed("tuning arguments and a plain tuple as handle", self.plain_handle)

    def passed(self, name: str, check: Callable[[], None]) -> None:
        if self.buffer.rank == 0:
            print(f"[testing] {name} ... ", end="", flush=True)
        check()
        self.buffer.check()
        dist.barrier()  # everybody's check has passed
        if self.buffer.rank == 0:
            print("passed", flush=True)

    def laid_out(self, **how: Any) -> tuple[dict[str, Any], Any]:
        per_rank, per_node, per_expert, in_rank, event = self.buffer.get_dispatch_layout(self.idx, self.work.num_experts, **how)
        counts = {"num_tokens_per_rank": per_rank, "num_tokens_per_rdma_rank": per_node}
        return counts | {"num_tokens_per_expert": per_expert, "is_token_in_rank": in_rank}, event

    def layout(self) -> None:
        got, _ = self.laid_out()
        same(got["num_tokens_per_rank"], self.ref.num_tokens_per_rank, "num_tokens_per_rank")
        same(got["num_tokens_per_expert"], self.ref.num_tokens_per_expert, "num_tokens_per_expert")
        same(got["is_token_in_rank"], self.ref.in_rank[self.buffer.rank], "is_token_in_rank")
        if self.buffer.num_nodes > 1:
            same(got["num_tokens_per_rdma_rank"], self.ref.num_tokens_per_node, "num_tokens_per_rdma_rank")
        else:
            assert got["num_tokens_per_rdma_rank"] is None

    def streams(self, async_finish: bool, previous: bool) -> dict[str, Any]:
        how: dict[str, Any] = {"async_finish": async_finish}
        if previous:
            how |= {"previous_event": Buffer.capture(), "allocate_on_comm_stream": async_finish}
        return how

    def payload(self, kind: str, x: Tensor) -> Any:
        return fp8.quantize_blocks(x) if kind == "FP8" else x

    def same_rows(self, got: Any, kind: str, what: str) -> None:
        if kind == "BF16":
            same(got, self.ref.arriving(self.ref.x), what)
            return
        pairs = [fp8.quantize_blocks(x) for x in self.ref.x]
        for i, part in enumerate(("data", "scales")):
            # As bytes: torch cannot cat FP8 everywhere.
            expected = self.ref.arriving([pair[i].view(torch.uint8) for pair in pairs])
            same(got[i].contiguous().view(torch.uint8), expected, f"{what} ({part})")

    def dispatch_and_combine(self, kind: str, with_topk: bool, async_finish: bool, previous: bool) -> None:
        ref, buffer = self.ref, self.buffer
        how = partial(self.streams, async_finish, previous)
        layout, event = self.laid_out(**how())
        if async_finish:
            event.current_stream_wait()
        picks: dict[str, Any] = {"topk_idx": self.idx, "topk_weights": self.weights} if with_topk else {}
        x = self.payload(kind, self.x)
        recv, idx, weights, counts, handle, event = buffer.dispatch(x, **layout, **picks, expert_alignment=ALIGNMENT, **how())
        if async_finish:
            event.current_stream_wait()
        self.same_rows(recv, kind, "recv_x")
        assert counts == ref.tokens_per_expert(ALIGNMENT), f"num_recv_tokens_per_expert_list: {counts}"
        if with_topk:
            same(idx, ref.topk_idx, "recv_topk_idx")
            same(weights, ref.topk_weights, "recv_topk_weights")
        else:
            assert idx is None and weights is None
        assert handle is not None
        if buffer.num_nodes > 1:
            assert len(handle) == 10
            same(handle[-4], ref.prefix_matrix[:, buffer.rank], "recv_gbl_rank_prefix_sum")
        else:
            assert len(handle) == 6
            same(handle[0], ref.prefix_matrix, "rank_prefix_matrix")
            same(handle[3], ref.source_tokens, "recv_src_idx")

        again, *nothing, event = buffer.dispatch(x, handle=handle, **how())
        if async_finish:
            event.current_stream_wait()
        assert nothing == [None] * 4
        self.same_rows(again, kind, "recv_x of the cached handle")

        rows = recv if isinstance(recv, Tensor) else ref.arriving(ref.x)
        y = ref.expert_result(rows, buffer.rank)
        z, sums, event = buffer.combine(y, handle, topk_weights=weights, **how())
        if async_finish:
            event.current_stream_wait()
        same(z, ref.combined(), "combined_x")
        if with_topk:
            same(sums, ref.combined_weights, "combined_topk_weights")
        else:
            assert sums is None
        visible = buffer.empty_like(y).copy_(y)
        biases = (self.x, self.x.flip(0).contiguous())
        z, _, event = buffer.combine(visible, handle, bias=biases, **how())
        if async_finish:
            event.current_stream_wait()
        same(z, ref.combined(biases), "combined_x with bias, from a peer-visible tensor")

    def worst(self) -> None:
        ref, n = self.ref, self.ref.num_received
        bound = self.work.num_tokens * self.buffer.group_size
        layout, _ = self.laid_out()
        recv, idx, weights, counts, handle, _ = self.buffer.dispatch(
            self.x, **layout, topk_idx=self.idx, topk_weights=self.weights, num_worst_tokens=bound
        )
        assert counts == [] and handle is not None and isinstance(recv, Tensor) and idx is not None and weights is not None
        assert recv.size(0) == idx.size(0) == weights.size(0) == bound
        same(recv[:n], ref.arriving(ref.x), "recv_x")
        same(idx[:n], ref.topk_idx, "recv_topk_idx")
        same(weights[:n], ref.topk_weights, "recv_topk_weights")
        assert not recv[n:].count_nonzero() and not weights[n:].count_nonzero(), "rows after the last are not zero"
        assert bool((idx[n:] == -1).all()), "recv_topk_idx after the last row is not -1"
        z, sums, _ = self.buffer.combine(ref.expert_result(recv, self.buffer.rank), handle, topk_weights=weights)
        same(z, ref.combined(), "combined_x")
        same(sums, ref.combined_weights, "combined_topk_weights")

    def plain_handle(self) -> None:
        """Users keep handles' tensors and pass V1's five tuning numbers."""
        ref, config = self.ref, Config(8, 6, 256, 6, 128)
        layout, _ = self.laid_out()
        *_, handle, _ = self.buffer.dispatch(self.x, **layout, config=config)
        assert handle is not None
        plain = tuple(handle)
        again = self.buffer.dispatch(self.x, handle=plain, config=config)[0]
        assert isinstance(again, Tensor)
        same(again, ref.arriving(ref.x), "recv_x")
        z = self.buffer.combine(ref.expert_result(again, self.buffer.rank), plain, config=config)[0]
        same(z, ref.combined(), "combined_x")


# The timings --------------------------------------------------------------------------------------------------------------


class Tuning:
    """Times cached dispatches and combines for several numbers of SMs, on uniform routing."""

    def __init__(self, buffer: Buffer, work: Work) -> None:
        self.buffer, self.work = buffer, work
        ref = Reference(work, buffer.rank, buffer.group_size, holes=False)
        self.x, idx, weights = (of[buffer.rank] for of in (ref.x, ref.idx, ref.weights))
        del ref
        per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, work.num_experts)
        self.fresh: dict[str, Any] = {"num_tokens_per_rank": per_rank, "num_tokens_per_expert": per_expert}
        self.fresh |= {
            "num_tokens_per_rdma_rank": per_node,
            "is_token_in_rank": in_rank,
            "topk_idx": idx,
            "topk_weights": weights,
        }
        self.over_network = 0  # rows that this rank sends to other nodes
        if per_node is not None:
            own = buffer.rank // (buffer.group_size // buffer.num_nodes)
            self.over_network = int(per_node.sum() - per_node[own])
        recv, _, _, _, handle, _ = buffer.dispatch(self.x, **self.fresh)
        assert isinstance(recv, Tensor) and handle is not None
        self.handle = handle
        self.visible = buffer.empty_like(recv).copy_(recv)
        self.anywhere = recv.clone()
        self.layout = partial(buffer.get_dispatch_layout, idx, work.num_experts)

    def run(self) -> None:
        self._report("get_dispatch_layout", "", self.milliseconds(self.layout), 0)
        row = 2 * self.work.hidden
        buffer, x, handle = self.buffer, self.x, self.handle
        calls: dict[str, tuple[Callable[[Config], Any], int]] = {
            "dispatch BF16, cached": (lambda c: buffer.dispatch(x, handle=handle, config=c), row),
            "dispatch BF16, fresh": (lambda c: buffer.dispatch(x, **self.fresh, config=c), row),
            "combine, peer-visible input": (lambda c: buffer.combine(self.visible, handle, config=c), row),
            "combine, any input": (lambda c: buffer.combine(self.anywhere, handle, config=c), row),
        }
        if self.work.hidden % fp8.BLOCK == 0:
            pair = fp8.quantize_blocks(x)
            row_and_scales = self.work.hidden + 4 * (self.work.hidden // fp8.BLOCK)
            calls["dispatch FP8, cached"] = (lambda c: buffer.dispatch(pair, handle=handle, config=c), row_and_scales)
        for name, (call, row_bytes) in calls.items():
            found = {n: self.milliseconds(partial(call, Config(n))) for n in self._candidates()}
            for n, ms in found.items():
                self._report(name, f"SMs {n}" if self.work.device == "cuda" else "", ms, row_bytes)
            if len(found) > 1:
                best = min(found, key=lambda n: found[n])
                self._report(name, f"best: SMs {best}", found[best], row_bytes)

    def _candidates(self) -> list[int]:
        """The collective engine does not care."""
        if self.buffer.engine == "collective":
            return [Buffer.num_sms]
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        sharing = -(-self.buffer.group_size // torch.cuda.device_count())
        return resident_sms(SMS, properties.multi_processor_count, sharing)[::-1]

    def milliseconds(self, call: Callable[[], Any]) -> float:
        """A call's: the slowest rank's, the median over rounds."""
        if self.work.device == "cuda":
            return bench_gpu.slowest_ms(call, CALLS, ROUNDS)
        times = []
        for _ in range(ROUNDS):
            dist.barrier()
            start = time.perf_counter()
            call()
            slowest = torch.tensor([1e3 * (time.perf_counter() - start)], dtype=torch.float64)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            times.append(slowest.item())
        return statistics.median(times)

    def _report(self, name: str, how: str, ms: float, row_bytes: int) -> None:
        """GB/s as in DeepEP, of what rank 0 received or, in a combine, sends back; with several nodes also what it gives to the
        others (in a combine: gets from them), each row once a node."""
        if self.buffer.rank == 0:
            rate = f"{row_bytes * self.anywhere.size(0) / ms / 1e6:8.1f} GB/s" if row_bytes else ""
            if row_bytes and self.buffer.num_nodes > 1:
                rate += f", network {row_bytes * self.over_network / ms / 1e6:.1f} GB/s"
            print(f"[tuning] {name:28s}{how:16s}{1e3 * ms:10.1f} us{rate}", flush=True)


def check_and_tune(buffer: Buffer, work: Work, more: Callable[[Checks], None] = lambda checks: None) -> None:
    """One rank's part, `more` checks included; gives the buffer back."""
    if buffer.rank == 0:
        print(f"[config] {buffer.group_size} ranks, {buffer.num_nodes} nodes, {buffer.engine} engine, {work}", flush=True)
    checks = Checks(buffer, work)
    checks.run()
    more(checks)
    del checks
    gc.collect()
    if work.tune:
        shared = buffer.group_size // buffer.num_nodes > torch.cuda.device_count()
        if buffer.rank == 0 and work.device == "cuda" and shared and not bench_gpu.mps_is_running():
            print("[tuning] ranks share a GPU without MPS and take turns on it: these times mean nothing", flush=True)
        Tuning(buffer, work).run()
    gc.collect()
    dist.barrier()
    buffer.destroy()


def arena_bytes(work: Work, size: int) -> int:
    """The largest result is num_worst_tokens'; a few of them, and a quarter for staging."""
    return 8 * size * work.num_tokens * work.hidden * 2 if work.device == "cuda" else 0
