"""Runs a buffer's work on its communication stream, with DeepEP V1's rules about who waits for whom."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from deepep_train.errors import DeepEPError
from deepep_train.events import EventHandle, EventOverlap

T = TypeVar("T")


class CommStream:
    """The communication stream of one buffer; does nothing for CPU tensors.

    "Current" means, as for all of torch's work, the current stream of the tensors' device, whichever device is current.

    Args:
        check: raises what has failed so far; called when somebody waits for an event of this stream.
        device: the engine's; None if it takes tensors of any.
    """

    def __init__(self, check: Callable[[], None], device: torch.device | None = None) -> None:
        self._check = check
        self._device = device
        # What a call gives whose work the current stream has: nothing to wait for.
        self.finished = EventOverlap(None, check=check)
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    @property
    def stream(self) -> torch.cuda.Stream:
        if not torch.cuda.is_available():
            raise DeepEPError("this machine has no CUDA device, so there is no communication stream")
        return self._on(self._device or torch.device("cuda", torch.cuda.current_device()))

    def _on(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device, priority=-1)
        return self._streams[device]

    def run(
        self,
        work: Callable[[], T],
        inputs: Iterable[Any],
        previous_event: EventOverlap | None,
        async_finish: bool,
    ) -> tuple[T, EventOverlap]:
        """Run `work` after `previous_event` (default: after the current stream's work so far). V1's calls carry no gradients.

        The current stream waits for it unless `async_finish`; then whoever uses the result must wait for the event.
        Results are always safe to use and free on the current stream after the wait.
        """
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self.run(work, inputs, previous_event, async_finish)
        if previous_event is None and async_finish is False:
            # The caller's stream would wait for the communication stream in both directions: the same order at less cost.
            return work(), self.finished
        # Wrong arguments are `work`'s to refuse, on every rank at once.
        if not isinstance(previous_event, EventOverlap):
            previous_event = None
        tensors = [t for t in inputs if isinstance(t, Tensor)]
        device = next((t.device for t in tensors if t.is_cuda), None)
        if device is None:
            if previous_event is not None:
                previous_event.current_stream_wait()
            result = work()
            return result, EventOverlap(EventHandle() if async_finish else None, check=self._check)
        current, comm = torch.cuda.current_stream(device), self._on(device)
        if previous_event is not None and previous_event.event is not None:
            with torch.cuda.stream(comm):
                previous_event.event.current_stream_wait()
        else:
            comm.wait_stream(current)
        with torch.cuda.stream(comm):
            try:
                result = work()
            finally:  # it may raise behind a launch that reads them
                for t in tensors:
                    if t.is_cuda:
                        t.record_stream(comm)
            event = EventHandle()
        for t in _tensors_in(result):
            if t.is_cuda:
                t.record_stream(current)
        if async_finish:
            return result, EventOverlap(event, tuple(tensors), check=self._check)
        event.current_stream_wait()
        return result, self.finished


def used_here(tensors: Iterable[Tensor | None], made_on: int) -> None:
    """The current stream uses these, whose owner may drop them before it has done so: torch must not give their memory out
    again until then. In a capture nothing is recorded: who captures keeps them for as long as the graph.

    Args:
        made_on: `current_id` where they were made.
    """
    on_gpu = [t for t in tensors if t is not None and t.is_cuda]
    if not on_gpu or current_id(on_gpu[0].device) == made_on or torch.cuda.is_current_stream_capturing():
        return
    current = torch.cuda.current_stream(on_gpu[0].device)
    for t in on_gpu:
        t.record_stream(current)


def current_id(device: torch.device) -> int:
    """Of the current stream; 0 for a CPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _tensors_in(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors_in(item)
