"""Conversion of logged values to numbers and to what msgpack can hold."""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterable, Mapping, Sized
from typing import Any

from traceml.errors import ArgumentTypeError, UsageError
from traceml.fail_open import warn_once

__all__ = [
    "DeferredValue",
    "PlainList",
    "checked_name",
    "copied_to_host",
    "items_of",
    "number_of",
    "params_of",
    "plain",
    "step_of",
    "whole_of",
]

_TEXT_CHARS = 2_000_000
_ITEMS = 10_000
_SMALL_ARRAY = 1001
_DEPTH = 8
_INT64 = 2**63


class PlainList(list[Any]):
    """List of numbers whose length the caller has checked: `plain` takes it as it is."""


class DeferredValue:
    """Value of a tensor on a device, copied to the host asynchronously."""

    __slots__ = ("_event", "_host")

    def __init__(self, tensor: Any) -> None:
        self._host, self._event = copied_to_host(tensor.detach().reshape(()))  # resolved on the recorder's thread

    @property
    def ready(self) -> bool:
        """Whether the value has arrived."""
        return self._event is None or bool(self._event.query())

    def number(self) -> float:
        """Return the value; wait for it if necessary."""
        if self._event is not None:
            self._event.synchronize()

        return float(self._host)


def copied_to_host(tensor: Any) -> tuple[Any, Any]:
    """Start copying a tensor, which may change, without waiting for its device.

    Returns:
        the copy, and a CUDA event after which it is complete; without CUDA a clone on the device, and None.
    """
    if tensor.device.type != "cuda":
        return tensor.clone(), None

    torch = sys.modules["torch"]
    # Pinned, or the copy would wait for the device; the script's default device may be another one.
    host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(tensor.device))
    return host, event


def number_of(value: Any) -> Any:
    """Return a value as a float; a `DeferredValue` for a tensor on a device; the value itself if it is not a number."""
    kind = type(value)
    if kind is int or kind is bool:
        try:
            return float(value)
        except OverflowError:  # an integer beyond what a double holds
            return value

    if value is None or isinstance(value, str | bytes | Mapping):
        return value

    try:
        device = getattr(value, "device", None)
        if device is not None and hasattr(value, "detach"):
            return _of_tensor(value, device.type)

        return float(value.item() if hasattr(value, "item") else value)
    except Exception:  # noqa: BLE001 - a user's object may raise anything; then it is not a number
        return value


def _of_tensor(tensor: Any, device: str) -> Any:
    if tensor.numel() != 1 or tensor.is_complex() or device == "meta":
        return tensor

    whole = whole_of(tensor)
    if whole is None:
        warn_once(
            "part of a tensor",
            "a %s of which each rank has a part is logged as text: log its value.full_tensor(), which all ranks must "
            "call", type(tensor).__name__,
        )  # fmt: skip
        return tensor

    return float(whole.item()) if device == "cpu" else DeferredValue(whole)


def whole_of(tensor: Any) -> Any:
    """Return a tensor with all its values on this rank, of a `DTensor` its own copy; None if this rank has a part.

    To read such a one is a collective operation, in which the other ranks may not take part: they need not log it.
    """
    placements = getattr(tensor, "placements", None)
    if placements is None or not hasattr(tensor, "to_local"):
        return tensor

    return tensor.to_local() if all(each.is_replicate() for each in placements) else None


def checked_name(name: Any) -> str:
    """Return the name of a logged value.

    Raises:
        ArgumentTypeError: it is not a text.
    """
    if not isinstance(name, str):
        raise ArgumentTypeError(f"the name of a logged value must be a string, not {type(name).__name__} {name!r:.100}")

    return str(name)


def step_of(step: Any) -> int:
    """Return a step as an integer.

    Raises:
        ArgumentTypeError: it is not a whole number.
        UsageError: it does not fit into 64 bits.
    """
    try:
        number = operator.index(step)
    except TypeError:
        try:
            as_float = float(step)
            number = int(as_float)
        except (TypeError, ValueError, OverflowError):
            raise ArgumentTypeError(f"a step must be a whole number, not {type(step).__name__} {step!r:.100}") from None

        if number != as_float:
            raise ArgumentTypeError(f"a step must be a whole number, not {step!r:.100}") from None

    if not -_INT64 <= number < _INT64:
        raise UsageError(f"a step must fit into 64 bits, not {number:.3e}")

    return number


def plain(value: Any, depth: int = 0) -> Any:
    """Return a value as numbers, texts, lists and maps, which msgpack can hold; anything else as its `repr`.

    What is too long is cut, with a warning.
    """
    kind = type(value)
    if value is None or kind is bool or kind is float or kind is PlainList:
        return value

    if kind is int:
        return value if -_INT64 <= value < 2 * _INT64 else _digits(value)

    if isinstance(value, str):
        _warn_of_cut(value, _TEXT_CHARS, "text", "characters")
        return str(value)[:_TEXT_CHARS]

    if kind is bytes:
        return value

    if depth < _DEPTH and isinstance(value, Mapping):
        _warn_of_cut(value, _ITEMS, "map", "items")
        return {str(key): plain(_item_of(value, key), depth + 1) for key in list(value)[:_ITEMS]}

    if depth < _DEPTH and isinstance(value, list | tuple | set | frozenset):
        _warn_of_cut(value, _ITEMS, "list", "items")
        return [plain(item, depth + 1) for item in list(value)[:_ITEMS]]

    try:
        return _plain_object(value, kind.__name__, depth)
    except Exception as error:  # noqa: BLE001 - a user's object may raise anything
        return f"<{kind.__name__}: {type(error).__name__}>"


def _item_of(given: Mapping[Any, Any], key: Any) -> Any:
    """Return an item of a map, or why it cannot be read: one of OmegaConf may be missing, or refer to nothing."""
    try:
        return given[key]
    except Exception as error:  # noqa: BLE001 - a user's object may raise anything
        return f"<{type(error).__name__}>"


def _warn_of_cut(value: Sized, limit: int, kind: str, unit: str) -> None:
    if len(value) > limit:
        warn_once(
            f"cut {kind}",
            "a logged %s of %s %s is cut after %s; log_artifact takes it whole, as a file",
            kind, f"{len(value):,}", unit, f"{limit:,}",
        )  # fmt: skip


def _plain_object(value: Any, kind: str, depth: int) -> Any:
    if kind in ("bool", "bool_"):  # numpy's
        return bool(value)
    if hasattr(value, "__index__") and not hasattr(value, "detach") and not getattr(value, "ndim", 0):
        return plain(operator.index(value), depth)  # numpy's integers, enumerations

    number = number_of(value)
    if isinstance(number, DeferredValue):
        number = number.number()
    if type(number) is float:
        return number
    if depth < _DEPTH and hasattr(value, "tolist") and getattr(value, "size", _ITEMS) in range(_SMALL_ARRAY):
        return plain(value.tolist(), depth + 1)

    device = getattr(value, "device", None)
    if hasattr(value, "detach") and getattr(device, "type", "cpu") != "cpu":  # its `repr` would wait for the device
        return f"{kind} of shape {tuple(value.shape)}, {value.dtype}, on {device}"

    return str(value) if hasattr(value, "__fspath__") else repr(value)[:_TEXT_CHARS]


def _digits(number: int) -> str:
    try:
        return str(number)
    except ValueError:  # Python turns no more than 4,300 digits into a text
        return hex(number)[:_TEXT_CHARS]


def items_of(metrics: Any) -> Iterable[tuple[Any, Any]]:
    """Return the names and values of a map.

    Raises:
        ArgumentTypeError: it is no map.
    """
    try:
        items: Iterable[tuple[Any, Any]] = metrics.items()
        return items
    except AttributeError:
        raise _no_map("log_metrics", metrics) from None


def params_of(params: Any, call: str = "log_params") -> dict[Any, Any]:
    """Return parameters, also given as pairs, as a dict.

    Args:
        call: what takes them, for the error.

    Raises:
        ArgumentTypeError: they are neither.
    """
    try:
        return {key: _item_of(params, key) for key in params} if isinstance(params, Mapping) else dict(params)
    except (TypeError, ValueError):
        raise _no_map(call, params) from None


def _no_map(call: str, given: Any) -> ArgumentTypeError:
    hint = ": vars() makes one of it" if hasattr(given, "__dict__") else ""  # of a Namespace, a dataclass
    kind = type(given).__name__
    return ArgumentTypeError(f"{call} takes a dict of names and values, not {kind} {given!r:.100}{hint}")
