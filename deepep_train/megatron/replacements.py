"""Attributes of other people's modules and classes, replaced for a while."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Replacements:
    """Empty is false."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def __bool__(self) -> bool:
        return bool(self._undo)

    def put(self, owner: Any, name: str, new: Any) -> None:
        """Set `owner.name`, which need not exist."""
        if hasattr(owner, name):
            old = getattr(owner, name)
            self._undo.append(lambda: setattr(owner, name, old))
        else:
            self._undo.append(lambda: delattr(owner, name))
        setattr(owner, name, new)

    def take_back(self) -> None:
        """Undo all, the last first."""
        while self._undo:
            self._undo.pop()()
