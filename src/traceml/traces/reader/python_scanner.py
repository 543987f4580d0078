"""The scanner in plain Python: what the native one hands over, and everything where that is not installed.

Text goes through `scan` a chunk at a time. Events are JSON objects one after another; white space, commas and brackets
between them do not matter, so lines, arrays, pretty-printed and one-line files are all the same to it.
"""

from __future__ import annotations

import json
import re
from decimal import Decimal
from typing import Any

from traceml.traces.reader.columns import FileDamage, StringTable
from traceml.traces.reader.event_rows import EventRow, NotAnEventError, RowBuilder, exact_event, is_metadata
from traceml.traces.reader.scan_result import ScanFindings, ScanResult, table_of

__all__ = ["MAX_EVENT_BYTES", "CutOffError", "PythonScanner", "Text", "absorb", "next_start", "parse"]

MAX_EVENT_BYTES = 32 * 1024 * 1024  # longer ones are taken for damage: something that was never closed
_BETWEEN = re.compile(rb"[\s,\[\]]*")
_BETWEEN_WRAPPED = re.compile(rb"[\s,]*")
# Where events may go on after damage: an object that begins a line, or comes after another one.
_START = re.compile(rb"[\n}\]][\s,]*(\{)\s*[\"}]")
_STRADDLED = 64  # bytes kept when no such place was found: it may lie across the end
_NEAR_END = 16  # an error this close to the end may only mean that the rest is in the next chunk

Text = bytes | memoryview
_DECODER = json.JSONDecoder(parse_float=Decimal, parse_constant=Decimal)


class CutOffError(ValueError):
    """The text ends within an object: the rest of it may come with the next chunk."""


class PythonScanner:
    """Scans without native code.

    Args:
        keys: the keys of `args` that were asked for.
        strings: where names get their numbers.
    """

    def __init__(self, keys: tuple[str, ...], strings: StringTable) -> None:
        self._keys = keys
        self.rules = RowBuilder(keys, strings)

    def scan(self, text: Text, start: int, *, wrapped: bool, final: bool, lost: bool = False) -> ScanResult:
        """Read all events of a chunk.

        Args:
            text: the chunk.
            start: where to begin in it.
            wrapped: the events are within `"traceEvents": [...]`, and end where that does.
            final: nothing follows.
            lost: begin by searching for a place where events go on.
        """
        found, rows = ScanFindings(), list[EventRow]()
        between = _BETWEEN_WRAPPED if wrapped else _BETWEEN
        position = next_start(found, text, start, "", final=final) if lost else start
        while not found.lost:
            position = _behind(between, text, position)
            if position == len(text) or (wrapped and text[position] == ord("]")):
                found.closed = position < len(text)
                break

            try:
                event, end = parse(text, position, final=final)
            except CutOffError:
                break
            except ValueError as error:
                position = next_start(found, text, position, str(error), final=final)
                continue

            row = absorb(found, event, (position, end), len(rows), self.rules)
            rows += [row] if row else []
            position = end

        found.stop = position
        return ScanResult(*table_of(rows, self._keys), found)


def parse(text: Text, position: int, *, final: bool) -> tuple[dict[str, Any], int]:
    """Parse the object at a position; numbers stay exact.

    Returns:
        The object, and the position behind it.

    Raises:
        ValueError: there is none, or it is broken; `CutOffError` when the text ends within it.
    """
    if text[position] != ord("{"):
        raise ValueError("not an event")

    for length in (4096, 1 << 18, len(text) - position):
        part = str(text[position : position + length], "utf-8", "surrogateescape")
        try:
            event, end = _DECODER.raw_decode(part)
        except json.JSONDecodeError as error:
            if not _cut_off(error, len(part)):
                raise ValueError("not JSON") from None
        except (RecursionError, ValueError, ArithmeticError):
            raise ValueError("nested too deeply, or a number too long") from None
        else:
            return event, position + (end if part.isascii() else len(part[:end].encode("utf-8", "surrogateescape")))

        if position + length >= len(text):
            break

    if final:
        raise ValueError("the file ends within an event")

    if len(text) - position > MAX_EVENT_BYTES:
        raise ValueError("an event that does not end")

    raise CutOffError


def absorb(
    found: ScanFindings, event: dict[str, Any], place: tuple[int, int], rows: int, rules: RowBuilder
) -> EventRow | None:
    """Return a parsed object as a row, or put it where it belongs: to odd events, metadata or damage.

    Args:
        found: takes what is no row.
        event: the object.
        place: its first byte in the text, and the byte behind its last.
        rows: how many rows precede it.
        rules: what makes a row of it.
    """
    try:
        event = exact_event(event)
    except NotAnEventError as error:
        found.damage.append(FileDamage(place[0], str(error), place[1] - place[0]))
        return None

    if is_metadata(event):
        found.meta.append(event)
        return None

    row = rules.row_of(event)
    if row is None:
        found.odd.append(rules.in_microseconds(event))
        found.odd_rows.append(rows)
    else:
        found.fractional |= row[8]

    return row


def next_start(found: ScanFindings, text: Text, position: int, what: str, *, final: bool) -> int:
    """Note damage from a position on, and return where events may go on; sets `found.lost` when nowhere in the text.

    Args:
        found: takes the damage.
        text: the chunk.
        position: the first byte that cannot be used.
        what: what is wrong; empty when that was said of an earlier chunk.
        final: nothing follows.
    """
    match = _START.search(text, position)
    if match is not None:
        end = match.start(1)
    else:
        found.lost = True
        end = len(text) if final else max(position, len(text) - _STRADDLED)

    found.damage.append(FileDamage(position, what, end - position))
    return end


def _behind(pattern: re.Pattern[bytes], text: Text, position: int) -> int:
    match = pattern.match(text, position)
    return position if match is None else match.end()


def _cut_off(error: json.JSONDecodeError, length: int) -> bool:
    return error.pos >= length - _NEAR_END or error.msg.startswith("Unterminated string")
