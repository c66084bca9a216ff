"""DeepEP V1's low-latency calls on an engine without low-latency kernels, against a loop over all ranks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import assert_same_bits, run_ranks

from deepep_train import ArgumentError, Buffer, DeepEPError, fp8

HIDDEN, EXPERTS, TOP_K, MOST = 512, 12, 3, 9
TOKENS = (5, 0, 9, 4)


def _inputs(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(rank)
    n = TOKENS[rank]
    x = torch.randn(n, HIDDEN, generator=g).bfloat16()
    idx = torch.rand(n, EXPERTS, generator=g).topk(TOP_K).indices
    idx[torch.rand(n, TOP_K, generator=g) < 0.2] = -1
    return x, idx, torch.rand(n, TOP_K, generator=g)


def _run(rank: int, size: int, group: dist.ProcessGroup, scales: str | None, internode: bool) -> dict[str, Any]:
    buffer = Buffer(group, low_latency_mode=True, num_local_ranks=1 if internode else None)
    x, idx, w = _inputs(rank)
    stats = torch.full((EXPERTS // size,), 100, dtype=torch.int32)
    kind = {"use_fp8": scales is not None, "round_scale": scales in ("round", "ue8m0"), "use_ue8m0": scales == "ue8m0"}
    got = buffer.low_latency_dispatch(x, idx, MOST, EXPERTS, stats, **kind, return_recv_hook=True)
    recv, count, handle, _, hook = got
    assert hook is not None
    hook()
    experts_out = buffer.get_next_low_latency_combine_buffer(handle)
    if scales is None:
        experts_out.copy_(recv)
    else:
        data, s = recv
        assert s.stride(-2) == 1  # column-major in the last two dimensions
        for e in range(data.size(0)):
            experts_out[e] = fp8.dequantize_blocks(data[e], s[e])
    out = torch.empty(x.shape, dtype=torch.bfloat16)
    z, _, hook = buffer.low_latency_combine(experts_out, idx, w, handle, zero_copy=True, out=out)
    assert z is out and hook is None
    return {"recv": recv, "count": count, "handle": tuple(handle), "stats": stats, "z": z}


@pytest.mark.parametrize(
    "size,scales,internode", [(2, None, False), (2, "plain", True), (3, "round", False), (4, "ue8m0", True)]
)
def test_against_all_ranks_at_once(size: int, scales: str | None, internode: bool) -> None:
    results = run_ranks(size, _run, scales, internode)
    sent = [_inputs(r) for r in range(size)]
    per_rank = EXPERTS // size
    for rank, got in enumerate(results):
        source, ranges = got["handle"][:2]
        assert got["handle"][2:] == (MOST, HIDDEN, EXPERTS)
        for local in range(per_rank):
            rows = [
                (r, t) for r in range(size) for t in range(TOKENS[r]) for e in sent[r][1][t] if e == rank * per_rank + local
            ]
            assert int(got["count"][local]) == len(rows) == int(got["stats"][local]) - 100
            for r in range(size):
                mine = [i for i, row in enumerate(rows) if row[0] == r]
                first, number = int(ranges[local, r]) >> 32, int(ranges[local, r]) & 0xFFFFFFFF
                assert number == len(mine) and (not mine or first == mine[0])
            for i, (r, t) in enumerate(rows):
                assert int(source[local, i]) == t
                if scales is None:
                    assert_same_bits(got["recv"][local, i], sent[r][0][t])
                    continue
                data, s = fp8.quantize_blocks(sent[r][0][t : t + 1], power_of_two=scales != "plain")
                assert_same_bits(got["recv"][0][local, i], data[0])
                assert_same_bits(got["recv"][1][local, i].contiguous(), (fp8.pack_ue8m0(s) if scales == "ue8m0" else s)[0])
        x, idx, w = sent[rank]
        arrived = x
        if scales is not None:
            arrived = fp8.dequantize_blocks(*fp8.quantize_blocks(x, power_of_two=scales != "plain"))
        total = torch.zeros(x.shape, dtype=torch.float32)
        for k in range(TOP_K):
            total += torch.where(idx[:, k : k + 1] >= 0, w[:, k : k + 1], 0.0) * arrived.float()
        assert_same_bits(got["z"], total.bfloat16())


def _misuse(rank: int, size: int, group: dist.ProcessGroup) -> list[str]:
    buffer = Buffer(group)
    x = torch.zeros(4, HIDDEN, dtype=torch.bfloat16)
    idx = torch.zeros(4, 1, dtype=torch.int64)
    w = torch.ones(4, 1)
    said = []
    handle = buffer.low_latency_dispatch(x, idx, 4, EXPERTS, use_fp8=False)[2]
    y = torch.zeros(EXPERTS // size, 4 * size, HIDDEN, dtype=torch.bfloat16)
    calls = [
        lambda: buffer.low_latency_combine(y, idx, w, handle, use_logfmt=True, zero_copy=True),
        lambda: buffer.low_latency_dispatch(x, idx, 3 if rank else 4, EXPERTS),
        lambda: buffer.low_latency_dispatch(x, idx, 4, EXPERTS, use_ue8m0=True),
        lambda: buffer.low_latency_dispatch(x[:, :100], idx, 4, EXPERTS),
        lambda: buffer.low_latency_dispatch(x[:, :0], idx, 4, EXPERTS),
        lambda: buffer.low_latency_dispatch(x.float(), idx, 4, EXPERTS),
        lambda: buffer.low_latency_dispatch(x, idx + EXPERTS, 4, EXPERTS),
        lambda: buffer.low_latency_combine(x, idx, w, (1, 2, 3)),
    ]
    for call in calls:
        with pytest.raises(ArgumentError) as caught:
            call()
        said.append(str(caught.value))
    with pytest.raises(ArgumentError, match="handle must be what"):
        buffer.get_next_low_latency_combine_buffer((1, 2, 3))
    with pytest.raises(DeepEPError, match="leave ranks out"):
        buffer.low_latency_update_mask_buffer(1, True)
    for wrong in (("4", 512, EXPERTS), (4, 0, EXPERTS), (4, 512, -1)):
        with pytest.raises(ArgumentError, match=r"num_max_dispatch_tokens_per_rank|hidden|num_experts"):
            buffer.clean_low_latency_buffer(*wrong)
    buffer.low_latency_dispatch(x, idx, 4, EXPERTS)  # still works
    return said


def test_misuse_raises_on_every_rank() -> None:
    first, second = run_ranks(2, _misuse)
    assert first == second
    assert "zero_copy=True" in first[0]
    assert "hidden size above 0, got 0" in first[4]
    assert "rank 1" in first[1] and "num_max_dispatch_tokens_per_rank=3" in first[1]


WRONG_DISPATCH: dict[str, Any] = {
    "topk_idx": torch.zeros(4, 2, dtype=torch.int32),
    "topk_idx, its rank": torch.zeros(4, dtype=torch.int64),
    "topk_idx, its tokens": torch.zeros(3, 2, dtype=torch.int64),
    "topk_idx, its range": torch.full((4, 2), EXPERTS),
    "topk_idx, none": None,
    "x": torch.zeros(4, 0, dtype=torch.bfloat16),
    "num_max_dispatch_tokens_per_rank": 3.0,
    "num_experts": EXPERTS + 1,
    "num_experts, too many": EXPERTS << 40,
    "use_fp8": 1,
    "round_scale": None,
    "use_ue8m0": True,
    "cumulative_local_expert_recv_stats": torch.zeros(EXPERTS, dtype=torch.int32),
    "dispatch_wait_recv_cost_stats": torch.zeros(2),
    "return_recv_hook": 2,
    "async_finish": "soon",
}
WRONG_COMBINE: dict[str, Any] = {
    "topk_idx": torch.zeros(4, 2, dtype=torch.int32),
    "topk_idx, its rank": torch.zeros(8, dtype=torch.int64),
    "topk_idx, no choices": torch.zeros(4, 0, dtype=torch.int64),
    "topk_idx, of another dispatch": torch.zeros(8, 1, dtype=torch.int64),
    "topk_idx, its range": torch.full((4, 2), EXPERTS),
    "topk_weights": torch.zeros(4, 2, dtype=torch.float64),
    "use_logfmt": 1,
    "zero_copy": None,
    "out": torch.zeros(4, HIDDEN + 1, dtype=torch.bfloat16),
    "combine_wait_recv_cost_stats": torch.zeros(2),
    "return_recv_hook": 2,
    "async_finish": "soon",
}
DIFFERENT: dict[str, Any] = {"num_max_dispatch_tokens_per_rank": 5, "topk_idx": torch.zeros(4, 3, dtype=torch.int64)}
DIFFERENT |= {"round_scale": True, "use_fp8": False}


def _wrong_on_one(rank: int, size: int, group: dist.ProcessGroup) -> list[tuple[str, str, tuple[int, ...]]]:
    buffer, seen = Buffer(group, timeout=20), []
    x, idx, w = torch.zeros(4, HIDDEN, dtype=torch.bfloat16), torch.zeros(4, 2, dtype=torch.int64), torch.ones(4, 2)
    good = {"x": x, "topk_idx": idx, "num_max_dispatch_tokens_per_rank": 4, "num_experts": EXPERTS}
    handle = buffer.low_latency_dispatch(**good)[2]
    y = torch.zeros(EXPERTS // size, 4 * size, HIDDEN, dtype=torch.bfloat16)
    back = {"x": y, "topk_idx": idx, "topk_weights": w, "handle": handle}
    for call, right, table in (
        (buffer.low_latency_dispatch, good, WRONG_DISPATCH | {f"{k}, differs": v for k, v in DIFFERENT.items()}),
        (buffer.low_latency_combine, back, WRONG_COMBINE),
    ):
        for name, value in table.items():
            changed = {name.partition(",")[0]: value} if rank else {}
            with pytest.raises(ArgumentError) as caught:
                call(**right | changed)
            seen.append((name, str(caught.value), caught.value.ranks))
    with pytest.raises(DeepEPError, match=r"no memory for 6 experts' num_max_dispatch_tokens_per_rank=140737488355328"):
        buffer.low_latency_dispatch(x, idx, 1 << 47, EXPERTS)
    assert copy.copy(handle) is handle and copy.deepcopy([handle])[0] is handle
    buffer.low_latency_combine(**back)  # still works
    return seen


def test_whatever_is_wrong_on_one_rank_is_named_on_all() -> None:
    first, second = run_ranks(2, _wrong_on_one)
    assert first == second
    assert len(first) == len(WRONG_DISPATCH) + len(WRONG_COMBINE) + len(DIFFERENT)
    for name, text, ranks in first:
        if name.endswith("differs"):
            assert "the ranks disagree on" in text and " on rank 1" in text
            assert name != "use_fp8, differs" or "use_fp8=False" in text
            continue
        argument = name.partition(",")[0]
        assert ranks == (1,) and f"rank 1: {argument}" in text, (name, text)


def test_size_hint_holds_what_travels() -> None:
    slots = 2 * 256 * 128
    assert Buffer.get_low_latency_rdma_size_hint(128, 7168, 8, 256) >= slots * 7168 * 2
