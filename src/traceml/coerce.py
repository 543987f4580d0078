"""Conversion of texts, files' values and arguments to typed values, checked against limits."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, get_args, get_origin

from traceml.errors import ArgumentTypeError, UsageError

__all__ = ["BAD", "Limits", "allowed", "coerce", "path_text", "seconds_to_wait"]

Limits = Mapping[str, float | None]  # low, high (inclusive) and above (exclusive)

# Returned by `coerce` for a value that is not allowed; None is a value.
BAD: Final = object()
_ON = frozenset({"1", "true", "yes", "on"})
_OFF = frozenset({"0", "false", "no", "off"})


def coerce(kind: Any, value: Any, limits: Limits) -> Any:
    """Return `value` as `kind`, or BAD when it is not allowed.

    Args:
        kind: a type as in an annotation: bool, int, float, str, Path, Literal, tuple of texts, dict, or with None or
            a Literal.
        value: the given value; texts such as `yes` or `1e-3` are converted.
    """
    try:
        return _convert(kind, value, limits)
    except (ValueError, TypeError, OverflowError, RuntimeError):  # RuntimeError: no such user, JSON too deep
        return BAD


def _convert(kind: Any, value: Any, limits: Limits) -> Any:
    if get_origin(kind) is dict:
        names, inner = get_args(kind)
        return _map(names, inner, value, limits)
    if words := next((each for each in get_args(kind) if get_origin(each) is Literal), None):  # a word, or a value
        if isinstance(value, str) and value.strip().lower() in get_args(words):
            return value.strip().lower()

        kind = next(each for each in get_args(kind) if each is not words)
    elif type(None) in get_args(kind):
        if value is None or (isinstance(value, str) and value.strip().lower() in {"", "none"}):
            return None

        kind = next(each for each in get_args(kind) if each is not type(None))

    origin = get_origin(kind)
    if origin is tuple:
        return _texts(value)
    if origin is Literal:
        text = value.lower() if isinstance(value, str) else value
        return text if text in get_args(kind) else BAD
    if kind is bool:
        return _flag(value)
    if kind in (int, float):
        return _number(kind, value, limits)
    if kind is Path:
        return Path(value).expanduser() if os.fspath(value) else BAD

    return value.strip() or BAD if isinstance(value, str) else BAD


def _flag(value: Any) -> Any:
    if isinstance(value, bool):
        return value

    text = value.strip().lower() if isinstance(value, str) else str(value)
    return True if text in _ON else False if text in _OFF else BAD


def _number(kind: type[int] | type[float], value: Any, limits: Limits) -> Any:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float | str)
        or (kind is int and isinstance(value, float))
    ):
        return BAD

    number = kind(value)
    low, high, above = limits["low"], limits["high"], limits["above"]
    fits = (
        math.isfinite(number)
        and (low is None or number >= low)
        and (high is None or number <= high)
        and (above is None or number > above)
    )
    return number if fits else BAD


def _texts(value: Any) -> Any:
    if isinstance(value, str):
        value = _json(value) if value.lstrip().startswith("[") else value.split(",")
        if isinstance(value, list) and all(isinstance(each, str) for each in value):
            return tuple(each.strip() for each in value if each.strip())

    if isinstance(value, list | tuple | set | frozenset) and all(isinstance(each, str) and each for each in value):
        return tuple(value)

    return BAD


def _map(names: Any, kind: Any, value: Any, limits: Limits) -> Any:
    if isinstance(value, str):
        value = _json(value) if value.strip() else {}
    if not isinstance(value, Mapping):
        return BAD

    result: dict[str, Any] = {}
    for key, each in value.items():
        inner = _number(float, each, limits) if kind is float else each if isinstance(each, dict) else BAD
        if not isinstance(key, str) or key not in (get_args(names) or (key,)) or inner is BAD:
            return BAD

        result[key] = inner

    return result


def _json(text: str) -> Any:
    import json

    return json.loads(text)


def allowed(kind: Any, limits: Limits) -> str:
    """Return what `coerce` accepts, in words."""
    inner = get_args(kind)
    if get_origin(kind) is dict:
        names = f"names ({', '.join(get_args(inner[0]))})" if get_args(inner[0]) else "names"
        return f"a map (JSON) of {names} to {'tables' if inner[1] is not float else allowed(float, limits)}"
    if words := next((each for each in inner if get_origin(each) is Literal), None):
        return f"{allowed(next(each for each in inner if each is not words), limits)}, or {allowed(words, limits)}"
    if type(None) in inner:
        return f"{allowed(next(each for each in inner if each is not type(None)), limits)}, or none"
    if get_origin(kind) is Literal:
        return " or ".join(inner)
    if get_origin(kind) is tuple:
        return "a list of strings (comma-separated or JSON)"
    if kind in (int, float):
        return _range("an integer" if kind is int else "a number", limits)

    return {bool: "true or false", Path: "a path"}.get(kind, "a non-empty string")


def _range(noun: str, limits: Limits) -> str:
    low, high, above = limits["low"], limits["high"], limits["above"]
    if low is not None and high is not None:
        return f"{noun} from {low:g} to {high:.0f}"
    if above is not None:
        return f"{noun} above {above:g}"

    return f"{noun} of at least {low:g}" if low is not None else noun


def path_text(value: Any, what: str) -> str:
    """Return a path that a user's call got as a text.

    Args:
        what: description of the argument.

    Raises:
        ArgumentTypeError: it is neither a text nor a path.
    """
    try:
        return os.fsdecode(value)
    except TypeError:
        raise ArgumentTypeError(
            f"{what} must be a string or a path, not {type(value).__name__} {value!r:.100}"
        ) from None


def seconds_to_wait(timeout: Any) -> float | None:
    """Return the longest wait that a user's call got, in seconds; None for no limit.

    Raises:
        UsageError: it is NaN.
        ArgumentTypeError: it is neither a number nor None.
    """
    if timeout is None:
        return None

    try:
        seconds = None if isinstance(timeout, str | bytes | bool) else float(timeout)
    except (TypeError, ValueError, OverflowError):
        seconds = None

    if seconds is not None and not math.isnan(seconds):
        return seconds

    error = ArgumentTypeError if seconds is None else UsageError
    kind = type(timeout).__name__
    raise error(f"a timeout must be a number of seconds, or None for no limit, not {kind} {timeout!r:.100}")
