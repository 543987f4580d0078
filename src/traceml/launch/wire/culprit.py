"""Finding what cannot be pickled inside what was to be pickled, and saying where it lies."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

__all__ = ["find_culprit", "name_arguments"]

_MAX_DEPTH = 40
_MAX_KEY_LENGTH = 40


def find_culprit(named: Mapping[str, object], error: Exception, attempt: Callable[[object], Exception | None]) -> str:
    """Return a text that names the innermost object which cannot be pickled.

    Args:
        named: what was to be pickled, by name.
        error: what pickling all of it said.
        attempt: pickles a value to nowhere and returns why that failed, or None.
    """
    path, found, seen = "", error, set[int]()
    children: Iterator[tuple[str, object]] = iter(named.items())
    for _ in range(_MAX_DEPTH):
        step = _first_bad(children, attempt, seen)
        if step is None:
            break

        name, value, found = step
        path += name
        children = _children(value)

    where = f"{path}: " if path else ""
    return f"{where}{_reason(found)}"


def name_arguments(
    func: Callable[..., object], args: Sequence[object], kwargs: Mapping[str, object]
) -> dict[str, object]:
    """Return the arguments of a call by the names of the parameters that take them."""
    try:
        parameters = list(inspect.signature(func).parameters.values())
    except (TypeError, ValueError):
        parameters = []

    simple = [p.name for p in parameters if p.kind in {p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD}]
    named = {f"argument {simple[i]!r}" if i < len(simple) else f"argument {i}": value for i, value in enumerate(args)}
    return named | {f"argument {name!r}": value for name, value in kwargs.items()}


def _first_bad(
    children: Iterator[tuple[str, object]], attempt: Callable[[object], Exception | None], seen: set[int]
) -> tuple[str, object, Exception] | None:
    for name, value in children:
        if id(value) in seen:
            continue

        error = attempt(value)
        if error is not None:
            seen.add(id(value))
            return name, value, error

    return None


def _reason(error: Exception) -> str:
    text = str(error)
    if isinstance(error, RecursionError) or isinstance(error.__cause__, RecursionError):
        return "it is nested too deeply to be pickled"

    return text if "pickle" in text else f"cannot be pickled ({type(error).__name__}: {text})"


def _children(value: Any) -> Iterator[tuple[str, object]]:
    """Yield what `value` is made of, each with the words that lead to it."""
    if isinstance(value, types.FunctionType):
        yield from _of_function(value)
    elif isinstance(value, types.MethodType):
        yield ".__self__", value.__self__
        yield ".__func__", value.__func__
    elif isinstance(value, dict):
        for key, item in list(value.items()):
            yield f"[{_short(key)}]", item
            yield f" key {_short(key)}", key
    elif isinstance(value, list | tuple | set | frozenset):
        for i, item in enumerate(value):
            yield f"[{i}]", item
    elif isinstance(value, type):
        for name, item in list(vars(value).items()):
            yield f".{name}", getattr(item, "__func__", item)
    else:
        yield from _of_object(value)


def _of_function(function: types.FunctionType) -> Iterator[tuple[str, object]]:
    code = function.__code__
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=False):
        try:
            yield f", closure variable {name!r}", cell.cell_contents
        except ValueError:  # not yet assigned
            continue

    names = set[str]()
    pending = [code]
    while pending:
        part = pending.pop()
        names.update(part.co_names)
        pending += [constant for constant in part.co_consts if isinstance(constant, types.CodeType)]

    for name in sorted(names & function.__globals__.keys()):
        yield f", global {name!r}", function.__globals__[name]

    for i, item in enumerate(function.__defaults__ or ()):
        yield f", default {i}", item

    for name, item in (function.__kwdefaults__ or {}).items():
        yield f", default of {name!r}", item

    yield from _named(vars(function))


def _of_object(value: Any) -> Iterator[tuple[str, object]]:
    """Yield the parts by which an object is pickled: its state, and what its constructor is called with."""
    try:
        reduced = value.__reduce_ex__(5)
    except Exception:  # noqa: BLE001 - the objects we look for fail here, each in its own way
        yield from _named(getattr(value, "__dict__", {}))
        return

    if not isinstance(reduced, tuple):
        return

    state = reduced[2] if len(reduced) > 2 else None
    if isinstance(state, dict):
        yield from _named(state)
    elif isinstance(state, tuple) and len(state) == 2 and all(isinstance(part, dict | None) for part in state):
        yield from _named({**(state[0] or {}), **(state[1] or {})})  # an object with slots
    elif state is not None:
        yield " state", state

    for i, item in enumerate(reduced[1] or ()):
        yield f" part {i}", item

    for i, item in enumerate(reduced[3] or () if len(reduced) > 3 else ()):
        yield f"[{i}]", item

    for key, item in reduced[4] or () if len(reduced) > 4 else ():
        yield f"[{_short(key)}]", item

    yield f" class {type(value).__name__!r}", type(value)


def _named(attributes: Mapping[Any, object]) -> Iterator[tuple[str, object]]:
    for name, item in list(attributes.items()):
        yield f".{name}", item


def _short(key: object) -> str:
    text = repr(key)
    return text if len(text) <= _MAX_KEY_LENGTH else text[: _MAX_KEY_LENGTH - 1] + "…"
