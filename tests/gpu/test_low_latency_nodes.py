"""The low-latency kernels between nodes, bit for bit against a loop over experts. Nodes are groups of ranks on one machine:
puts between them go through NVSHMEM, as between machines, and end as stores to the same GPU's memory."""

from __future__ import annotations

from dataclasses import replace

import low_latency_masks as masks
import low_latency_ranks as ranks
import pytest
import torch
from low_latency_cases import STYLES, Case
from shared import run_ranks
from test_low_latency_kernels import cases_of, none_wrong
from test_rdma import pytestmark as pytestmark  # noqa: PLC0414 - skipped where those are

MESHES = ((2, 1), (4, 2), (8, 4), (8, 2))  # ranks, of which so many are a node
meshes = pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"{m[0] // m[1]}x{m[1]}")


@meshes
def test_random_exchanges(mesh: tuple[int, int]) -> None:
    size, local = mesh
    none_wrong(run_ranks(size, ranks.round_trips, cases_of(size, 24, 7 * size + local), local, timeout=90))


@meshes
def test_logfmt_is_as_near_as_it_may_be(mesh: tuple[int, int]) -> None:
    size, local = mesh
    cases = [replace(case, logfmt=True, zero_copy=False) for case in cases_of(size, 8, 100 + size)]
    none_wrong(run_ranks(size, ranks.round_trips, cases, local, timeout=90))


@pytest.mark.parametrize("mesh", [(4, 2), (8, 4)], ids=str)
def test_the_models_shapes(mesh: tuple[int, int]) -> None:
    size, local = mesh
    large = Case(tuple(128 - r for r in range(size)), 128, 7168, 32 * size, 8)
    cases = [
        large,
        replace(large, kind="bf16", hook=True, zero_copy=size == 4),
        Case((3, 2) * (size // 2), 3, 16384, 1024, 16, kind="ue8m0"),
        Case((2,) * size, 2, 7168, 64, 9, "skewed", "round", zero_copy=True),
    ]
    none_wrong(run_ranks(size, ranks.round_trips, cases, local, timeout=90))


@meshes
def test_the_same_bits_every_time(mesh: tuple[int, int]) -> None:
    size, local = mesh
    case = Case(tuple(32 - r for r in range(size)), 32, 512, 4 * size, 4, "skewed", "fp8")
    for seen, errors in run_ranks(size, ranks.soak, case, 1000, local, timeout=90):
        assert len(seen) == 1 and not errors, (len(seen), errors[:3])


@pytest.mark.parametrize("hook", [False, True])
@meshes
def test_graphs(mesh: tuple[int, int], hook: bool) -> None:
    size, local = mesh
    cases = [Case((16,) * size, 20, 512, 2 * size, 2, style, "ue8m0", hook, seed=i) for i, style in enumerate(STYLES)]
    none_wrong(run_ranks(size, ranks.graphs, cases, local, timeout=90))


@meshes
def test_two_results_in_flight_and_late_hooks(mesh: tuple[int, int]) -> None:
    size, local = mesh
    for seed in range(4):
        cases = [Case((9,) * size, 9, 256, 2 * size, 2, STYLES[seed], kind, True, True, seed) for kind in ("fp8", "bf16")]
        none_wrong(run_ranks(size, ranks.overlapping, cases, local))


def test_the_same_bits_as_within_a_node() -> None:
    """Of values whose sums show their order, combined from any tensor and without copies."""
    case = Case((33, 0, 20, 40), 40, 640, 16, 7, kind="bf16")
    for zero_copy in (False, True):
        asked = replace(case, zero_copy=zero_copy)
        within, across = (run_ranks(4, ranks.combined_bits, asked, local) for local in (None, 2))
        assert within == across


@pytest.mark.parametrize("mesh", [(2, 1), (4, 2)], ids=str)
def test_a_rank_that_is_masked_and_comes_back(mesh: tuple[int, int]) -> None:
    size, local = mesh
    none_wrong(run_ranks(size, masks.left_out, Case((8,) * size, 8, 256, 2 * size, 2), local, fresh=True, timeout=60))


@pytest.mark.parametrize("mesh", [(2, 1), (4, 2)], ids=str)
def test_a_rank_that_stops(mesh: tuple[int, int]) -> None:
    size, local = mesh
    case = Case((8,) * size, 8, 256, 2 * size, 2, kind="bf16")
    none_wrong(run_ranks(size, masks.stopped, case, local, fresh=True, timeout=60))


def test_the_layer_uses_them() -> None:
    for fast, normal, engine in run_ranks(4, ranks.layer, 2):
        assert engine == "rdma"
        torch.testing.assert_close(fast, normal, rtol=2**-5, atol=2**-7)


def test_wrong_calls_do_no_harm() -> None:
    """Each is refused; then an exchange is right."""
    within, across = (run_ranks(2, ranks.refusals, local) for local in (None, 1))
    assert within == across


@pytest.mark.parametrize("kind", ["bf16", "fp8", "ue8m0"])
@pytest.mark.parametrize("style", ["uniform", "same expert twice"])
def test_what_is_put_is_counted(kind: str, style: str) -> None:
    case = Case((33, 0, 20, 40), 40, 1024, 16, 6, style, kind)
    for (dispatched, sent), (combined, back), replayed in run_ranks(4, ranks.put_bytes, case, 2):
        assert dispatched == sent and combined == back
        assert replayed == 3 * (sent + back)


def test_later_buffers_use_the_memory_of_destroyed_ones() -> None:
    for errors, sizes in run_ranks(4, ranks.rebuilt, Case((8,) * 4, 8, 512, 8, 2), 2, fresh=True, timeout=90):
        assert not errors
        assert sizes[0] == 1 and sizes[1] == sizes[-1] == 2  # blocks that there are after each buffer
