"""Low-latency exchanges, whose every rank's inputs any rank can make, and what must come of them: a loop over experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from harness import same_bits
from torch import Tensor

from deepep_train import fp8

STYLES = ("uniform", "skewed", "sparse", "same expert twice", "one rank", "nowhere")
KINDS = ("bf16", "fp8", "round", "ue8m0")


@dataclass(frozen=True)
class Case:
    """One dispatch and combine.

    Attributes:
        tokens: of every rank.
        kind: how rows travel.
        hook, zero_copy: as the calls take them.
        logfmt: combine sends 10 bits a value, so that its result is only near.
        asynchronous: which calls come with `async_finish`: "", "combine" or "both"; not with hooks.
    """

    tokens: tuple[int, ...]
    most: int
    hidden: int
    num_experts: int
    top_k: int
    style: str = "uniform"
    kind: str = "fp8"
    hook: bool = False
    zero_copy: bool = False
    seed: int = 0
    logfmt: bool = False
    asynchronous: str = ""

    @property
    def size(self) -> int:
        return len(self.tokens)

    @property
    def arguments(self) -> dict[str, Any]:
        return {
            "use_fp8": self.kind != "bf16",
            "round_scale": self.kind in ("round", "ue8m0"),
            "use_ue8m0": self.kind == "ue8m0",
            "return_recv_hook": self.hook,
            "async_finish": self.asynchronous == "both",
        }

    @lru_cache(maxsize=32)  # noqa: B019 - cases are few and small
    def inputs(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """x, topk_idx, topk_weights of one rank, on the CPU."""
        g = torch.Generator().manual_seed(1000 * self.seed + rank)
        n = self.tokens[rank]
        # Blocks of very different magnitude, all zeros among them.
        magnitudes = torch.randint(-20, 8, (n, self.hidden // 128), generator=g).float().exp2()
        magnitudes[torch.rand(magnitudes.shape, generator=g) < 0.1] = 0.0
        x = (torch.randn(n, self.hidden, generator=g) * magnitudes.repeat_interleave(128, 1)).bfloat16()
        score = torch.rand(n, self.num_experts, generator=g)
        if self.style == "skewed":
            score /= torch.arange(1, self.num_experts + 1)
        if self.style == "one rank":
            score[:, : self.num_experts // self.size] += 1.0
        idx = score.topk(min(self.top_k, self.num_experts)).indices
        if self.style == "same expert twice":
            idx[:, -1] = idx[:, 0]
        if self.style == "sparse":
            idx[torch.rand(idx.shape, generator=g) < 0.5] = -1
        if self.style == "nowhere":
            idx[:] = -1
        return x, idx, torch.randn(n, idx.size(1), generator=g)

    @lru_cache(maxsize=32)  # noqa: B019
    def sent(self, rank: int) -> tuple[Tensor, Tensor | None]:
        """A rank's rows, as they travel, and their scales."""
        x = self.inputs(rank)[0]
        if self.kind == "bf16":
            return x, None
        data, scales = fp8.quantize_blocks(x, power_of_two=self.kind != "fp8")
        return data, fp8.pack_ue8m0(scales) if self.kind == "ue8m0" else scales

    def results(self, rows: Tensor, expert: int) -> Tensor:
        """What an expert makes of rows [n, hidden] in float32, rounded once."""
        return (rows.float() * (1.0 + 0.37 * (expert % 7))).bfloat16()

    def arrived(self, data: Tensor, scales: Tensor | None) -> Tensor:
        return data if scales is None else fp8.dequantize_blocks(data, scales)

    def combined(self, rank: int, without: frozenset[int] = frozenset()) -> Tensor:
        """[T, hidden], as `low_latency_combine` must give it; without the ranks' experts."""
        return self._sum(rank, without, lambda weights, rows: weights * rows).bfloat16()

    def allowance(self, rank: int, without: frozenset[int] = frozenset()) -> Tensor:
        """How far LogFMT's rounding, and then bfloat16's, may take each value from `combined`."""
        apart = self._sum(rank, without, lambda weights, rows: weights.abs() * logfmt_error(rows))
        return apart + self.combined(rank, without).float().abs() * 2**-7 + 1e-30

    def _sum(self, rank: int, without: frozenset[int], term: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        _, idx, weights = self.inputs(rank)
        x = self.arrived(*self.sent(rank))
        local = self.num_experts // self.size
        total = torch.zeros(x.shape, dtype=torch.float32)
        for k in range(idx.size(1)):
            for e in idx[:, k].unique().tolist():
                if e < 0 or e // local in without:
                    continue
                tokens = (idx[:, k] == e).nonzero().flatten()
                total[tokens] += term(weights[tokens, k : k + 1], self.results(x[tokens], e).float())
        return total


def logfmt_error(rows: Tensor) -> Tensor:
    """The most that LogFMT with 10 bits may change each value of float32 [n, hidden]: half a step, in blocks of 128; or all
    of what is 32 octaves below its block's largest."""
    blocks = rows.view(rows.size(0), -1, 128)
    logs = blocks.abs().log2()
    most = logs.amax(2, keepdim=True)
    least = torch.where(logs == -torch.inf, torch.inf, logs).amin(2, keepdim=True).maximum(most - 32)
    step = torch.where(most > -torch.inf, (most - least) / 510, 0.0)
    half = blocks.abs() * ((step.exp2() - 1) / 2 + 1e-4)
    return torch.where(logs < least, least.exp2(), half).nan_to_num(0.0, 0.0).view(rows.shape)


def wrong(what: str, got: Tensor, expected: Tensor) -> list[str]:
    """Why two tensors are not the same bits, if they are not."""
    got = got.detach().cpu()
    if same_bits(got, expected):
        return []
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return [f"{what}: {got.dtype} {list(got.shape)}, not {expected.dtype} {list(expected.shape)}"]
    a, b = (
        t.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8).view(t.size(0), -1) for t in (got, expected)
    )
    rows = (a != b).any(1).nonzero().flatten().tolist()
    return [f"{what}: {len(rows)} of {got.size(0)} rows differ, first {rows[:4]}: {got[rows[0]]} not {expected[rows[0]]}"]


def check_received(case: Case, rank: int, recv: Any, count: Tensor, handle: tuple, without: frozenset[int]) -> list[str]:
    """What is wrong with what a dispatch returned on `rank`, sources `without` being left out."""
    data, scales = recv if case.kind != "bf16" else (recv, None)
    sources, ranges, most, hidden, num_experts = handle
    local = case.num_experts // case.size
    errors = [] if (most, hidden, num_experts) == (case.most, case.hidden, case.num_experts) else [f"handle {handle[2:]}"]
    if scales is not None and scales.numel() and scales.size(1) > 1 and scales.stride(1) != 1:
        errors.append("scales are not column-major")
    sent = [case.sent(r) for r in range(case.size)]
    picks = [case.inputs(r)[1] for r in range(case.size)]
    count, ranges, sources = count.cpu(), ranges.cpu(), sources.cpu()
    for e in range(local):
        tokens = [
            (idx == rank * local + e).any(1).nonzero()[:, 0] if r not in without else idx[:0, 0] for r, idx in enumerate(picks)
        ]
        numbers = torch.tensor([len(t) for t in tokens])
        n, where = int(numbers.sum()), f"rank {rank}, local expert {e}"
        errors += wrong(f"count of {where}", count[e : e + 1], torch.tensor([n], dtype=torch.int32))
        errors += wrong(f"ranges of {where}", ranges[e], (numbers.cumsum(0) - numbers) << 32 | numbers)
        errors += wrong(f"sources of {where}", sources[e, :n], torch.cat(tokens).to(torch.int32))
        rows = torch.cat([bits(sent[r][0])[t] for r, t in enumerate(tokens)])
        errors += wrong(f"rows of {where}", bits(data[e, :n]), rows)
        if scales is not None:
            expected = torch.cat([s[t] for (_, s), t in zip(sent, tokens, strict=True) if s is not None])
            errors += wrong(f"scales of {where}", scales[e, :n].contiguous(), expected)
    return errors


def bits(t: Tensor) -> Tensor:
    """FP8 as bytes, which more operations take."""
    return t.view(torch.uint8) if t.dtype.itemsize == 1 else t


def fill(case: Case, rank: int, y: Tensor, recv: Any, count: Tensor) -> None:
    """The experts' results, and NaN behind each expert's rows."""
    data, scales = recv if case.kind != "bf16" else (recv, None)
    local = case.num_experts // case.size
    y.fill_(float("nan"))
    for e, n in enumerate(count.tolist()):
        rows = case.arrived(data[e, :n], None if scales is None else scales[e, :n].contiguous())
        y[e, :n] = case.results(rows, rank * local + e)


def finish(device: str = "cuda") -> None:
    """Ranks may be threads of one process, where a copy to the CPU that waits for a kernel may hold up the others' copies."""
    if device != "cpu":
        torch.cuda.current_stream().synchronize()


def round_trip(buffer: Any, rank: int, case: Case, device: str, without: frozenset[int] = frozenset()) -> list[str]:
    """Dispatch, experts, combine; what is wrong with the results."""
    x, idx, weights = (t.to(device) for t in case.inputs(rank))
    local = case.num_experts // case.size
    stats = torch.full((local,), 7, dtype=torch.int32, device=device)
    got = buffer.low_latency_dispatch(x, idx, case.most, case.num_experts, stats, **case.arguments)
    recv, count, handle, event, hook = got
    if case.hook:
        hook()
    if case.asynchronous == "both":
        event.current_stream_wait()
    finish(device)
    errors = check_received(case, rank, recv, count, handle, without)
    errors += wrong("statistics", stats, count.cpu() + 7)
    shape = (local, case.size * case.most, case.hidden)
    if case.zero_copy:
        y = buffer.get_next_low_latency_combine_buffer(handle)
        assert y.shape == shape
    else:
        y = torch.empty(shape, dtype=torch.bfloat16, device=device)
    fill(case, rank, y, recv, count)
    how = {"zero_copy": case.zero_copy, "return_recv_hook": case.hook, "use_logfmt": case.logfmt}
    z, event, hook = buffer.low_latency_combine(y, idx, weights, handle, async_finish=bool(case.asynchronous), **how)
    if case.hook:
        hook()
    if case.asynchronous:
        del handle, got  # whose memory must not be among what is now given out and written to
        written = [torch.full(idx.shape, 1 << 30, dtype=torch.int32, device=device) for _ in range(8)]
        event.current_stream_wait()
        del written
    finish(device)
    if not case.logfmt:
        return errors + wrong(f"combined on rank {rank}", z, case.combined(rank, without))
    apart = (z.cpu().float() - case.combined(rank, without).float()).abs()
    excess = apart - case.allowance(rank, without)
    return errors + ([f"combined on rank {rank}: {float(excess.max())} above what LogFMT may"] if (excess > 0).any() else [])
