"""Scanner in plain Python: for events that the native scanner leaves to it, and for all where that is not built.

A scan takes a chunk of text. Events are JSON objects one after another; white space, commas and brackets between them
do not matter, so that lines, arrays, pretty-printed and one-line files are all read alike.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from decimal import Decimal
from typing import Any

from traceml.traces.reader.chunks import GAP
from traceml.traces.reader.columns import FileDamage, StringTable
from traceml.traces.reader.event_rows import EventRow, NotAnEventError, RowBuilder, cleaned
from traceml.traces.reader.scan_result import ColumnBuilder, ScanFindings, ScanResult

__all__ = ["MAX_EVENT_BYTES", "CutOffError", "PythonScanner", "Text", "parse", "parse_ranges"]

MAX_EVENT_BYTES = 32 * 1024 * 1024  # longer objects are damage: something was never closed
_BETWEEN = re.compile(rb"[\s,\[\]]*")
_BETWEEN_WRAPPED = re.compile(rb"[\s,]*")
# A place where events may continue after damage: an object that begins a line, or follows another one.
_START = re.compile(rb"[\n}\]][\s,]*(\{)\s*[\"}]")
_KEPT_BYTES = 64  # of the end of a text without such a place, which may lie across the end
_NEAR_END = 16  # an error this close to the end may only mean that the rest is in the next chunk

Text = bytes | memoryview
_DECODER = json.JSONDecoder(parse_float=Decimal, parse_constant=Decimal)


class CutOffError(ValueError):
    """The text ends within an object; the rest may be in the next chunk."""


class PythonScanner:
    """Scans without native code."""

    def __init__(self, keys: tuple[str, ...], strings: StringTable, metadata: Collection[str] | None = None) -> None:
        self._keys, self._metadata = keys, None if metadata is None else tuple(metadata)
        self.rows = RowBuilder(keys, strings)

    def scan(self, text: Text, start: int, *, wrapped: bool, final: bool, searching: bool = False) -> ScanResult:
        """Read all events of a chunk.

        Args:
            wrapped: the events are within `"traceEvents": [...]`, and end with that array.
            final: nothing follows.
            searching: begin with a search for the next event, after damage.
        """
        findings, columns = ScanFindings(), ColumnBuilder(self._keys)
        position = _next_start(findings, text, start, "", final=final) if searching else start
        while not findings.searching:
            position, ended = self._advance(text, position, wrapped, findings, columns)
            if ended:
                break

            if text[position] == GAP[0]:
                position += 1
                continue

            try:
                event, end = parse(text, position, final=final)
            except CutOffError:
                break
            except ValueError as error:
                position = _next_start(findings, text, position, str(error), final=final)
                continue

            row = self._row(event, position, end, findings)
            if row is not None:
                columns.add_row(row)

            position = end

        findings.stop = position
        return ScanResult(columns.columns(), findings)

    def _advance(
        self,
        text: Text,
        position: int,
        wrapped: bool,
        findings: ScanFindings,
        columns: ColumnBuilder,  # noqa: ARG002 - for the native scanner
    ) -> tuple[int, bool]:
        """Go to the next event to parse; return its position, and whether the events ended."""
        separators = (_BETWEEN_WRAPPED if wrapped else _BETWEEN).match(text, position)
        position = position if separators is None else separators.end()
        findings.closed = wrapped and position < len(text) and text[position] == ord("]")
        return position, findings.closed or position == len(text)

    def _row(
        self, event: dict[str, Any], begin: int, end: int, findings: ScanFindings, *, plain: bool = False
    ) -> EventRow | None:
        """Return a parsed object as a row, or add it to the metadata or the damage.

        Args:
            findings: takes what is not a row.
        """
        try:
            event = cleaned(event, plain=plain)
        except NotAnEventError as error:
            findings.damage.append(FileDamage(begin, str(error), end - begin))
            return None

        if event["ph"] == "M":
            if self._metadata is None or event.get("name") in self._metadata:
                findings.metadata.append(event)

            return None

        row = self.rows.row_of(event)
        findings.fractional |= row[8]
        return row


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
            if error.pos < len(part) - _NEAR_END and not error.msg.startswith("Unterminated string"):
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


def parse_ranges(text: Text, ranges: Iterable[tuple[int, int]]) -> tuple[list[dict[str, Any]], bool] | None:
    """Parse objects that are known to be whole and sound, all at once: this takes a fraction of the time.

    Returns:
        The objects, and whether all their texts are encodable for sure; None when one of them cannot be converted.
    """
    whole = str(b"[%b]" % b",".join([text[begin:end] for begin, end in ranges]), "utf-8", "surrogateescape")
    try:
        return _DECODER.decode(whole), whole.isascii() and "\\" not in whole
    except (RecursionError, ValueError, ArithmeticError):
        return None


def _next_start(findings: ScanFindings, text: Text, position: int, what: str, *, final: bool) -> int:
    """Add damage, and return where events may continue; sets `findings.searching` when the text has no such place.

    Args:
        position: the first unusable byte.
        what: the kind of damage; empty when it continues from the chunk before.
    """
    match = _START.search(text, position)
    if match is not None:
        end = match.start(1)
    else:
        findings.searching = True
        end = len(text) if final else max(position, len(text) - _KEPT_BYTES)

    findings.damage.append(FileDamage(position, what, end - position))
    return end
