"""Base of the documents that the CLI prints as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from traceml.trusted_files import read_regular

__all__ = ["UNREADABLE_JSON", "JsonDocument", "read_keys"]

T = TypeVar("T")

UNREADABLE_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""Errors of msgspec for a file that is damaged or of another version."""


def read_keys(path: Path, kind: type[T]) -> T | None:
    """Return the keys of a JSON file that a type declares, without reading the rest; None if it cannot be read."""
    try:
        return msgspec.json.decode(read_regular(path), type=kind)
    except (OSError, *UNREADABLE_JSON):
        return None


class JsonDocument:
    """Mixin of a msgspec.Struct: its JSON form, keys in the order of the fields."""

    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the document as plain dicts and lists."""
        built: dict[str, Any] = msgspec.json.decode(self._encoded())
        return built

    def to_json(self) -> str:
        """Return the document as indented JSON."""
        text = msgspec.json.format(self._encoded(), indent=2).decode()
        # Other characters are escaped: the output may go to a terminal or a tool that has no UTF-8.
        return text if text.isascii() else json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def _encoded(self) -> bytes:
        try:
            return msgspec.json.encode(self)
        except UnicodeEncodeError:  # of a path whose bytes are not UTF-8
            return msgspec.json.encode(_encodable(msgspec.to_builtins(self)))


def _encodable(value: Any) -> Any:
    """Return a value with a question mark for each lone surrogate in its texts, for which UTF-8 has no bytes."""
    if isinstance(value, str):
        return value.encode(errors="replace").decode()

    if isinstance(value, dict):
        return {_encodable(key): _encodable(each) for key, each in value.items()}

    return [_encodable(each) for each in value] if isinstance(value, list) else value
