"""Attributes of other packages that we replaced, and how each gets its original object back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

__all__ = ["Patches"]

_ABSENT = object()


class Patches:
    """Replaced attributes, undone in reverse order."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def wrap(self, owner: Any, name: str, wrapper: Any) -> None:
        """Replace `owner.name` by a function that stands in for it; it takes over the original's name and docstring."""
        functools.update_wrapper(wrapper, getattr(owner, name))
        self.replace(owner, name, wrapper)

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Set `owner.name`, and remember what was there: in the owner itself, not what it inherits."""
        before = vars(owner).get(name, _ABSENT)
        setattr(owner, name, value)

        def undo() -> None:
            if vars(owner).get(name) is not value:
                return  # someone replaced it after us: theirs calls ours, which passes through

            if before is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

        self._undo.append(undo)

    def on_undo(self, undo: Callable[[], None]) -> None:
        """Do this too when all is undone."""
        self._undo.append(undo)

    def restore(self) -> None:
        """Put everything back."""
        while self._undo:
            self._undo.pop()()
