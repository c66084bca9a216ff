"""How the rdma engine's ranks agree on a fresh dispatch, on CPUs: their rows of counts meet over gloo instead of the rail."""

from __future__ import annotations

import importlib.util
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks

import deepep_train as dt
from deepep_train.engines.base import MAX_EXPERTS, DispatchRequest, Payload, Prepared
from deepep_train.engines.peers import Peers
from deepep_train.routing import RankLayout, rank_layout

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepep_train._C") is None, reason="the package was built without nvcc, so it has no kernels"
)
EXPERTS, LOCAL = 8, 2


def engine_of(group: dist.ProcessGroup) -> Any:
    from deepep_train.engines.rdma import RdmaEngine

    peers, cpu = Peers(group, 20), torch.device("cpu")
    rails = SimpleNamespace(gather=lambda words, _: peers.all_gather(words, "dispatch"), device=cpu)
    zeros = torch.zeros(MAX_EXPERTS, dtype=torch.int32)
    here = SimpleNamespace(
        peers=peers, num_nodes=peers.size // LOCAL, rails=rails, _zeros=zeros, check=lambda: None, device=cpu
    )
    here._row_words = 5 + peers.size + peers.size // LOCAL + MAX_EXPERTS
    here._words, here._signature = (MethodType(f, here) for f in (RdmaEngine._words, RdmaEngine._signature))
    here.exchange = MethodType(RdmaEngine._exchange_counts, here)
    return here


def request_of(rank: int, size: int, layout: RankLayout | None = None, **other: Any) -> DispatchRequest:
    idx = torch.randint(-1, EXPERTS, (5 + rank, 3), generator=torch.Generator().manual_seed(rank))
    layout = rank_layout(idx, EXPERTS, size, size // LOCAL) if layout is None else layout
    how: dict[str, Any] = {"topk_idx": idx, "topk_weights": None, "num_experts": EXPERTS, "num_worst_tokens": 10 + rank}
    return DispatchRequest(Payload(torch.zeros(5 + rank, 16)), layout, **how | other)


def exchanged(rank: int, size: int, group: dist.ProcessGroup) -> None:
    engine = engine_of(group)
    got = engine.exchange(Prepared(lambda: request_of(rank, size)))
    layouts = [request_of(r, size).layout for r in range(size)]
    assert got.bounds == [10 + r for r in range(size)]
    assert got.counts_RR == [layout.num_tokens_per_rank.tolist() for layout in layouts]
    assert torch.equal(got.counts_RE, torch.stack([layout.num_tokens_per_expert for layout in layouts]))
    per_node = [layout.num_tokens_per_rdma_rank for layout in layouts]
    assert [row.tolist() for row in got.per_node_RN] == [n.tolist() for n in per_node if n is not None]

    def told(text: str, **other: Any) -> None:
        with pytest.raises(dt.ArgumentError, match=text):
            engine.exchange(Prepared(lambda: request_of(rank, size, **(other if rank == 1 else {}))))

    def fails() -> DispatchRequest:
        raise dt.ArgumentError("x must be better", "x") if rank == 3 else AssertionError

    with pytest.raises(dt.ArgumentError, match="dispatch: rank 3: x must be better"):
        engine.exchange(Prepared(fails if rank == 3 else lambda: request_of(rank, size)))
    layout = request_of(rank, size).layout
    assert layout.num_tokens_per_rdma_rank is not None
    told("disagree on alignment: 1 on rank 0, 2, 3; 4 on rank 1", alignment=4)
    told("rank 1: the rdma engine serves up to 4096 experts", num_experts=2 * MAX_EXPERTS)
    told("rank 1: num_tokens_per_rank=", layout=layout._replace(num_tokens_per_rank=layout.num_tokens_per_rank + 1))
    told(
        "rank 1: num_tokens_per_rdma_rank=",
        layout=layout._replace(num_tokens_per_rdma_rank=layout.num_tokens_per_rdma_rank + 1),
    )
    told("rank 1: num_tokens_per_expert=", layout=layout._replace(num_tokens_per_expert=layout.num_tokens_per_expert + 1))
    told("rank 1: topk_idx must lie in", topk_idx=torch.full((6, 3), EXPERTS))
    assert engine.exchange(Prepared(lambda: request_of(rank, size))).bounds == got.bounds


def test_counts_and_what_is_wrong_on_one_rank() -> None:
    run_ranks(4, exchanged)
