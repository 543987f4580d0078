"""Closure cells for the clock's hot fields: the fastest storage that hooks in Python can share.

Measured on the training loop with the least work per step: fields in cells cost 2 us per step less than attributes of
an object, with the same logic. So a hook is a nested function whose enclosing function declares the fields it uses as
local variables; `bind` replaces them by the clock's cells. All other code sees ordinary attributes.
"""

from __future__ import annotations

from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any, TypeVar, cast

__all__ = ["CellField", "ClosureCells"]

F = TypeVar("F", bound=Callable[..., Any])


class ClosureCells:
    """One cell per hot field."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.by_name = {name: CellType(0) for name in names}

    def bind(self, function: F, /) -> F:
        """Return a copy of `function` whose free variables named like hot fields are the shared cells."""
        raw = cast("FunctionType", function)
        closure = tuple(
            self.by_name.get(name, own)
            for name, own in zip(raw.__code__.co_freevars, raw.__closure__ or (), strict=True)
        )
        bound = FunctionType(raw.__code__, raw.__globals__, raw.__name__, raw.__defaults__, closure)
        bound.__kwdefaults__, bound.__doc__, bound.__qualname__ = raw.__kwdefaults__, raw.__doc__, raw.__qualname__
        return cast("F", bound)


class CellField:
    """Attribute of the clock that is stored in a cell."""

    def __set_name__(self, owner: type[Any], name: str) -> None:
        self._name = name

    def __get__(self, clock: Any, owner: type[Any]) -> Any:
        return self if clock is None else clock.cells[self._name].cell_contents

    def __set__(self, clock: Any, value: Any) -> None:
        clock.cells[self._name].cell_contents = value
