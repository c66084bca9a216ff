"""What the low-latency engine does on the CPU side of its kernels, which are not run here: slots, hooks, refusals. Needs a
build with kernels, no GPU."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("deepep_train._C") is None:
    pytest.skip("the package was built without nvcc, so it has no kernels", allow_module_level=True)

from deepep_train import ArgumentError, DeepEPError, PeerTimeoutError
from deepep_train.engines import low_latency, low_latency_blocks
from deepep_train.engines.low_latency import LowLatency
from deepep_train.engines.low_latency_far import OtherNodes
from deepep_train.engines.peers import Peers


class Memory:
    """Stands for the arena."""

    def __init__(self) -> None:
        self.given: list[Tensor] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        self.given.append(torch.empty(shape, dtype=dtype))
        return self.given[-1]

    def offset(self, t: Tensor) -> int:
        return t.data_ptr()

    def holds(self, t: Tensor) -> bool:
        return any(t.data_ptr() == other.data_ptr() for other in self.given)


class Kernels:
    """Remembers what would have been launched, and which peers were to be forgotten, in which shapes."""

    def __init__(self) -> None:
        self.launched: list[tuple[str, int]] = []
        self.forgotten: list[tuple[int, int]] = []

    def __getattr__(self, name: str) -> Any:
        def launch(p: Any, *how: int) -> None:
            self.launched.append((name, p.set))
            if name == "forget":
                self.forgotten.append((how[0], p.max_tokens))

        phases = ("dispatch_send", "dispatch_receive", "combine_send", "combine_receive", "forget")
        return launch if name in phases else getattr(low_latency_c, name)


low_latency_c = low_latency._C.low_latency


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    fake = Kernels()
    monkeypatch.setattr(low_latency, "_C", type("C", (), {"low_latency": fake}))
    for name, value in {"current_stream": lambda *_: Stream(), "is_current_stream_capturing": lambda: False}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(low_latency_blocks, "_given_back", [])
    return fake


class Stream:
    def synchronize(self) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    __hash__ = object.__hash__


class Event:
    """`is_over`: of all of them."""

    is_over = True

    def record(self, _: Stream) -> None:
        pass

    def query(self) -> bool:
        return self.is_over


@contextmanager
def _ordered() -> Iterator[int]:
    yield 0


@pytest.fixture
def engine(kernels: Kernels) -> LowLatency:
    arena: Any = Memory()
    return LowLatency(Peers(None, 5.0), arena, [0], 4, True, _ordered, torch.device("cpu"))


X, IDX, WEIGHTS = torch.zeros(3, 512, dtype=torch.bfloat16), torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2)
BUFFER = object()


def dispatch(engine: LowLatency, with_hook: bool = False, x: Tensor = X, idx: Tensor = IDX, **how: Any) -> Any:
    given = {"max_tokens": 4, "num_experts": 5, "use_fp8": True, "round_scale": False, "use_ue8m0": False} | how
    given = {"async_finish": False} | given
    stats = {"cumulative_stats": None, "wait_stats": None}
    return engine.dispatch(BUFFER, x, idx, **{**stats, **given}, with_hook=with_hook)


def combine(engine: LowLatency, handle: Any, y: Tensor | None = None, with_hook: bool = False, **how: Any) -> Any:
    y = torch.zeros(5, 4, 512, dtype=torch.bfloat16) if y is None else y
    given = {"use_logfmt": False, "zero_copy": False, "out": None, "wait_stats": None, "async_finish": False} | how
    return engine.combine(BUFFER, y, IDX, WEIGHTS, handle, **given, with_hook=with_hook)


def test_what_comes_back_and_what_is_launched(engine: LowLatency, kernels: Kernels) -> None:
    (data, scales), count, handle, hook = dispatch(engine)
    assert hook is None and data.dtype == torch.float8_e4m3fn and data.shape == (5, 4, 512)
    assert scales.shape == (5, 4, 4) and scales.stride(1) == 1 and count.shape == (5,)
    assert [t.shape if isinstance(t, Tensor) else t for t in handle] == [(5, 4), (5, 1), 4, 512, 5]
    assert combine(engine, handle)[0].shape == (3, 512)
    packed = dispatch(engine, use_ue8m0=True, round_scale=True)[0][1]
    assert packed.dtype == torch.int32 and packed.shape == (5, 4, 1)
    assert kernels.launched == [
        ("dispatch_send", 0), ("dispatch_receive", 0), ("combine_send", 0), ("combine_receive", 0),
        ("dispatch_send", 1), ("dispatch_receive", 1),
    ]  # fmt: skip


def test_hooks_receive_once(engine: LowLatency, kernels: Kernels) -> None:
    *_, handle, hook = dispatch(engine, with_hook=True)
    assert kernels.launched == [("dispatch_send", 0)]
    with pytest.raises(DeepEPError, match="hook of an earlier low_latency_dispatch"):
        combine(engine, handle)
    hook()
    with pytest.raises(DeepEPError, match="called once"):
        hook()
    _, hook = combine(engine, handle, engine.combine_buffer(BUFFER, handle), with_hook=True, zero_copy=True)
    hook()
    assert kernels.launched[1:] == [("dispatch_receive", 0), ("combine_send", 0), ("combine_receive", 0)]
    dropped = dispatch(engine, with_hook=True)
    del dropped
    dispatch(engine)
    with pytest.raises(DeepEPError, match="hook of an earlier low_latency_dispatch"):
        dispatch(engine)


def test_an_earlier_hook_does_not_take_a_later_ones_turn(engine: LowLatency, kernels: Kernels) -> None:
    *_, handle, sent = dispatch(engine, with_hook=True)
    sent()
    _, first = combine(engine, handle, with_hook=True)
    with pytest.raises(DeepEPError, match="hook of a low_latency_dispatch may be called once"):
        sent()
    first()
    _, second = combine(engine, handle, with_hook=True)
    with pytest.raises(DeepEPError, match="hook of a low_latency_combine may be called once"):
        first()
    second()
    assert [name for name, _ in kernels.launched] == ["dispatch_send", "dispatch_receive"] + 2 * [
        "combine_send",
        "combine_receive",
    ]


def test_kernels_get_rows_that_are_aligned(engine: LowLatency, monkeypatch: pytest.MonkeyPatch) -> None:
    launch, given = engine._launch, []
    monkeypatch.setattr(engine, "_launch", lambda name, p, *how: (given.append(p), launch(name, p, *how))[1])
    *_, handle, _ = dispatch(engine, x=torch.zeros(3 * 512 + 1, dtype=torch.bfloat16)[1:].view(3, 512))
    combine(engine, handle, torch.zeros(5 * 4 * 512 + 1, dtype=torch.bfloat16)[1:].view(5, 4, 512))
    assert (given[0].x % 16, given[1].y % 16) == (0, 0)


def test_what_peers_read_lives_until_their_next_dispatch(engine: LowLatency) -> None:
    *_, handle, _ = dispatch(engine)
    y = engine._arena.empty((5, 4, 512), torch.bfloat16)
    combine(engine, handle, y, zero_copy=True)
    space, slots = handle.space, handle.set
    assert space.shown[slots] is y
    dispatch(engine)
    assert space.shown[slots] is y
    *_, hook = dispatch(engine, with_hook=True)
    assert space.shown[slots] is y
    hook()
    assert space.shown[slots] is None


def test_two_results_may_be_alive(engine: LowLatency) -> None:
    one, two = dispatch(engine), dispatch(engine)
    with pytest.raises(DeepEPError, match="2 results are alive"):
        dispatch(engine)
    combine(engine, one[2])
    three = dispatch(engine)
    with pytest.raises(ArgumentError, match="a later low_latency_dispatch has taken"):
        combine(engine, one[2])
    del two
    dispatch(engine)
    combine(engine, three[2])
    combine(engine, three[2])  # as often as one likes


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda e: dispatch(e, x=torch.cat([X, X]), idx=torch.cat([IDX, IDX])), "6 tokens"),
        (lambda e: dispatch(e, x=X[:, :100]), "multiple of 128, got 100"),
        (lambda e: dispatch(e, x=X[:, :128], use_ue8m0=True, round_scale=True), "multiple of 512, got 128"),
        (lambda e: dispatch(e, x=torch.zeros(3, 16512, dtype=torch.bfloat16)), "hidden size up to 16384, got 16512"),
        (lambda e: dispatch(e, idx=torch.zeros(3, 17, dtype=torch.int64)), "top-k up to 16, got 17"),
        (lambda e: dispatch(e, num_experts=1025), "num_experts up to 1024, got 1025"),
        (lambda e: dispatch(e, use_ue8m0=True), "use_ue8m0=True needs"),
        (lambda e: dispatch(e, use_fp8=1), "use_fp8 must be True or False, got 1"),
        (lambda e: dispatch(e, with_hook=True, async_finish=True), "return_recv_hook=True cannot be had"),
        (lambda e: dispatch(e, wait_stats=torch.zeros(1)), "dispatch_wait_recv_cost_stats must be a int64"),
        (lambda e: combine(e, (1, 2, 3)), "handle must be"),
        (lambda e: combine(e, dispatch(e)[2], zero_copy=True), "get_next_low_latency_combine_buffer"),
        (lambda e: combine(e, dispatch(e)[2], out=torch.cat([X, X], 1)[:, ::2]), "out must be contiguous"),
        (lambda e: e.update_mask(1, True), "rank_to_mask"),
    ],
)  # fmt: skip
def test_refusals(engine: LowLatency, call: Callable[[LowLatency], Any], text: str) -> None:
    for _ in range(2):  # before and after the first call of the shape
        with pytest.raises(ArgumentError, match=text):
            call(engine)
        dispatch(engine)


def test_bad_indices_are_told_once(engine: LowLatency) -> None:
    engine.check()
    engine._bad_index.fill_(1)
    with pytest.raises(ArgumentError, match="outside"):
        engine.check()
    engine.check()


def test_starting_anew_forgets(engine: LowLatency) -> None:
    kept = dispatch(engine), dispatch(engine, with_hook=True)
    engine.clean(4, 512, 5)
    dispatch(engine), dispatch(engine, with_hook=True)
    for *_, handle, _ in kept:
        with pytest.raises(ArgumentError, match="has taken"):
            combine(engine, handle)
    with pytest.raises(DeepEPError, match="may be called once"):
        kept[1][3]()


def test_a_capture_counts_as_a_call_and_its_set_may_be_taken_outside(
    engine: LowLatency, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What docs/low_latency.md says of CUDA graphs, as far as the CPU knows."""
    with pytest.MonkeyPatch.context() as capturing:
        capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(DeepEPError, match="first low_latency_dispatch of a shape cannot be captured"):
            dispatch(engine)
    before = dispatch(engine)[2]
    combine(engine, before)
    with pytest.MonkeyPatch.context() as capturing:
        capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        capturing.setattr(Memory, "keep", lambda *_: None, raising=False)
        captured = dispatch(engine)[2]
        combine(engine, captured)
    assert captured.set != before.set and captured.space.was_captured
    one, two = dispatch(engine)[2], dispatch(engine)[2]
    assert (one.set, two.set) == (before.set, captured.set)  # so a replay would end `two`, unseen
    with pytest.raises(DeepEPError, match="2 results are alive"):
        dispatch(engine)
    with pytest.raises(ArgumentError, match="has taken"):
        combine(engine, captured)
    combine(engine, two)


# Masks ----------------------------------------------------------------------------------------------------------------------


class ThreePeers(Peers):
    """This is rank 1; the others say what it says."""

    def __init__(self) -> None:
        super().__init__(None, 5.0)
        self.rank, self.size = 1, 3

    def gather_objects(self, mine: Any, operation: str) -> list[Any]:
        return [mine] * self.size


@pytest.fixture
def of_three(kernels: Kernels) -> LowLatency:
    arena: Any = Memory()
    return LowLatency(ThreePeers(), arena, [0] * 3, 4, True, _ordered, torch.device("cpu"))


def masked(engine: LowLatency) -> list[int]:
    status = torch.full((3,), 7, dtype=torch.int32)
    engine.query_mask(status)
    return status.tolist()


def test_a_rank_that_is_unmasked_owes_no_answer_in_any_shape(of_three: LowLatency, kernels: Kernels) -> None:
    for most in (4, 5):
        dispatch(of_three, max_tokens=most, num_experts=6)
    of_three.update_mask(0, True)
    assert masked(of_three) == [1, 0, 0] and kernels.forgotten == []
    of_three.update_mask(2, True)
    of_three.update_mask(0, False)
    assert masked(of_three) == [0, 0, 1] and kernels.forgotten == [(0, 4), (0, 5)]
    of_three.update_mask(0, True)
    of_three.clean_mask()
    assert masked(of_three) == [0, 0, 0]
    assert kernels.forgotten[2:] == [(0, 4), (0, 5), (2, 4), (2, 5)]


def test_ranks_given_up_by_the_kernels_are_told_of(of_three: LowLatency, kernels: Kernels) -> None:
    of_three._mask[2] = 1  # as kernels do
    assert masked(of_three) == [0, 0, 1]
    handle = dispatch(of_three, num_experts=6)[2]
    of_three.update_mask(2, False)
    combine(of_three, handle, torch.zeros(2, 12, 512, dtype=torch.bfloat16))  # what is alive stays so
    of_three.clean(4, 512, 6)
    assert masked(of_three) == [0, 0, 0]
    with pytest.raises(ArgumentError, match="has taken"):  # and is lost when all start anew
        combine(of_three, handle, torch.zeros(2, 12, 512, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    "rank, mask, named",
    [
        (1, True, "rank_to_mask must be another rank"),
        (3, True, "rank_to_mask must be below the group's 3 ranks"),
        (-1, True, "rank_to_mask"),
        (True, True, "rank_to_mask"),
        (0, 1, "mask must be True or False"),
    ],
)
def test_refused_masks(of_three: LowLatency, rank: int, mask: bool, named: str) -> None:
    with pytest.raises(ArgumentError, match=named):
        of_three.update_mask(rank, mask)
    assert masked(of_three) == [0, 0, 0]
    for status in (torch.zeros(2, dtype=torch.int32), torch.zeros(3), None):
        with pytest.raises(ArgumentError, match="mask_status must be a int32 tensor of shape"):
            of_three.query_mask(status)  # type: ignore[arg-type]


# With ranks on other nodes --------------------------------------------------------------------------------------------------


class Nvshmem:
    """Stands for `deepep_train._rdma`, of a group of one rank; remembers what came behind the kernels."""

    def __init__(self) -> None:
        self.taken: dict[int, Tensor] = {}
        self.put: list[tuple[str, int]] = []

    def allocate(self, num_bytes: int) -> int:
        memory = torch.full((num_bytes,), 255, dtype=torch.uint8)
        self.taken[memory.data_ptr()] = memory
        return memory.data_ptr()

    def of_peer(self, address: int, rank: int) -> int:
        return address

    def put_dispatch(self, p: Any, stream: int) -> None:
        self.put.append(("dispatch", p.put_bytes))

    def put_combine(self, p: Any, stream: int) -> None:
        self.put.append(("combine", p.put_bytes))

    def answer(self, p: Any, is_combine: bool, stream: int) -> None:
        self.put.append(("pulled" if is_combine else "taken", p.put_bytes))


def across(nvshmem: Nvshmem, peers: Peers | None = None) -> LowLatency:
    device, arena = torch.device("cpu"), Memory()
    far = OtherNodes(nvshmem, nvshmem, 0, 1, 1, device)
    return LowLatency(peers or Peers(None, 5.0), arena, [0], 4, True, _ordered, device, far)  # type: ignore[arg-type]


def test_what_is_put_is_counted_by_the_kernels_in_one_place(kernels: Kernels) -> None:
    nvshmem = Nvshmem()
    engine = across(nvshmem)
    assert engine.put_bytes() == 0
    handle = dispatch(engine)[2]
    combine(engine, handle)
    (counter,) = {where for _, where in nvshmem.put}
    assert [name for name, _ in nvshmem.put] == ["dispatch", "taken", "combine", "pulled"]
    assert counter != 0
    assert engine._far is not None
    engine._far.put_bytes += 7 << 40
    assert engine._far.put_bytes.data_ptr() == counter and engine.put_bytes() == 7 << 40


def test_a_later_buffer_uses_the_memory_of_a_destroyed_one(kernels: Kernels) -> None:
    nvshmem = Nvshmem()
    first = across(nvshmem)
    *_, hook = dispatch(first, with_hook=True)
    dispatch(first, max_tokens=9)
    assert len(nvshmem.taken) == 2
    first.close()
    with pytest.raises(DeepEPError, match="has been destroyed"):
        hook()
    second = across(nvshmem)
    dispatch(second, max_tokens=3)  # fits the smaller one
    dispatch(second, max_tokens=9)
    assert len(nvshmem.taken) == 2
    control = low_latency_c.control_bytes()
    assert all(not memory[:control].any() for memory in nvshmem.taken.values())
    dispatch(second, max_tokens=8)  # both are taken
    assert len(nvshmem.taken) == 3


def test_memory_that_is_in_use_or_in_a_graph_stays(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    nvshmem = Nvshmem()
    first = across(nvshmem)
    handle = dispatch(first)[2]
    monkeypatch.setattr(Event, "is_over", False)
    first.close()
    monkeypatch.setattr(Memory, "keep", lambda *_: None, raising=False)
    second = across(nvshmem)
    handle = dispatch(second)[2]
    assert len(nvshmem.taken) == 2  # the GPU has not come to the end of the first's calls
    monkeypatch.setattr(Event, "is_over", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    combine(second, handle)
    with pytest.raises(DeepEPError, match="capture"):
        second.put_bytes()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    second.close()
    third = across(nvshmem)
    dispatch(third)
    assert len(nvshmem.taken) == 2  # the first's
    fourth = across(nvshmem)
    dispatch(fourth)
    assert len(nvshmem.taken) == 3  # the second's may be replayed


class BrokenPeers(Peers):
    """Of which one does not come: then there is no next round."""

    def gather_objects(self, mine: Any, operation: str) -> list[Any]:
        self.check()
        return [mine]


def test_memory_that_a_rank_does_not_come_for_is_not_waited_for_for_ever(kernels: Kernels) -> None:
    nvshmem, may_return = Nvshmem(), threading.Event()
    allocate = nvshmem.allocate
    nvshmem.allocate = lambda num_bytes: (may_return.wait(20), allocate(num_bytes))[1]  # type: ignore[method-assign]
    engine = across(nvshmem, BrokenPeers(None, 0.1))
    try:
        with pytest.raises(PeerTimeoutError, match=r"collective call within 0\.1 s"):
            dispatch(engine)
        assert not engine._spaces
    finally:
        may_return.set()


class OddPeers(Peers):
    """In the second round of a first call another rank has an error, if `is_odd`."""

    def __init__(self) -> None:
        super().__init__(None, 5.0)
        self.is_odd = True

    def gather_objects(self, mine: Any, operation: str) -> list[Any]:
        return [mine | {"error": "no memory"} if self.is_odd and "offset" in mine else mine]


def test_memory_of_a_space_that_was_not_made_is_used_again(kernels: Kernels) -> None:
    nvshmem, peers = Nvshmem(), OddPeers()
    engine = across(nvshmem, peers)
    for _ in range(3):  # new memory, and then memory that is used again
        with pytest.raises(DeepEPError, match="no memory"):
            dispatch(engine)
        assert len(nvshmem.taken) == 1
    peers.is_odd = False
    combine(engine, dispatch(engine)[2])
    assert len(nvshmem.taken) == 1
    dispatch(across(nvshmem))  # while the first is in use
    assert len(nvshmem.taken) == 2
