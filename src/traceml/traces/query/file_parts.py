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
from traceml.traces.reader.chunks import Chunk, TextBuffer
from traceml.traces.reader.columns import EventBatch, FileDamage, TraceFileFacts
from traceml.traces.reader.event_rows import MICROSECONDS
from traceml.traces.reader.file_reader import FileReader, ScanAhead
from traceml.traces.reader.formats import HeaderParser, TrailerParser, find_start, time_decimals
from traceml.traces.reader.gzip_salvage import next_member
from traceml.traces.reader.python_scanner import PythonScanner
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
    trailer: TrailerParser | None = None  # of the text after the array of events, if that ends in the part
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
    facts, found = TraceFileFacts(Path(part.path), 0), PartBoundaries(end=part.begin)
    reader = FileReader(facts, part.source, part.decimals)
    for chunk in _chunks(part):
        found.end = chunk.end
        found.raw_bytes += len(chunk.text)
        if part.begin and not reader.has_begun:
            batch = _begin(part, reader, found, found.head + chunk.text, scanner)
        else:
            batch = reader.accept(chunk, ScanAhead.of(chunk.text, scanner) if reader.has_begun else None, scanner)

        if facts.damage:
            raise IndivisibleError(f"{part.path}: damage in a part")

        if batch is not None:
            take(batch)

    if not reader.has_begun:
        raise IndivisibleError(f"{part.path}: a part without a whole event")

    found.tail, found.trailer = reader.tail, reader.trailer
    found.events, found.header = facts.events, facts.header
    return found


def _begin(
    part: FilePart, reader: FileReader, found: PartBoundaries, text: bytes, scanner: PythonScanner
) -> EventBatch | None:
    """Return the events of a part's first text, None when more text is needed; what is before them is its head."""
    start = find_start(text)
    found.head = text[:start]
    return None if start is None else reader.begin_inside(text[start:], scanner, wrapped=part.wrapped)


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
    if right is None and (left.trailer is not None or not left.tail.strip()):
        return None

    if left.trailer is not None or (right is not None and left.end != part.end):
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
    trailer = parts[-1].trailer
    if wrapped and (trailer is None or not trailer.read(facts.header)):
        facts.damage = [FileDamage(facts.raw_bytes, "the object around traceEvents is not closed", 0)]

    return facts


def _chunks(part: FilePart) -> Iterator[Chunk]:
    """Yield the chunks of a part, each valid until the next one."""
    source, buffer, end = open_source(Path(part.path), part.begin, part.end), TextBuffer(), part.begin
    try:
        while (load := source.next_chunk(buffer)) is not None:
            chunk = load()
            if chunk.damage or chunk.too_long or chunk.begin != end:
                raise IndivisibleError(f"{part.path}: its members cannot be distinguished")

            end = chunk.end
            yield chunk
    finally:
        source.close()


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
