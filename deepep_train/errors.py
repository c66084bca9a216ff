"""Every failure of the library is one of these exceptions, and its text names what is wrong."""

from __future__ import annotations

from collections.abc import Sequence


class DeepEPError(RuntimeError):
    """Base of every exception that deepep_train raises on purpose."""


class ArgumentError(DeepEPError, ValueError):
    """An argument is wrong, here or on another rank of the group.

    Attributes:
        argument: name of the offending argument, "" where several disagree.
        ranks: ranks (in the group) on which it is wrong; empty for a call that asks nobody else.
    """

    def __init__(self, message: str, argument: str = "", ranks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.argument = argument
        self.ranks = tuple(ranks)


class PeerTimeoutError(DeepEPError):
    """Other ranks did not take part in an operation before its deadline, or have died.

    Attributes:
        ranks: ranks (in the group) that were waited for in vain.
        operation: what they were waited for.
    """

    def __init__(self, message: str, ranks: Sequence[int] = (), operation: str = "") -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)
        self.operation = operation
