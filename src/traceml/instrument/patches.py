"""Reversible replacement of attributes of other packages."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from traceml.instrument.importlib_bootstrap import uncounted

__all__ = ["Patches"]

_ABSENT = object()


class Patches:
    """Replaced attributes, undone in reverse order."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def wrap(self, owner: Any, name: str, wrapper: Any) -> None:
        """Replace `owner.name` by a function; the function takes over the original's name and docstring."""
        functools.update_wrapper(wrapper, getattr(owner, name))
        self.replace(owner, name, wrapper)

    @uncounted
    def follow(self, owner: Any, name: str, after: Callable[[Any], object]) -> None:
        """Call `after`, which must not raise, with the object whose method `owner.name` has returned."""
        original = getattr(owner, name)

        def method(self: Any, /, *args: Any, **kwargs: Any) -> Any:
            result = original(self, *args, **kwargs)
            after(self)
            return result

        self.wrap(owner, name, method)

    def wrap_in(self, modules: Sequence[Any], name: str, wrap: Callable[[Any], Any]) -> None:
        """Wrap the first module's function of this name, in each of the modules that hold it."""
        original = getattr(modules[0], name)
        wrapper = wrap(original)
        for module in modules:
            if getattr(module, name, None) is original:
                self.wrap(module, name, wrapper)

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Set `owner.name`; remember the owner's own attribute, not an inherited one."""
        before = vars(owner).get(name, _ABSENT)
        setattr(owner, name, value)

        def undo() -> None:
            if vars(owner).get(name) is not value:
                return  # replaced again after us: the newer function calls ours, which passes through

            if before is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

        self._undo.append(undo)

    def on_undo(self, undo: Callable[[], None]) -> None:
        """Register a further function for `restore`."""
        self._undo.append(undo)

    def restore(self) -> None:
        """Restore all originals."""
        while self._undo:
            self._undo.pop()()
