"""Expected copies against draws and against hand counts, times against published tables."""

from __future__ import annotations

import json
from dataclasses import replace
from math import comb

import pytest
import torch

from deepep_train.cli import main
from deepep_train.cli import plan_model as m

V3 = m.Work(8, num_groups=8, num_topk_groups=4)


def drawn(work: m.Work, units: int, tokens: int = 20000) -> float:
    """Units that a token reaches, the mean over random tokens: the groups with the best expert, then the best experts there."""
    g = torch.Generator().manual_seed(1)
    groups, chosen = work.groups
    score = torch.rand(tokens, work.num_experts, generator=g)
    picked = score.view(tokens, groups, -1).amax(2).topk(chosen, 1).indices
    allowed = torch.zeros(tokens, groups, dtype=torch.bool).scatter_(1, picked, True)
    score[~allowed.repeat_interleave(work.num_experts // groups, 1)] = -1
    experts = score.topk(work.num_topk, 1).indices
    reached = torch.zeros(tokens, units, dtype=torch.bool).scatter_(1, experts // (work.num_experts // units), True)
    return float(reached.sum(1).double().mean())


@pytest.mark.parametrize(
    "work",
    [
        m.Work(1),
        m.Work(4),
        V3,
        m.Work(2, num_groups=8, num_topk_groups=4),  # several groups a node
        m.Work(16, 4, num_groups=8, num_topk_groups=2),  # several nodes a group
        m.Work(2, 2, num_experts=16, num_topk=3, num_groups=2, num_topk_groups=1),
        m.Work(4, 1, num_experts=8, num_topk=8),
    ],
    ids=str,
)
def test_expected_copies_are_those_of_random_tokens(work: m.Work) -> None:
    for units in (work.nodes, work.ranks):
        assert m.units_reached(work, units) == pytest.approx(drawn(work, units), rel=0.01)


def test_expected_copies_counted_by_hand() -> None:
    assert m.units_reached(m.Work(2, 1, num_experts=4, num_topk=2), 2) == pytest.approx(1 + 4 / comb(4, 2))
    assert m.units_reached(m.Work(2, 1, num_experts=4, num_topk=1), 2) == 1
    assert m.units_reached(m.Work(4, 1, num_experts=4, num_topk=4), 4) == 4
    one_group = m.Work(4, 1, num_experts=8, num_topk=2, num_groups=4, num_topk_groups=1)
    assert m.units_reached(one_group, 4) == 1


def test_bytes_by_hand() -> None:
    """2 nodes of 2 GPUs, an expert each, every token to all of them: one row to the other node, forwarded to the neighbour,
    as is the one that comes from there."""
    work = m.Work(2, 2, num_tokens=10, hidden=256, num_experts=4, num_topk=4, dispatch_dtype="fp8")
    hardware = m.Hardware(nvlink_rate=1e9, nic_rate=1e6)
    dispatch, combine = (m.predict(work, hardware, operation) for operation in ("dispatch", "combine"))
    assert (dispatch.rdma_rows, dispatch.nvlink_rows) == (10, 20)
    # Two scales, rounded up to 16; number, 4 indices, 4 weights and a word with bits of a node's ranks, too.
    per_row = 256 + 16 + 48
    counts = 4 * (5 + 4 + 2 + 4096 + 1)  # head, ranks, nodes, experts; rounded up
    assert dispatch.rdma_bytes == 10 * per_row + counts
    assert dispatch.nvlink_bytes == 20 * per_row + 2 * counts
    assert dispatch.metadata_share == pytest.approx((10 * 48 + counts) / (10 * 272))
    assert combine.rdma_bytes == 10 * (512 + 16)
    assert dispatch.bound == "rdma"
    rdma, nvlink = (dispatch.rdma_bytes + 10 * m.PACKET_HEADER) / 1e6 + 10 * m.MESSAGE_SECONDS, dispatch.nvlink_bytes / 1e9
    assert (dispatch.rdma_seconds, dispatch.nvlink_seconds) == pytest.approx((rdma, nvlink))
    assert dispatch.seconds == pytest.approx(m.CALL_SECONDS + rdma + nvlink)


def test_one_link_after_the_other_unless_in_stages() -> None:
    """The rdma engine's hops follow each other, both ways."""
    for operation in ("dispatch", "combine"):
        p, two, staged, most = (m.predict(replace(V3, stages=n), m.Hardware(), operation) for n in (1, 2, 4, 99))
        assert p.seconds == pytest.approx(m.CALL_SECONDS + p.rdma_seconds + p.nvlink_seconds)
        # The network binds, so of NVLink's time that counts in which it cannot work: before a combine's first stage, or behind
        # a dispatch's last. Of 7 turns the stages have 4 and 3; 2, 2, 2 and 1; 1 each.
        for q, n, alone in ((two, 2, (3, 4)), (staged, 4, (1, 2)), (most, 7, (1, 1))):
            left = p.nvlink_seconds * alone[operation == "combine"] / V3.nodes
            assert q.seconds == pytest.approx(m.CALL_SECONDS + (n - 1) * m.STAGE_SECONDS + p.rdma_seconds + left)
    two = m.Work(2)
    assert m.predict(replace(two, stages=4), m.Hardware(), "combine") == m.predict(two, m.Hardware(), "combine")


def test_sms_are_those_that_keep_a_link_busy() -> None:
    """Whatever the other link takes: SMs are needed while theirs is at work."""
    for work in (m.Work(1), m.Work(2), V3, m.Work(4, 1)):  # links as fast as default_sms has them need 10 and 12
        assert [m.predict(work, m.Hardware(), operation).sms for operation in ("dispatch", "combine")] == [8, 10]
    assert m.predict(V3, m.Hardware(nic_rate=1e9), "dispatch").sms == 8
    assert m.predict(m.Work(4, 1), m.Hardware(nvlink_rate=1e9, nic_rate=800e9), "dispatch").sms > 8  # that pack


def test_one_node_and_one_gpu_need_no_network() -> None:
    p = m.predict(m.Work(1), m.Hardware(), "dispatch")
    assert (p.rdma_bytes, p.bound) == (0, "nvlink")
    alone = m.predict(m.Work(1, 1), m.Hardware(), "dispatch")
    assert (alone.rdma_bytes, alone.nvlink_bytes, alone.bound, alone.seconds) == (0, 0, "local", m.CALL_SECONDS)
    assert m.buffers(m.Work(1)).staging == 0


@pytest.mark.parametrize("dtype", m.DTYPES)
def test_staging_is_what_the_rdma_engine_needs(dtype: str) -> None:
    """As engines/rail_domain.py cuts `num_rdma_bytes` into segments."""
    work = m.Work(4, num_tokens=1001, hidden=7168, dispatch_dtype=dtype)
    segment = m.buffers(work).staging // 2 // 4 // 128 * 128
    row = 14336 if dtype == "fp8" else 14336 + 80  # sums; or rows, with words behind them
    assert 1001 * row <= segment < 1001 * row + 128


@pytest.mark.parametrize(("nodes", "local", "top_k", "there"), [(2, 8, 8, 80), (256, 8, 8, 80), (4, 64, 7, 80), (4, 32, 7, 64)])
def test_metadata_are_those_that_the_engine_sends(nodes: int, local: int, top_k: int, there: int) -> None:
    """A bit for each rank of a node, not of the group."""
    work = m.Work(nodes, local, num_experts=8 * nodes * local, num_topk=top_k)
    assert [m.meta_bytes(work, operation) for operation in ("dispatch", "combine")] == [there, 32]


@pytest.mark.parametrize(("dtype", "most"), [("fp8", 512), ("bf16", 2048)])
def test_where_metadata_exceed_two_percent(dtype: str, most: int) -> None:
    """As docs/rdma.md says."""
    for ranks in (16, 32, 64, 128, 256, 512, 1024, 2048):
        work = m.Work(ranks // 8, num_experts=max(256, ranks), dispatch_dtype=dtype)
        shares = {operation: m.predict(work, m.Hardware(), operation).metadata_share for operation in ("dispatch", "combine")}
        assert (shares["dispatch"] <= 0.02) == (ranks <= most)
        assert shares["combine"] <= 0.02


def test_the_command_warns_of_what_the_engines_do_not_serve(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--nodes", "300", "--gpus-per-node", "80", "--num-experts", "24000"])
    told = capsys.readouterr().out
    for limit in ("300 nodes, above the engines' limit of 256", "80 GPUs a node, above", "24000 experts, above"):
        assert f"warning: {limit}" in told


def test_the_command_warns_of_metadata(capsys: pytest.CaptureFixture[str]) -> None:
    told = []
    for nodes in ("64", "128"):
        assert main(["plan", "--nodes", nodes, "--num-experts", "1024"]) == 0
        told.append([line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")])
    assert told[0] == []
    (warning,) = told[1]
    assert "dispatch's metadata are 2.2%" in warning and "80 bytes with each row, 21024 of counts" in warning


def test_thousands_of_gpus() -> None:
    """Copies tend to one a pick."""
    times = []
    for nodes in (16, 64, 256, 1024):
        work = m.Work(nodes, num_experts=8192)
        assert 7.7 < m.units_reached(work, work.ranks) <= 8
        times.append(m.predict(work, m.Hardware(), "dispatch").seconds)
    assert times == sorted(times)


def test_limiting_groups_saves_the_network() -> None:
    unlimited = replace(V3, num_groups=0, num_topk_groups=0)
    limited, free = (m.predict(w, m.Hardware(), "combine") for w in (V3, unlimited))
    assert limited.rdma_bytes < 0.8 * free.rdma_bytes
    assert limited.seconds < free.seconds


def test_errors_against_the_published_tables_do_not_grow() -> None:
    """In docs/plan.md; a change of the model that makes any of them worse fails."""
    bounds = {8: 0.02, 16: 0.105, 32: 0.04, 64: 0.065}
    compared = m.validate()
    assert len(compared) == 8
    for row in compared:
        assert abs(row.error) <= bounds[row.ranks], row


@pytest.mark.parametrize(
    "changes,named",
    [
        ({"nodes": 0}, "--nodes 0"),
        ({"nodes": 3}, "--num-experts 256"),
        ({"num_topk": 300}, "--num-topk 300"),
        ({"num_groups": 8}, "--num-topk-groups"),
        ({"num_groups": 4, "num_topk_groups": 5}, "--num-topk-groups 5"),
        ({"num_groups": 7, "num_topk_groups": 2}, "--num-groups 7"),
        ({"num_groups": 64, "num_topk_groups": 1}, "--num-topk 8"),
        ({"dispatch_dtype": "fp4"}, "fp4"),
    ],
)
def test_work_that_cannot_be(changes: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        m.Work(**({"nodes": 2} | changes))


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    def run(*args: str) -> str:
        assert main(["plan", *args]) == 0
        return capsys.readouterr().out

    args = ("--nodes", "8", "--num-groups", "8", "--num-topk-groups", "4", "--gpu", "h200")
    text, report = run(*args), json.loads(run(*args, "--json"))
    assert report["dispatch"]["bound"] == "rdma"
    for operation in ("dispatch", "combine"):
        p = report[operation]
        assert p["seconds"] == pytest.approx(m.CALL_SECONDS + p["rdma_seconds"] + p["nvlink_seconds"])
        for name in ("seconds", "rdma_seconds", "nvlink_seconds"):
            assert f" {1e3 * p[name]:.2f} " in text
        assert f" {100 * p['metadata_share']:.1f}% " in text
    for name in ("staging", "received"):
        assert report["buffers"][name] > 0
        assert f"{report['buffers'][name] / 2**20:.0f} MiB a GPU" in text
    assert f"{report['buffers']['arena'] / 2**20:.0f} MiB for them" in text
    assert f"num_rdma_bytes={report['buffers']['staging']}" in text
    slower = json.loads(run(*args, "--json", "--rdma-gbs", "20"))
    assert slower["dispatch"]["rdma_seconds"] > 2 * report["dispatch"]["rdma_seconds"]
    assert slower["dispatch"]["nvlink_seconds"] == report["dispatch"]["nvlink_seconds"]
    compared, _, *rows = run("--validate").splitlines()
    assert "DeepEP V1's pipeline" in compared
    names = [line.split()[0] for line in rows]
    assert names == [f"EP{n}" for n in (8, 8, 16, 16, 32, 32, 64, 64)]
    assert len(json.loads(run("--validate", "--json"))) == 8


def test_bad_arguments_end_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--nodes", "3"]) == 2
    assert "--num-experts 256" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["plan", "--rdma-gbs", "-1"])
    assert "-1 must be" in capsys.readouterr().err
