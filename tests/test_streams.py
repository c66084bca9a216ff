"""The communication stream's rules, with stand-ins for CUDA's streams."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NoReturn

import pytest
import torch

from deepep_train import streams


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
