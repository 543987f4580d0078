"""Driver of the scanner in C, which reads the usual events and leaves the rest to the scanner in Python.

Without the library (see `native/library.py`) the answers are the same, and only speed is missing.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traceml.traces.native.library import library, pointer
from traceml.traces.reader.columns import ArgColumn, StringTable
from traceml.traces.reader.event_rows import EventRow, encodable
from traceml.traces.reader.python_scanner import PythonScanner, Text, parse, parse_ranges
from traceml.traces.reader.scan_result import ARG_COLUMNS, COLUMNS, FRONT, ColumnBuilder, EventColumns, ScanFindings

__all__ = ["NativeScanner", "new_scanner"]

_ROWS = 1 << 16
_UNSURE = 1 << 12
_MAX_KEYS = 32
_AT_END, _CUT_OFF, _BROKEN, _CLOSED, _FULL, _DEEP = range(6)

_ARG_FIELDS = tuple(f"arg_{name}" for name in ARG_COLUMNS)


class _NativeColumns(ctypes.Structure):
    """`columns` of scanner.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*COLUMNS, *_ARG_FIELDS, "unsure")),
        *((name, ctypes.c_int64) for name in ("capacity", "unsure_capacity")),
        *((name, ctypes.c_int64) for name in ("rows", "unsure_rows", "stop", "fractional")),
    ]


def new_scanner(keys: tuple[str, ...], strings: StringTable, metadata: Collection[str] | None = None) -> PythonScanner:
    """Return the fastest available scanner, for use by one thread at a time.

    Args:
        metadata: names of the metadata events to return; None for all. Others are not even parsed.
    """
    loaded = library() if _are_comparable(keys) else None
    if loaded is None:
        return PythonScanner(keys, strings, metadata)

    return NativeScanner(loaded, keys, strings, metadata)


def _are_comparable(texts: Collection[str]) -> bool:
    """Whether the library can compare texts with those in a file byte by byte."""
    plain = all(text.isascii() and text.isprintable() and not set(text) & {'"', "\\"} for text in texts)
    return plain and len(texts) <= _MAX_KEYS


class NativeScanner(PythonScanner):
    """Scans with the native library."""

    def __init__(
        self, native: ctypes.CDLL, keys: tuple[str, ...], strings: StringTable, metadata: Collection[str] | None = None
    ) -> None:
        super().__init__(keys, strings, metadata)
        wanted = metadata if metadata is not None and _are_comparable(metadata) else None
        texts = b"".join(text.encode() + b"\0" for text in (*keys, *(wanted or ())))
        self._scanner = native.traceml_scanner_new(texts, len(texts), len(keys), -1 if wanted is None else len(wanted))
        if not self._scanner:
            raise MemoryError("no memory for the trace scanner")

        self._native, self._strings = native, strings
        self._numbers = np.empty(0, np.int32)  # library's number -> number in strings
        self._columns: dict[str, NDArray[Any]] = {name: np.empty(_ROWS, kind) for name, kind in COLUMNS.items()}
        self._args = {name: np.empty((len(keys), _ROWS), kind) for name, kind in ARG_COLUMNS.items()}
        self._unsure = np.empty((_UNSURE, 3), np.int64)
        self._out = _NativeColumns(capacity=_ROWS, unsure_capacity=_UNSURE, unsure=self._unsure.ctypes.data)
        for name, column in zip((*COLUMNS, *_ARG_FIELDS), (*self._columns.values(), *self._args.values()), strict=True):
            setattr(self._out, name, column.ctypes.data)

    def __del__(self) -> None:
        if getattr(self, "_scanner", None):
            self._native.traceml_scanner_free(self._scanner)

    def _advance(
        self, text: Text, position: int, wrapped: bool, findings: ScanFindings, columns: ColumnBuilder
    ) -> tuple[int, bool]:
        """Read events with the library, up to one that only Python can read, or to the end."""
        status = _FULL
        while status == _FULL:
            status, position = self._scan_natively(text, position, wrapped, findings, columns)

        findings.closed = status == _CLOSED
        return position, status in (_AT_END, _CLOSED)

    def _scan_natively(
        self, text: Text, start: int, wrapped: bool, findings: ScanFindings, columns: ColumnBuilder
    ) -> tuple[int, int]:
        """Call the library once; return why it stopped, and where."""
        out = self._out
        out.rows = out.unsure_rows = out.fractional = 0
        status = self._native.traceml_scan(
            self._scanner, _address(text), start, len(text), wrapped, self.rows.decimals, ctypes.byref(out)
        )
        position = out.stop
        patches, dropped = dict[int, EventRow](), list[int]()
        for row, begin, end, event, plain in self._unsure_events(text):
            if event is None:
                status, position, out.rows = _BROKEN, begin, row
                break

            values = self._row(event, begin, end, findings, plain=plain)
            if values is None:
                dropped.append(row)
            else:
                patches[row] = values

        findings.fractional |= bool(out.fractional)
        columns.add_block(self._block(out.rows, patches, dropped))
        return status, position

    def _unsure_events(self, text: Text) -> Iterator[tuple[int, int, int, dict[str, Any] | None, bool]]:
        """Yield row, begin, end, object, and whether it is plain, of what the library left to Python.

        An object that cannot be converted is None, and the last one.
        """
        unsure = self._unsure[: self._out.unsure_rows].tolist()
        parsed = parse_ranges(text, ((begin, end) for _, begin, end in unsure)) if unsure else None
        if parsed is not None:
            events, plain = parsed
            yield from ((*place, event, plain) for place, event in zip(unsure, events, strict=True))
            return

        for row, begin, end in unsure:
            try:
                event, _ = parse(text, begin, final=True)
            except ValueError:
                yield row, begin, end, None, False
                return

            yield row, begin, end, event, False

    def _block(self, count: int, patches: dict[int, EventRow], dropped: list[int]) -> EventColumns:
        """Return a copy of the rows that the library filled, with its numbers of names replaced by the shared ones."""
        self._update_numbers()
        block, out = self._room(count)
        native, found = self._native, ctypes.byref(self._out)
        native.traceml_copy_rows(self._scanner, found, ctypes.byref(out), pointer(self._numbers))
        for row, values in patches.items():
            block.put(row, values)

        return block.without(dropped) if dropped else block

    def _room(self, rows: int) -> tuple[EventColumns, _NativeColumns]:
        """Return memory for rows, with room for some in front of them, and where the library is to put them."""
        arrays = {name: np.empty(FRONT + rows, kind) for name, kind in COLUMNS.items()}
        blocks = {name: np.empty((len(self._keys), FRONT + rows), kind) for name, kind in ARG_COLUMNS.items()}
        args = {key: ArgColumn(*(block[place] for block in blocks.values())) for place, key in enumerate(self._keys)}
        out = _NativeColumns(capacity=FRONT + rows, rows=FRONT)
        for name, column in zip((*COLUMNS, *_ARG_FIELDS), (*arrays.values(), *blocks.values()), strict=True):
            setattr(out, name, column.ctypes.data)

        return EventColumns(arrays, args).behind(FRONT), out

    def _update_numbers(self) -> None:
        """Give names that are new in the library their shared numbers."""
        known, count = len(self._numbers), self._native.traceml_scanner_count(self._scanner)
        if known == count:
            return

        ends = np.empty(count - known, np.int64)
        at = self._native.traceml_scanner_texts(self._scanner, known, ends.ctypes.data)
        stops = ends.tolist()
        texts = ctypes.string_at(at, stops[-1])
        values = [_value(texts[start:stop]) for start, stop in zip([0, *stops], stops, strict=False)]
        numbers = self._strings.intern_all(values)
        self._numbers = np.concatenate([self._numbers, np.array(numbers, np.int32)])


def _address(text: Text) -> ctypes.c_char_p | int:
    """Return the address of a text; a byte 0 follows it, as it follows every bytes object."""
    if isinstance(text, bytes):
        return ctypes.c_char_p(text)

    return ctypes.addressof(ctypes.c_char.from_buffer(text)) if len(text) else ctypes.c_char_p(b"")


def _value(text: bytes) -> str | int:
    """Return the value of a text of the library, which keeps texts as written, behind a tag."""
    if text[:1] == b"n":
        return int(text[1:])

    written = text[1:].decode("utf-8", "surrogateescape")
    value: str = json.loads(f'"{written}"') if "\\" in written else written
    return encodable(value)
