"""Where the rdma engine's tables send every row, against the picture of all ranks; on CPUs, nothing moves."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from draws import Exchange
from harness import run_ranks
from reference import Given, Picture, Row

from deepep_train.engines.peers import Peers
from deepep_train.engines.two_level import learn_forwarding, two_level
from deepep_train.routing import rank_layout

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepep_train._C") is None, reason="the package was built without nvcc, so it has no kernels"
)


def learn(rank: int, size: int, group: dist.ProcessGroup, given: list[Given], num_experts: int, local: int) -> Any:
    from deepep_train.engines.rails import Rails

    peers = Peers(group, 20)
    in_rank = rank_layout(given[rank].topk_idx, num_experts, size).is_token_in_rank
    recv_counts = peers.all_gather(in_rank.sum(0), "dispatch")[:, rank].tolist()
    forwarding = learn_forwarding(peers, in_rank, local)
    hops = two_level(peers, in_rank, forwarding, recv_counts, local).hops
    node, rail = divmod(rank, local)
    here = SimpleNamespace(
        peers=peers, nodes=size // local, local=local, node=node, rail=rail, device=torch.device("cpu"), _stream=lambda: 0
    )
    return Rails.learn(here, forwarding, hops[0].send_row, in_rank, recv_counts, "dispatch")  # type: ignore[arg-type]


@pytest.mark.parametrize("mesh", [(4, 2), (4, 1), (6, 3), (6, 2)], ids=str)
@pytest.mark.parametrize("style", ["uniform", "mixed"])
def test_every_row_finds_its_place(mesh: tuple[int, int], style: str) -> None:
    size, local = mesh
    case = Exchange((7, 0, 5, 11, 3, 8)[:size], 1, 4, 2, style, torch.float32)
    picture = Picture(case.given(), case.num_experts)
    tables = run_ranks(size, learn, picture.given, case.num_experts, local)
    found: list[dict[int, Row]] = [{} for _ in range(size)]
    for forwarder, mine in enumerate(tables):
        node, rail = divmod(forwarder, local)
        at = mine.recv_at.tolist()
        assert mine.slot.shape == (at[-1], local)
        assert mine.forwarded == at[-1]
        for origin in range(size // local):
            source = origin * local + rail
            theirs = tables[source]
            first, end = theirs.send_at[node : node + 2].tolist()
            assert end - first == at[origin + 1] - at[origin]
            assert mine.back[origin] == (0 if origin == node else end - first) == theirs.over[node] or origin == node
            for i in range(end - first):
                token = int(theirs.token[first + i])
                assert theirs.place[token, node] == i
                for there, slot in enumerate(mine.slot[at[origin] + i].tolist()):
                    if slot >= 0:
                        found[node * local + there][slot] = Row(source, token)
    for rank, rows in enumerate(found):
        assert [rows[i] for i in range(len(rows))] == picture.arrive(rank, "rank").rows
    assert len({mine.most for mine in tables}) == 1
    assert tables[0].most == max(n for r in range(size) for n in picture.num_tokens_per_node(r, local))
