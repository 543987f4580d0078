"""Names and kinds of callables."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

from traceml.errors import NotCallableError

__all__ = ["is_coroutine", "name_of", "shorten"]


def shorten(qualname: str) -> str:
    """Drop the functions around a definition: `test.<locals>.Pipeline.run` is `Pipeline.run`."""
    return qualname.rpartition("<locals>.")[2]


def name_of(fn: Any) -> str:
    """Derive a name: of a function, `Class.method`, `<lambda>`, what a partial wraps, or an object's class."""
    while isinstance(fn, partial):
        fn = fn.func

    try:
        name = fn.__qualname__
    except Exception:  # noqa: BLE001 - a callable's own `__getattr__` may raise anything, and a name is not worth it
        name = None

    return shorten(name if isinstance(name, str) else type(fn).__qualname__)


def is_coroutine(fn: Any) -> bool:
    """Whether a callable of any kind is a coroutine function.

    Raises:
        NotCallableError: it cannot be called at all.
    """
    if not callable(fn):
        raise NotCallableError(
            f"submit() takes a callable and its arguments, not {type(fn).__name__} {fn!r:.80}. "
            "Pass the function itself: rt.submit(f, x), not rt.submit(f(x))."
        )

    while isinstance(fn, partial):
        fn = fn.func

    try:
        return inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(type(fn).__call__)
    except Exception:  # noqa: BLE001 - as in `name_of`; a coroutine that it returns all the same is awaited
        return False
