"""Formats of a trace file: events one after another, an array of them, or an object that contains the array."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from traceml.traces.reader.event_rows import MICROSECONDS
from traceml.traces.reader.python_scanner import MAX_EVENT_BYTES, Text, parse
from traceml.traces.reader.trace_files import first_text

__all__ = ["HeaderParser", "TrailerParser", "find_start", "time_decimals"]

_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(rb"\s*")
_KEY = re.compile(rb'\s*"((?:[^"\\]|\\.)*)"\s*:\s*', re.DOTALL)
_COMMA = re.compile(rb"\s*,")
_CLOSE = re.compile(rb"\s*\}\s*$")
_START = re.compile(rb"\}[\s,]*(\{)\s*\"")
_UNIT = re.compile(rb'"time_metric"\s*,\s*"value"\s*:\s*"(NS|US|MS|SEC)"')
_DECIMALS = {b"NS": 0, b"US": MICROSECONDS, b"MS": 6, b"SEC": 9}
_NEXT_OBJECT = re.compile(rb'\}\s*(\{)\s*"[^"]*"\s*:')  # without a comma: never within one JSON value
_EDGE_BYTES = 64
_MAX_KEPT_BYTES = 64 * 1024  # of a value other than the events
_MAX_ENDING_BYTES = 1024 * 1024
_DECODER = json.JSONDecoder()


def time_decimals(path: Path) -> int:
    """Return the decimals of a file's times that make them nanoseconds; dftracer's metadata may name another unit."""
    unit = _UNIT.search(first_text(path))
    return MICROSECONDS if unit is None else _DECIMALS[unit[1]]


def find_start(text: Text) -> int | None:
    """Return where an event most likely begins in the middle of a file; None when there is no such place.

    It is certain only once everything before it was read up to there.
    """
    for match in _START.finditer(text, 0, 1 << 18):
        position = match.start(1)
        try:
            event, _ = parse(text, position, final=False)
        except ValueError:
            continue

        if "ph" in event:
            return position

    return None


class HeaderParser:
    """Parser of a file up to its first event.

    Attributes:
        wrapped: the events are in the `traceEvents` of an object.
        header: the keys before them.
    """

    def __init__(self) -> None:
        self.wrapped = False
        self.header: dict[str, Any] = {}

    def find(self, text: bytes, *, final: bool) -> int | None:
        """Return where events begin; None when more text is needed.

        Args:
            text: all text of the file so far.
            final: it is the whole file.
        """
        start = _skip_space(text, len(_BOM) if text.startswith(_BOM) else 0)
        if text[start : start + 1] != b"{":
            return start if text[start:] or final else None

        self.header = {}
        events = self._walk(text, start + 1)
        if events is None and not final and len(text) <= MAX_EVENT_BYTES:
            return None

        return events or start

    def _walk(self, text: bytes, position: int) -> int | None:
        """Return the end of the keys before the events; 0 for an event or a broken object, None when it is cut off."""
        while True:
            key = _KEY.match(text, position)
            if key is None:
                return 0 if _is_over(text, position) else None

            name, value = _name(key[1]), key.end()
            if name == "ph":
                return 0

            if name == "traceEvents" and text[value : value + 1] == b"[":
                self.wrapped = True
                return value + 1

            end = _keep(self.header, name, text, value)
            comma = None if end is None else _COMMA.match(text, end)
            if comma is None:
                return 0 if end is not None and _is_over(text, end) else None

            position = comma.end()


class TrailerParser:
    """Parser of the text after the events of an object: more keys, and its end.

    Attributes:
        other_bytes: bytes from the begin of another object on, as in two files that were joined; 0 without one.
    """

    def __init__(self) -> None:
        self._text = self._edge = b""
        self._too_long = False
        self.other_bytes = 0

    def add(self, text: bytes) -> None:
        """Append text."""
        seen = self._edge + text
        other = None if self.other_bytes else _NEXT_OBJECT.search(seen)
        self.other_bytes += len(text) if self.other_bytes else len(seen) - other.start(1) if other else 0
        self._edge = seen[-_EDGE_BYTES:]
        self._too_long |= len(self._text) + len(text) > _MAX_ENDING_BYTES
        self._text += b"" if self._too_long else text

    def read(self, header: dict[str, Any]) -> bool:
        """Add the keys to a header; return whether the object is closed properly."""
        if self._too_long:
            return True

        text, position = self._text, 1
        while (comma := _COMMA.match(text, position)) is not None:
            key = _KEY.match(text, comma.end())
            end = None if key is None else _keep(header, _name(key[1]), text, key.end())
            if end is None:
                return False

            position = end

        return _CLOSE.match(text, position) is not None


def _keep(header: dict[str, Any], name: str, text: bytes, position: int) -> int | None:
    """Add a value to a header unless it is large; return its end, None when it is cut off or broken."""
    for length in (4096, len(text)):
        part = text[position : position + length].decode("utf-8", "surrogateescape")
        try:
            value, end = _DECODER.raw_decode(part)
        except (ValueError, RecursionError):
            continue

        end = len(part[:end].encode("utf-8", "surrogateescape"))
        if end < length or length == len(text):  # a number may continue
            if end <= _MAX_KEPT_BYTES:
                header[name] = value

            return position + end

    return None


def _is_over(text: bytes, position: int) -> bool:
    """Return whether something other than a key follows."""
    position = _skip_space(text, position)
    return position < len(text) and text[position] != ord('"')


def _name(key: bytes) -> str:
    return key.decode("utf-8", "backslashreplace")


def _skip_space(text: bytes, position: int) -> int:
    match = _SPACE.match(text, position)
    return position if match is None else match.end()
