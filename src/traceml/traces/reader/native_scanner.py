"""The scanner in C, driven: it reads what it is sure of, the one in Python the rest; the answers are the same.

The library is built when the package is installed, where there is a C compiler; without it only speed is missing.
"""

from __future__ import annotations

import ctypes
import json
from dataclasses import dataclass

import numpy as np

from traceml.traces.native.library import library
from traceml.traces.reader.columns import ArgColumn, StringTable
from traceml.traces.reader.event_rows import EventRow, RowBuilder, printable
from traceml.traces.reader.python_scanner import CutOffError, PythonScanner, Text, absorb, next_start, parse
from traceml.traces.reader.scan_result import (
    ARG_COLUMNS,
    COLUMNS,
    Columns,
    ScanFindings,
    ScanResult,
    joined_args,
    table_of,
)

__all__ = ["NativeScanner", "new_scanner"]

_ROWS = 1 << 16
_UNSURE = 1 << 12
_MAX_KEYS = 32
_AT_END, _CUT_OFF, _BROKEN, _CLOSED, _FULL, _DEEP = range(6)

_NAMES = ("name", "cat", "pid", "tid", "id")
_ARG_FIELDS = tuple(f"arg_{name}" for name in ARG_COLUMNS)


class _Columns(ctypes.Structure):
    """`columns` of scanner.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*COLUMNS, *_ARG_FIELDS, "unsure")),
        *((name, ctypes.c_int64) for name in ("capacity", "unsure_capacity")),
        *((name, ctypes.c_int64) for name in ("rows", "unsure_rows", "stop", "fractional")),
    ]


def new_scanner(keys: tuple[str, ...], strings: StringTable) -> NativeScanner | PythonScanner:
    """Return the fastest scanner that there is, for one thread.

    Args:
        keys: the keys of `args` that were asked for.
        strings: where names get their numbers.
    """
    plain = all(key.isascii() and key.isprintable() and not set(key) & {'"', "\\"} for key in keys)
    loaded = library() if plain and len(keys) <= _MAX_KEYS else None
    return PythonScanner(keys, strings) if loaded is None else NativeScanner(loaded, keys, strings)


class NativeScanner:
    """Scans with the native library; one for each thread.

    Args:
        native: what `library` returned.
        keys: the keys of `args` that were asked for.
        strings: where names get their numbers.
    """

    def __init__(self, native: ctypes.CDLL, keys: tuple[str, ...], strings: StringTable) -> None:
        names = b"".join(key.encode() + b"\0" for key in keys)
        self._scanner = native.traceml_scanner_new(names, len(names), len(keys))
        if not self._scanner:
            raise MemoryError("no memory for the trace scanner")

        self._native, self._keys, self._strings = native, keys, strings
        self.rules = RowBuilder(keys, strings)
        self._numbers = np.full(1, -1, np.int32)  # own number -> number in strings; the last is that of "missing"
        self._columns: Columns = {name: np.empty(_ROWS, kind) for name, kind in COLUMNS.items()}
        self._args: Columns = {name: np.empty((len(keys), _ROWS), kind) for name, kind in ARG_COLUMNS.items()}
        self._unsure = np.empty((_UNSURE, 3), np.int64)
        self._out = _Columns(capacity=_ROWS, unsure_capacity=_UNSURE, unsure=self._unsure.ctypes.data)
        for name, column in zip((*COLUMNS, *_ARG_FIELDS), (*self._columns.values(), *self._args.values()), strict=True):
            setattr(self._out, name, column.ctypes.data)

    def __del__(self) -> None:
        if getattr(self, "_scanner", None):
            self._native.traceml_scanner_free(self._scanner)

    def scan(self, text: Text, start: int, *, wrapped: bool, final: bool, lost: bool = False) -> ScanResult:
        """Read all events of a chunk; see `PythonScanner.scan`."""
        found, segments = ScanFindings(), [_Segment(*table_of([], self._keys))]
        position = next_start(found, text, start, "", final=final) if lost else start
        while not found.lost:
            status, position = self._scan(text, position, wrapped, found, segments)
            if status in (_AT_END, _CLOSED):
                found.closed = status == _CLOSED
                break

            if status == _FULL:
                continue

            try:
                event, end = parse(text, position, final=final)
            except CutOffError:
                break
            except ValueError as error:
                position = next_start(found, text, position, str(error), final=final)
                continue

            row = absorb(found, event, (position, end), _rows_in(segments), self.rules)
            segments.append(_Segment(*table_of([row] if row else [], self._keys)))
            position = end

        found.stop = position
        return ScanResult(*_joined(segments), found)

    def _scan(
        self, text: Text, start: int, wrapped: bool, found: ScanFindings, segments: list[_Segment]
    ) -> tuple[int, int]:
        """Let the library read as far as it can; return why it stopped, and where."""
        out = self._out
        out.rows = out.unsure_rows = out.fractional = 0
        status = self._native.traceml_scan(
            self._scanner, _address(text), start, len(text), wrapped, self.rules.decimals, ctypes.byref(out)
        )
        position = out.stop
        before, patches, dropped = _rows_in(segments), dict[int, EventRow](), list[int]()
        for row, first, behind in self._unsure[: out.unsure_rows].tolist():
            try:
                event, _ = parse(text, first, final=True)
            except ValueError:
                status, position, out.rows = _BROKEN, first, row
                break

            known = absorb(found, event, (first, behind), before + row - len(dropped), self.rules)
            if known is None:
                dropped.append(row)
            else:
                patches[row] = known

        found.fractional |= bool(out.fractional)
        segments.append(self._take(out.rows, patches, dropped))
        return status, position

    def _take(self, count: int, patches: dict[int, EventRow], dropped: list[int]) -> _Segment:
        """Copy the rows that the library has filled, its own numbers of names replaced by the common ones."""
        self._number_names()
        columns = {
            name: self._numbers[column[:count]] if name in _NAMES else column[:count].copy()
            for name, column in self._columns.items()
        }
        fields = {name: block[:, :count].copy() for name, block in self._args.items()}
        fields["texts"] = self._numbers[fields["texts"]]
        args = {key: ArgColumn(*(fields[name][place] for name in ARG_COLUMNS)) for place, key in enumerate(self._keys)}
        segment = _Segment(columns, args)
        for row, values in patches.items():
            segment.put(row, values)

        return segment.without(dropped) if dropped else segment

    def _number_names(self) -> None:
        """Give names that the library has seen for the first time their common numbers."""
        known, count = len(self._numbers) - 1, self._native.traceml_scanner_count(self._scanner)
        if known == count:
            return

        ends = np.empty(count - known, np.int64)
        at = self._native.traceml_scanner_texts(self._scanner, known, ends.ctypes.data)
        stops = ends.tolist()
        texts = ctypes.string_at(at, stops[-1])
        values = [_value(texts[start:stop]) for start, stop in zip([0, *stops], stops, strict=False)]
        numbers = self._strings.intern_all(values)
        self._numbers = np.concatenate([self._numbers[:-1], np.array([*numbers, -1], np.int32)])


@dataclass(slots=True)
class _Segment:
    """Rows of a piece."""

    columns: Columns
    args: dict[str, ArgColumn]

    def put(self, place: int, row: EventRow) -> None:
        for name, number in zip(COLUMNS, row[:8], strict=True):
            self.columns[name][place] = number

        for arg, values in zip(self.args.values(), row[9], strict=True):
            arg.kinds[place], arg.integers[place], arg.floats[place], arg.texts[place] = values

    def without(self, rows: list[int]) -> _Segment:
        keep = np.ones(len(self.columns["ph"]), np.bool_)
        keep[rows] = False
        return _Segment(
            {name: column[keep] for name, column in self.columns.items()},
            {
                key: ArgColumn(arg.kinds[keep], arg.integers[keep], arg.floats[keep], arg.texts[keep])
                for key, arg in self.args.items()
            },
        )


def _rows_in(segments: list[_Segment]) -> int:
    return sum(len(segment.columns["ph"]) for segment in segments)


def _joined(segments: list[_Segment]) -> tuple[Columns, dict[str, ArgColumn]]:
    full = [segment for segment in segments if len(segment.columns["ph"])] or segments[:1]
    if len(full) == 1:
        return full[0].columns, full[0].args

    columns = {name: np.concatenate([segment.columns[name] for segment in full]) for name in COLUMNS}
    args = {key: joined_args([segment.args[key] for segment in full]) for key in full[0].args}
    return columns, args


def _address(text: Text) -> ctypes.c_char_p | int:
    """Return where a text begins; a byte 0 follows it, as it does behind every bytes object."""
    if isinstance(text, bytes):
        return ctypes.c_char_p(text)

    return ctypes.addressof(ctypes.c_char.from_buffer(text)) if len(text) else ctypes.c_char_p(b"")


def _value(text: bytes) -> str | int:
    """Return what a text of the library stands for: it keeps them as written, behind a tag."""
    if text[:1] == b"n":
        return int(text[1:])

    written = text[1:].decode("utf-8", "surrogateescape")
    value: str = json.loads(f'"{written}"') if "\\" in written else written
    return printable(value)
