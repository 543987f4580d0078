"""The call that `Launcher.run` and `Launcher.submit` are given, in either of its two forms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from traceml.errors import UsageError

__all__ = ["FunctionCall", "read_call"]

_OWN = ("func_args", "func_kwargs", "log_handlers")  # in the order of positions


@dataclass(frozen=True, slots=True)
class FunctionCall:
    """A function with its arguments, and the handlers of the workers' output."""

    func: Callable[..., Any]
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    log_handlers: Any = "auto"


def read_call(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> FunctionCall:
    """Return the call that `run(func, *args, **kwargs)` means.

    Args:
        args: `func_args, func_kwargs, log_handlers`, or the function's own arguments.
        kwargs: the same by name; `log_handlers` is ours in both forms.

    Raises:
        UsageError: the function cannot be called, or its arguments have a wrong type.
    """
    if not callable(func):
        raise UsageError(f"func={func!r}: it is not callable")

    if not _is_own_form(args, kwargs):
        own = {name: value for name, value in kwargs.items() if name != "log_handlers"}
        return FunctionCall(func, args, own, kwargs.get("log_handlers", "auto"))

    given = {**dict(zip(_OWN, args, strict=False)), **kwargs}
    func_args, func_kwargs = given.get("func_args"), given.get("func_kwargs")
    if not isinstance(func_args, tuple | list | None):
        raise UsageError(f"func_args is a {type(func_args).__name__}: give a tuple, for one argument (x,)")

    if not isinstance(func_kwargs, Mapping | None):
        raise UsageError(f"func_kwargs is a {type(func_kwargs).__name__}: give a dict of arguments by name")

    return FunctionCall(func, func_args or (), func_kwargs or {}, given.get("log_handlers", "auto"))


def _is_own_form(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether the arguments are `func_args`, `func_kwargs` and `log_handlers`, not the function's own."""
    positions = _OWN[: len(args)]
    if len(args) > len(_OWN) or set(kwargs) - set(_OWN) or set(kwargs) & set(positions):
        return False

    types = (tuple | list | None, Mapping | None, object)
    return all(isinstance(value, kind) for value, kind in zip(args, types, strict=False))
