"""Where the rdma engine's tables send every row, against the picture of all ranks; on CPUs, nothing moves."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from draws import Exchange
from harness import run_ranks
from rail_twins import arranged, counts_of, mask_words, masks_of, placed_picks
from reference import Given, Picture, Row

from deepep_train.engines.peers import Peers
from deepep_train.engines.rail_rows import as_elements, as_rows
from deepep_train.engines.rail_tables import Tables, leaving, slots
from deepep_train.engines.two_level import learn_forwarding
from deepep_train.routing import expert_rows, rank_layout, tokens_per_node

MESHES = pytest.mark.parametrize("mesh", [(4, 2), (4, 1), (6, 3), (6, 2)], ids=str)
STYLES = pytest.mark.parametrize("style", ["uniform", "mixed"])


def drawn(mesh: tuple[int, int], style: str) -> Picture:
    case = Exchange((7, 0, 5, 11, 3, 8)[: mesh[0]], 1, 4, 2, style, torch.float32)
    return Picture(case.given(), case.num_experts)


def check(picture: Picture, local: int, tables: list[Tables]) -> None:
    """Follows every row over the rail and to its ranks."""
    size = len(tables)
    found: list[dict[int, Row]] = [{} for _ in range(size)]
    for forwarder, mine in enumerate(tables):
        node, rail = divmod(forwarder, local)
        at = mine.recv_at.tolist()
        assert mine.slot.shape == (at[-1], local)
        for origin in range(size // local):
            source = origin * local + rail
            theirs = tables[source]
            first, end = theirs.send_at[node : node + 2].tolist()
            assert end - first == at[origin + 1] - at[origin]
            for i in range(end - first):
                token = int(theirs.token[first + i])
                assert theirs.place[token, node] == i
                for there, slot in enumerate(mine.slot[at[origin] + i].tolist()):
                    if slot >= 0:
                        assert slot not in found[node * local + there]
                        found[node * local + there][slot] = Row(source, token)
    for rank, rows in enumerate(found):
        assert [rows[i] for i in range(len(rows))] == picture.arrive(rank, "rank").rows
    assert {mine.most for mine in tables} == {max(n for r in range(size) for n in picture.num_tokens_per_node(r, local))}


@MESHES
@STYLES
def test_masks_that_travel_with_their_rows(mesh: tuple[int, int], style: str) -> None:
    size, local = mesh
    picture = drawn(mesh, style)
    in_rank = [rank_layout(g.topk_idx, picture.num_experts, size).is_token_in_rank for g in picture.given]
    counts_RR = torch.stack([m.sum(0) for m in in_rank])
    per_node = torch.stack([tokens_per_node(m, size // local) for m in in_rank])
    counts = [counts_of(r, local, counts_RR, per_node) for r in range(size)]
    sent = [leaving(one, masks, 0) for one, masks in zip(counts, in_rank, strict=True)]
    done = []
    for rank, mine in enumerate(sent):
        node, rail = divmod(rank, local)
        assert mine.slot.unique().tolist() in ([], [-1])
        came = []
        for source in range(rail, size, local):
            first, end = sent[source].send_at[node : node + 2].tolist()
            in_node = in_rank[source][:, node * local : (node + 1) * local]
            came.append(mask_words(in_node[sent[source].token[first:end].long()]))
        masks = masks_of(torch.cat(came), local)
        done.append(replace(mine, slot=slots(counts[rank], mine.recv_at, masks)))
        # What a failed stream leaves behind, NaNs, sends no row beyond a tensor.
        wild = slots(counts[rank], mine.recv_at, torch.ones_like(masks))
        assert (wild.amax(0) < counts_RR[:, node * local : (node + 1) * local].sum(0)).all() if wild.numel() else True
    check(picture, local, done)


@pytest.mark.parametrize("local", [1, 31, 32, 33, 64])
def test_masks_survive_their_words(local: int) -> None:
    mask = torch.rand(9, local, generator=torch.Generator().manual_seed(local)) < 0.5
    assert torch.equal(masks_of(mask_words(mask), local), mask)


@pytest.mark.parametrize("seed", range(4))
def test_picks_are_placed_as_the_collective_engine_arranges_them(seed: int) -> None:
    """Rows behind the last token's are padding; some tokens have no expert here, and some name one twice. What the twin says
    the kernels do, which are nvlink's, is what the layout needs."""
    idx = torch.randint(-1, 3, ((0, 1, 9, 40)[seed], 4), generator=torch.Generator().manual_seed(seed))
    experts = expert_rows(idx, 3, 4)
    sizes = torch.tensor(experts.tokens_per_expert)
    rows_of, row_slot = arranged(placed_picks(idx, (sizes.cumsum(0) - sizes).to(torch.int32)), experts.num_rows + 5)
    slot = row_slot.tolist()
    assert slot == [r if r < idx.size(0) else -1 for r in experts.source_row.tolist()] + [-1] * 5
    for n, rows in enumerate(rows_of.tolist()):
        found = [m for m, source in enumerate(slot) if source == n]
        assert rows == found + [-1] * (4 - len(found))


def learn(rank: int, size: int, group: dist.ProcessGroup, given: list[Given], num_experts: int, local: int) -> Any:
    from deepep_train.engines.rails import Rails

    peers = Peers(group, 20)
    in_rank = rank_layout(given[rank].topk_idx, num_experts, size).is_token_in_rank
    recv_counts = peers.all_gather(in_rank.sum(0), "dispatch")[:, rank].tolist()
    per_node = peers.all_gather(tokens_per_node(in_rank, size // local), "dispatch").tolist()
    forwarding = learn_forwarding(peers, in_rank, per_node, local)
    node, rail = divmod(rank, local)
    here = SimpleNamespace(
        peers=peers, nodes=size // local, local=local, node=node, rail=rail, device=torch.device("cpu"), stream=lambda: 0
    )
    return Rails.learn(here, forwarding, in_rank, recv_counts, "dispatch")  # type: ignore[arg-type]


@pytest.mark.skipif(
    importlib.util.find_spec("deepep_train._C") is None, reason="the package was built without nvcc, so it has no kernels"
)
@MESHES
@STYLES
def test_tables_of_a_rebuilt_handle(mesh: tuple[int, int], style: str) -> None:
    picture = drawn(mesh, style)
    check(picture, mesh[1], run_ranks(mesh[0], learn, picture.given, picture.num_experts, mesh[1]))


def test_the_limit_of_nodes_is_the_kernels() -> None:
    from deepep_train.engines.base import MAX_NODES

    assert f"constexpr int kMaxNodes = {MAX_NODES};" in (Path(__file__).parents[2] / "csrc/rdma/params.hpp").read_text()


@pytest.mark.parametrize("hidden", [16, 13, 0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8], ids=str)
def test_rows_come_back_as_no_views(hidden: int, dtype: torch.dtype) -> None:
    """Autograd lets nobody write to views that a function has made."""
    for num_rows in (6, 0):
        x = torch.randn(num_rows, hidden).to(dtype)
        back = as_elements(as_rows(x).clone(), x)
        assert torch.equal(back, x) and not back._is_view()
