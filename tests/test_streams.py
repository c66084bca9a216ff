"""The communication stream's rules, with stand-ins for CUDA's streams."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NoReturn

import pytest
import torch

from deepep_train import Buffer, combine, dispatch, streams
from deepep_train.engines import collective


class Stream:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, _: Stream) -> None: ...


class OnGpu(torch.Tensor):
    """Says that it lies on a GPU."""

    is_cuda, device = True, torch.device("cuda", 0)  # type: ignore[assignment]
    recorded: list[Any]

    def record_stream(self, stream: Any) -> None:
        self.recorded.append(stream)


def test_inputs_of_work_that_fails_behind_its_launch_are_not_reused_too_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream())
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    x, elsewhere = torch.zeros(1).as_subclass(OnGpu), torch.zeros(1)
    x.recorded = []
    comm = streams.CommStream(lambda: None)

    def work() -> NoReturn:
        raise torch.OutOfMemoryError("behind the launch")

    with torch.no_grad(), pytest.raises(torch.OutOfMemoryError, match="behind the launch"):
        comm.run(work, [x, elsewhere], None, True)
    assert x.recorded == [comm._on(x.device)]


def test_what_another_stream_uses_is_not_reused_too_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Stream()
    here.cuda_stream = 7  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: here)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    table = torch.zeros(1).as_subclass(OnGpu)
    table.recorded = []
    streams.used_here([torch.zeros(1), None], 3)
    streams.used_here([table, None], 7)
    assert not table.recorded
    streams.used_here([None, table], 3)
    assert table.recorded == [here]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    streams.used_here([table], 3)
    assert len(table.recorded) == 1


@pytest.mark.parametrize("layout", ["rank", "expert"])
def test_handles_of_the_collective_engine_may_be_dropped_before_their_call_has_run(
    layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[set[int]] = []
    monkeypatch.setattr(collective, "used_here", lambda tensors, _: used.append({id(t) for t in tensors if t is not None}))
    buffer = Buffer(None, engine="collective")
    out = dispatch(torch.ones(6, 4), torch.arange(12).view(6, 2) % 4, buffer=buffer, num_experts=4, layout=layout)
    combine(out.x, out.handle)
    dispatch(torch.ones(6, 4), buffer=buffer, handle=out.handle)
    plan = out.handle.plan
    tables = [plan.row_from, plan.route.order, *(hop.send_row for hop in plan.route.hops), *(plan.experts or ())]
    assert used == [{id(t) for t in tables if isinstance(t, torch.Tensor)}] * 2
    assert len(used[0]) >= 1
