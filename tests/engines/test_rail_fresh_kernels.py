"""The kernels that make the tables of the rdma engine's fresh dispatches, on a CPU, against torch's twins and sums; no ranks
run here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from needs import ROOT
from rail_requests import NEEDS_KERNELS
from torch import Tensor

from deepep_train.engines.rail_rows import words_bytes
from deepep_train.engines.rail_tables import Counts, slots

pytestmark = NEEDS_KERNELS
ROWS = Path(__file__).with_name("test_rail_fresh.py")


def random_places(token_in_node: Tensor, g: torch.Generator) -> Tensor:
    """int32 [T, nodes]: every node's tokens in an order of its own; -1: not there."""
    places = torch.full(token_in_node.shape, -1, dtype=torch.int32)
    for node, there in enumerate(token_in_node.unbind(1)):
        places[there, node] = torch.randperm(int(there.sum()), generator=g).to(torch.int32)
    return places


@pytest.mark.parametrize("has_weights", [True, False])
@pytest.mark.parametrize(("nodes", "local"), [(1, 3), (9, 4), (2, 32), (3, 33), (2, 64)])
def test_words_of_rows(nodes: int, local: int, has_weights: bool, library: str) -> None:
    """The kernels against torch's twins, without ranks that run: bits of one node alone, in one word or two."""
    from rail_on_cpu import End, params
    from rail_twins import mask_words

    g, end = torch.Generator().manual_seed(local), End(library, 0)
    in_rank = torch.rand(90, nodes * local, generator=g) < 0.8 / local
    weights, idx = torch.rand(90, 3, generator=g), torch.randint(-1, 999, (90, 3), generator=g)
    token_in_node = in_rank.view(90, nodes, local).any(2)
    places = random_places(token_in_node, g)
    send_at = F.pad(token_in_node.sum(0).cumsum(0), (1, 0)).to(torch.int32)
    num_rows, mask_at, row_words = int(send_at[-1]), 7 if has_weights else 4, words_bytes(3, has_weights, local) // 4
    words = torch.full((num_rows + 5, row_words), 77, dtype=torch.int32)  # room for more than there are
    token = torch.full((num_rows + 5,), 77, dtype=torch.int32)
    p = params()["PackParams"]()
    p.is_token_in_rank, p.topk_idx, p.topk_weights = in_rank.data_ptr(), idx.data_ptr(), weights.data_ptr() * has_weights
    p.place, p.send_at, p.words, p.token = (t.data_ptr() for t in (places, send_at, words, token))
    p.num_tokens, p.top_k, p.num_ranks, p.num_nodes, p.row_words = 90, 3, nodes * local, nodes, row_words
    end.pack_words(p, 0)

    node, leaves = token_in_node.t().nonzero().unbind(1)
    row = (send_at[node] + places[leaves, node]).long()
    assert row.sort().values.tolist() == list(range(num_rows))
    masks = in_rank.view(90, nodes, local)[leaves, node][row.argsort()]
    leaves = leaves[row.argsort()]
    assert torch.equal(token[:num_rows].long(), leaves)
    assert (token[num_rows:] == 77).all()
    assert (words[num_rows:] == 77).all()
    expected = torch.zeros(num_rows, row_words, dtype=torch.int32)
    expected[:, 0], expected[:, 1:4] = leaves, idx[leaves]
    if has_weights:
        expected[:, 4:7] = weights[leaves].view(torch.int32)
    bits = mask_words(masks)
    expected[:, mask_at : mask_at + bits.size(1)] = bits
    assert torch.equal(words[:num_rows], expected)

    # These rows as what has come: from each node some, the last of them beyond what was counted.
    cuts = torch.randint(0, num_rows + 1, (nodes - 1,), generator=g).sort().values
    recv_at = torch.tensor([0, *cuts.tolist(), num_rows], dtype=torch.int32)
    theirs = torch.stack([part.sum(0) for part in masks.split(recv_at.diff().tolist())]).to(torch.int32)
    theirs[-1] = (theirs[-1] - 1).clamp(min=0)
    begin = torch.randint(0, 1000, (nodes, local), generator=g).to(torch.int32)
    wanted = slots(Counts([], [], theirs.to(torch.int64), begin.to(torch.int64), 0), recv_at, masks)
    slot, number = (torch.full((num_rows + 7, local), 77, dtype=torch.int32) for _ in range(2))
    addresses = words.data_ptr() + torch.arange(num_rows) * 4 * row_words
    s = params()["SlotParams"]()
    s.addresses, s.recv_at, s.theirs, s.begin = (t.data_ptr() for t in (addresses, recv_at, theirs, begin))
    s.slot, s.number, s.capacity, s.mask_at = slot.data_ptr(), number.data_ptr(), num_rows + 7, mask_at
    s.num_nodes, s.num_local_ranks = nodes, local
    end.find_slots(s, 0)
    assert torch.equal(slot[:num_rows], wanted)
    assert (slot[num_rows:] == -1).all()
    assert (number[num_rows:] == -1).all()
    for r in range(local):
        assert number[:num_rows, r][wanted[:, r] >= 0].tolist() == list(range(int(theirs[:, r].sum())))


def test_the_head_of_a_row_of_counts_is_the_kernels() -> None:
    from deepep_train.engines.rail_rows import _HEAD

    assert f"constexpr int kHead = {_HEAD};" in (ROOT / "csrc/rdma/fresh.hpp").read_text()


@pytest.mark.parametrize("layout", ["rank", "expert"])
@pytest.mark.parametrize(("num_ranks", "local", "rank"), [(70, 10, 33), (96, 3, 95), (40, 40, 7)])
def test_counts_of_many_ranks(num_ranks: int, local: int, rank: int, layout: str, library: str) -> None:
    """The digest of random counts, against sums in torch."""
    from rail_on_cpu import End, params

    g, nodes, num_experts = torch.Generator().manual_seed(num_ranks), num_ranks // local, 3 * num_ranks
    node, rail, end = rank // local, rank % local, End(library, 0)
    widths = [5, num_ranks, nodes, num_experts]
    table = torch.randint(0, 50, (num_ranks, sum(widths)), generator=g).to(torch.int32)
    head, to_rank, to_node, picks = table.split_with_sizes(widths, 1)
    head.copy_(torch.tensor([0, 7, 8, 0, 0]))
    parts = {"found": 8, "send_at": nodes + 1, "recv_at": nodes + 1, "received_upto": num_ranks}
    parts |= {"theirs": nodes * local, "begin": nodes * local, "expert_base": 3}
    block = torch.full((6 + sum(parts.values()),), 77, dtype=torch.int32)
    per_expert, *others = block.split_with_sizes([6, *parts.values()])
    p, rows, report = (
        params()["DigestParams"](),
        torch.full((num_ranks,), 77, dtype=torch.int32),
        torch.zeros(3 + 3 * num_ranks),
    )
    p.table, p.rows, p.report, p.tokens_per_expert = (t.data_ptr() for t in (table, rows, report, per_expert))
    for name, part in zip(parts, others, strict=True):
        setattr(p, name, part.data_ptr())
    p.result_words, p.room, p.widest, p.rank, p.num_ranks, p.num_local_ranks = block.numel(), 99, 1, rank, num_ranks, local
    p.num_experts, p.alignment, p.expert_layout, p.row_words = num_experts, 4, int(layout == "expert"), table.size(1)
    end.digest(p, 0)

    found, send_at, recv_at, upto, theirs, begin, base = others
    here = to_rank[:, node * local : (node + 1) * local].long()
    padded = (picks.long().sum(0) + 3) // 4 * 4
    per_rank = padded.view(num_ranks, 3).sum(1) if layout == "expert" else to_rank.sum(0)
    assert torch.equal(rows.long(), per_rank)
    assert found[:5].tolist() == [0, 0, int(here[:, rail].sum()), int(per_rank[rank]), int(to_node.max())]
    mine = padded[3 * rank : 3 * rank + 3]
    assert per_expert.view(torch.int64).tolist() == mine.tolist()
    assert base.tolist() == [0, *mine.cumsum(0)[:2].tolist()]
    assert send_at.tolist() == [0, *to_node[rank].cumsum(0).tolist()]
    assert recv_at.tolist() == [0, *to_node[rail::local, node].cumsum(0).tolist()]
    assert torch.equal(upto.long(), here[:, rail].cumsum(0))
    assert torch.equal(theirs.view(nodes, local).long(), here[rail::local])
    assert torch.equal(begin.view(nodes, local).long(), (here.cumsum(0) - here)[rail::local])


def libasan() -> Path | None:
    if shutil.which("g++") is None:
        return None
    told = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout.strip()
    return Path(told) if Path(told).is_absolute() and "LD_PRELOAD" not in os.environ else None


@pytest.mark.skipif(libasan() is None, reason="there is no g++ with libasan, or this is the run under it")
def test_the_kernels_touch_only_what_is_theirs() -> None:
    """Under g++'s sanitizers: what memcheck would look for, which over rdma cannot run (docs/rdma.md)."""
    which = "words_of_rows or counts_of_many_ranks or (every_row and rank and 4)"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-s",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        __file__,
        str(ROWS),
        "-k",
        which,
    ]
    environment = os.environ | {"LD_PRELOAD": str(libasan()), "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "passed" in done.stdout and "failed" not in done.stdout
