"""Parts of a file that can be read independently, also on other hosts.

A part begins with a gzip member or a block of plain text, usually in the middle of an event. It returns the text before
its first whole event and after its last one; the process that joins the parts scans these. A file whose parts do not
fit (damage, a false member, text without an event) is read in one go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from traceml.errors import TraceMLError
from traceml.traces.reader.chunk_source import open_source
from traceml.traces.reader.chunks import TextBuffer
from traceml.traces.reader.columns import EventBatch, FileDamage, TraceFileFacts
from traceml.traces.reader.event_rows import MICROSECONDS
from traceml.traces.reader.formats import HeaderParser, TrailerParser, find_start, time_decimals
from traceml.traces.reader.gzip_salvage import next_member
from traceml.traces.reader.python_scanner import PythonScanner, Text
from traceml.traces.reader.scan_result import ScanResult
from traceml.traces.reader.trace_files import GZIP_MAGIC, is_zstd
from traceml.traces.reader.zstd_source import frame_starts

__all__ = ["FilePart", "IndivisibleError", "PartBoundaries", "facts_of", "join_parts", "read_part", "split"]

_PLAIN_BYTES = 64 * 1024 * 1024
_ZIPPED_BYTES = 8 * 1024 * 1024
_MIN_BYTES = 256 * 1024
_MAX_MEMBER_BYTES = 64 * 1024 * 1024  # after a longer gzip member, members are not searched for


class IndivisibleError(TraceMLError):
    """A file cannot be read in parts; it has to be read in one go."""


@dataclass(frozen=True, slots=True)
class FilePart:
    """A range of a file."""

    source: int
    path: str
    begin: int
    end: int
    whole: bool
    wrapped: bool  # the events are in an object
    decimals: int = MICROSECONDS  # decimals of a time in the file that make it nanoseconds


@dataclass(slots=True)
class PartBoundaries:
    """Facts about a part that are needed to join it to its neighbors."""

    head: bytes = b""  # text before its first whole event
    tail: bytes = b""  # text after its last one
    closed: bool = False  # the array of events ends in the part; `tail` is the text after it
    end: int = 0  # where the next part has to begin
    raw_bytes: int = 0  # size of the text
    events: int = 0
    header: dict[str, Any] = field(default_factory=dict)  # keys before the events, of a first part


def split(source: int, path: Path, *, least: int = 1) -> list[FilePart]:
    """Divide a file into parts of bounded size.

    Args:
        least: minimum number of parts, if the file is long enough.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(1 << 16)
        zipped = start.startswith(GZIP_MAGIC)
        packed = zipped or is_zstd(start)
        step = max(_MIN_BYTES, min(_ZIPPED_BYTES if packed else _PLAIN_BYTES, -(-size // least)))
        if packed:
            starts = (_member_starts if zipped else frame_starts)(file.fileno(), size, step)
        else:
            starts = [0, *range(step, size, step)]

    bounds = [*starts, size]
    wrapped, decimals = _is_wrapped(path), time_decimals(path)
    return [
        FilePart(source, str(path), begin, end, len(bounds) == 2, wrapped, decimals) for begin, end in pairwise(bounds)
    ]


def read_part(part: FilePart, scanner: PythonScanner, take: Callable[[EventBatch], None]) -> PartBoundaries:
    """Read a part, and pass each batch to `take`.

    Raises:
        IndivisibleError: the file has to be read in one go.
    """
    scanner.rows.decimals = part.decimals
    reader = _PartReader(part, scanner)
    for chunk in _chunks(part, reader.boundaries):
        if (batch := reader.accept(chunk)) is not None:
            take(batch)

    if not reader.begun:
        raise IndivisibleError(f"{part.path}: a part without a whole event")

    return reader.boundaries


class _PartReader:
    """Joins the chunks of a part.

    Attributes:
        boundaries: completed while the part is read.
        begun: the first whole event was found.
    """

    def __init__(self, part: FilePart, scanner: PythonScanner) -> None:
        self._part, self._scanner = part, scanner
        self.boundaries, self.begun = PartBoundaries(end=part.begin), False

    def accept(self, chunk: Text) -> EventBatch | None:
        """Take the next chunk, whose text is valid until the one after it; return its events."""
        result = self._attached(chunk) if self.begun and not self.boundaries.closed else None
        return self._joined(chunk) if result is None else self._batch(result, chunk)

    def _attached(self, chunk: Text) -> ScanResult | None:
        """Return the events of a chunk, scanned without a copy of it; None if that is not possible."""
        start = find_start(chunk)
        if start is None:
            return None

        seam = self.boundaries.tail + chunk[:start]
        head = self._scanner.scan(seam, 0, wrapped=self._part.wrapped, final=False)
        found = head.findings
        if found.stop != len(seam) or found.damage or found.closed or found.searching:
            return None

        return self._scanner.scan(chunk, start, wrapped=self._part.wrapped, final=False).after(head)

    def _joined(self, chunk: Text) -> EventBatch | None:
        """Return the events of a chunk and of the text before it; None if none begins yet, or they ended."""
        text = self.boundaries.tail = self.boundaries.tail + chunk
        start = 0 if self.begun else _start(self._part, text, self.boundaries)
        if start is None or self.boundaries.closed:
            return None

        self.begun = True
        return self._batch(self._scanner.scan(text, start, wrapped=self._part.wrapped, final=False), text)

    def _batch(self, result: ScanResult, text: Text) -> EventBatch:
        findings = result.findings
        if findings.damage or findings.searching:
            raise IndivisibleError(f"{self._part.path}: damage in a part")

        self.boundaries.tail, self.boundaries.closed = bytes(text[findings.stop :]), findings.closed
        self.boundaries.events += result.events
        return result.batch(self._part.source)


def join_parts(
    left: PartBoundaries, right: PartBoundaries | None, part: FilePart, scanner: PythonScanner
) -> EventBatch | None:
    """Return the events between a part and the next one, None when there are none.

    Args:
        left: boundaries of the part.
        right: boundaries of the next part; None after the last.

    Raises:
        IndivisibleError: the two do not fit.
    """
    if right is None and (left.closed or not left.tail.strip()):
        return None

    if left.closed or (right is not None and left.end != part.end):
        raise IndivisibleError(f"{part.path}: the parts do not fit")

    text = left.tail + (right.head if right else b"")
    scanner.rows.decimals = part.decimals
    result = scanner.scan(text, 0, wrapped=part.wrapped, final=right is None)
    findings = result.findings
    if findings.damage or findings.searching or findings.closed or text[findings.stop :].strip():
        raise IndivisibleError(f"{part.path}: the parts do not fit")

    left.events += result.events
    return result.batch(part.source)


def facts_of(path: Path, parts: Sequence[PartBoundaries], *, wrapped: bool) -> TraceFileFacts:
    """Return the facts about a file whose parts fit."""
    facts = TraceFileFacts(path, path.stat().st_size, sum(part.events for part in parts))
    facts.raw_bytes = sum(part.raw_bytes for part in parts)
    facts.header = dict(parts[0].header)
    if wrapped:
        trailer = TrailerParser()
        trailer.add(parts[-1].tail if parts[-1].closed else b"")
        if not trailer.read(facts.header):
            facts.damage = [FileDamage(facts.raw_bytes, "the object around traceEvents is not closed", 0)]

    return facts


def _chunks(part: FilePart, boundaries: PartBoundaries) -> Iterator[Text]:
    """Yield the texts of a part's chunks, each valid until the next one."""
    source, buffer = open_source(Path(part.path), part.begin, part.end), TextBuffer()
    try:
        while (load := source.next_chunk(buffer)) is not None:
            chunk = load()
            if chunk.damage or chunk.too_long or chunk.begin != boundaries.end:
                raise IndivisibleError(f"{part.path}: its members cannot be distinguished")

            boundaries.end = chunk.end
            boundaries.raw_bytes += len(chunk.text)
            yield chunk.text
    finally:
        source.close()


def _start(part: FilePart, text: bytes, boundaries: PartBoundaries) -> int | None:
    """Return where the first whole event of a part begins; None when more text is needed."""
    if part.begin == 0:
        header = HeaderParser()
        start = header.find(text, final=False)
        boundaries.header = header.header if header.wrapped else {}
        return start

    start = find_start(text)
    if start is not None:
        boundaries.head = text[:start]

    return start


def _member_starts(descriptor: int, size: int, step_bytes: int) -> list[int]:
    """Return starts of gzip members at least a step apart, beginning at 0; none after a very long member."""
    starts = [0]
    while True:
        begin = starts[-1] + step_bytes
        end = min(size, begin + _MAX_MEMBER_BYTES)
        if (start := next_member(descriptor, begin, end)) >= end:
            return starts

        starts.append(start)


def _is_wrapped(path: Path) -> bool:
    source = open_source(path)
    try:
        load = source.next_chunk(TextBuffer())
        header = HeaderParser()
        header.find(bytes(load().text) if load else b"", final=False)
        return header.wrapped
    finally:
        source.close()
