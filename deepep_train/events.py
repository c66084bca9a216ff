"""Points in a stream's order that another stream can wait for: DeepEP V1's EventHandle and EventOverlap.

On a machine without a GPU everything has happened by the time a call returns, so waiting is a no-op there and code written
for streams runs unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class EventHandle:
    """An event recorded on the current CUDA stream when this object is made (nothing where CUDA is not in use)."""

    def __init__(self) -> None:
        self._event: torch.cuda.Event | None = None
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream())

    def current_stream_wait(self) -> None:
        """Make the current CUDA stream wait for the event; the CPU does not wait.

        So does the current stream of the device it was recorded on, if that is another: what is used next lies there.
        """
        if self._event is not None:
            for device in {self._event.device.index, torch.cuda.current_device()}:
                torch.cuda.current_stream(device).wait_event(self._event)


class EventOverlap:
    """What an `async_finish=True` call returns: wait for it before using the call's results.

    Args:
        event: the recorded event, or None where the call had finished already; waiting is then a no-op.
        extra_tensors: tensors kept alive as long as this object, a stand-in for `record_stream` under CUDA graphs.
        check: called after the wait; raises what is known to have failed.

    Used as a context manager, the current stream waits at the end of the block, so the block overlaps with the operation.
    """

    def __init__(
        self,
        event: EventHandle | None = None,
        extra_tensors: tuple[torch.Tensor, ...] | None = None,
        *,
        check: Callable[[], None] | None = None,
    ) -> None:
        self.event = event
        self.extra_tensors = extra_tensors
        self._check = check

    def current_stream_wait(self) -> None:
        """Make the current stream wait for the operation; raises `DeepEPError` if it is known to have failed."""
        if self.event is not None:
            self.event.current_stream_wait()
        if self._check is not None:
            self._check()

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(self, *_: Any) -> None:
        self.current_stream_wait()
