"""Documents whose texts are safe to show: applied where a report or a comparison becomes a view."""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec

from traceml.formatting import printable

__all__ = ["printable_copy"]

T = TypeVar("T", bound=msgspec.Struct)

# Fields whose texts may have several lines.
_MULTILINE = frozenset({"command", "exception", "stack"})
# In JSON: anything but plain ASCII, and the escapes of control characters.
_MAYBE_UNPRINTABLE = re.compile(rb"[^ -~]|\\[^\"\\/]")


def printable_copy(document: T) -> T:
    """Return a document with every text in it printable; the document itself if they all are."""
    if _is_plain(document):
        return document

    copied: T = _copy(document, lines=False)
    return copied


def _is_plain(document: msgspec.Struct) -> bool:
    """Whether its texts are plain ASCII: a report of 10,000 ranks is asked several times a second, so in C."""
    try:
        return not _MAYBE_UNPRINTABLE.search(msgspec.json.encode(document))
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def _copy(value: Any, *, lines: bool) -> Any:
    if isinstance(value, str):
        return value if type(value) is not str else printable(value, lines=lines)

    if isinstance(value, msgspec.Struct):
        names = value.__struct_fields__
        changes = {name: _copy(getattr(value, name), lines=name in _MULTILINE) for name in names}
        return msgspec.structs.replace(value, **changes)

    if isinstance(value, dict):
        return {_copy(key, lines=False): _copy(known, lines=key in _MULTILINE) for key, known in value.items()}

    return type(value)(_copy(known, lines=lines) for known in value) if isinstance(value, list | tuple) else value
