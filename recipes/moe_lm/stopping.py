"""Ending early without losing work: signals become a wish that the training loop reads after each step."""

from __future__ import annotations

import signal
from types import FrameType

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Whether this rank got one of `SIGNALS`; a context, in which they do nothing else.

    A second Ctrl-C interrupts at once. Ranks get their signals at different moments, so each must tell the others.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal is signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
