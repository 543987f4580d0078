"""Parts of a file that can be read apart from each other, on other hosts too.

A part begins where a gzip member or a block of plain text does, mostly in the middle of an event. So it gives back the
text before its first whole event and after its last one; who puts the parts together scans that. Whatever does not fit
(damage, a member that was none, text that no event can be found in) makes the file one that is read in one go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from traceml.errors import TraceMLError
from traceml.traces.reader.buffers import TextBuffer
from traceml.traces.reader.chunk_source import open_source
from traceml.traces.reader.columns import EventBatch, FileDamage, StringTable, TraceFileFacts
from traceml.traces.reader.event_rows import MICROSECONDS
from traceml.traces.reader.formats import HeaderParser, TrailerParser, find_start, time_decimals
from traceml.traces.reader.native_scanner import new_scanner
from traceml.traces.reader.salvage import MAGIC
from traceml.traces.reader.trace_files import GZIP_MAGIC

__all__ = ["FilePart", "IndivisibleError", "PartSeams", "facts_of", "mend", "read_part", "split"]

_PLAIN_BYTES = 64 * 1024 * 1024
_ZIPPED_BYTES = 8 * 1024 * 1024
_LEAST_BYTES = 256 * 1024


class IndivisibleError(TraceMLError):
    """A file cannot be read in parts; it has to be read in one go."""


@dataclass(frozen=True, slots=True)
class FilePart:
    """A range of a file.

    Args:
        source: the number of the file.
        path: the file.
        begin, end: the range, in bytes.
        whole: it is all of the file.
        wrapped: the events are in an object.
        decimals: of its times that make them nanoseconds.
    """

    source: int
    path: str
    begin: int
    end: int
    whole: bool
    wrapped: bool
    decimals: int = MICROSECONDS


@dataclass(slots=True)
class PartSeams:
    """What a part leaves to be put together.

    Args:
        head: text before its first whole event.
        tail: text after its last one.
        closed: the array of events ends in it; `tail` is what follows.
        end: where the next part has to begin.
        raw_bytes, events: what was read.
        header: keys before the events, of a first part.
    """

    head: bytes = b""
    tail: bytes = b""
    closed: bool = False
    end: int = 0
    raw_bytes: int = 0
    events: int = 0
    header: dict[str, Any] = field(default_factory=dict)


def split(source: int, path: Path, *, least: int = 1) -> list[FilePart]:
    """Divide a file into parts of bounded size.

    Args:
        source: the number of the file.
        path: the file.
        least: how many parts there should be at least, where it is long enough.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(1 << 16)
        zipped = start.startswith(GZIP_MAGIC)
        step = max(_LEAST_BYTES, min(_ZIPPED_BYTES if zipped else _PLAIN_BYTES, -(-size // least)))
        cuts = [_member_from(file, at, size) if zipped else at for at in range(step, size, step)]

    bounds = [0, *sorted({cut for cut in cuts if cut < size}), size]
    wrapped, decimals = _is_wrapped(path), time_decimals(path)
    return [
        FilePart(source, str(path), begin, end, len(bounds) == 2, wrapped, decimals) for begin, end in pairwise(bounds)
    ]


def read_part(
    part: FilePart, keys: Sequence[str], strings: StringTable, take: Callable[[EventBatch], None]
) -> PartSeams:
    """Read a part, and give each batch of it to `take`.

    Raises:
        IndivisibleError: the file has to be read in one go.
    """
    scanner, seams, text, sequence = new_scanner(tuple(keys), strings), PartSeams(end=part.begin), b"", 0
    scanner.rules.decimals = part.decimals
    begun = False
    for chunk in _chunks(part, seams):
        text += chunk
        start = _start(part, text, seams) if not begun else 0
        if start is None:
            continue

        begun = True
        if seams.closed:
            continue

        piece = scanner.scan(text, start, wrapped=part.wrapped, final=False)
        if piece.found.damage or piece.found.lost:
            raise IndivisibleError(f"{part.path}: damage in a part")

        text, seams.closed = text[piece.found.stop :], piece.found.closed
        seams.events += piece.events
        take(piece.batch(part.source, sequence))
        sequence += 1

    if not begun:
        raise IndivisibleError(f"{part.path}: a part without a whole event")

    seams.tail = text
    return seams


def mend(
    left: PartSeams, right: PartSeams | None, part: FilePart, keys: Sequence[str], strings: StringTable
) -> EventBatch | None:
    """Return the events between a part and the next one, None when there are none.

    Args:
        left: what the part left.
        right: what the next one left; None after the last.
        part: the part.
        keys: the keys of `args` that are wanted.
        strings: where names get their numbers.

    Raises:
        IndivisibleError: the two do not fit.
    """
    if right is None and (left.closed or not left.tail.strip()):
        return None

    if left.closed or (right is not None and left.end != part.end):
        raise IndivisibleError(f"{part.path}: the parts do not fit")

    text = left.tail + (right.head if right else b"")
    scanner = new_scanner(tuple(keys), strings)
    scanner.rules.decimals = part.decimals
    piece = scanner.scan(text, 0, wrapped=part.wrapped, final=right is None)
    found = piece.found
    if found.damage or found.lost or found.closed or text[found.stop :].strip():
        raise IndivisibleError(f"{part.path}: the parts do not fit")

    left.events += piece.events
    return piece.batch(part.source, 0)


def facts_of(path: Path, parts: Sequence[PartSeams], *, wrapped: bool) -> TraceFileFacts:
    """Return what is known of a file whose parts fitted."""
    facts = TraceFileFacts(path, path.stat().st_size, sum(part.events for part in parts))
    facts.raw_bytes = sum(part.raw_bytes for part in parts)
    facts.header = dict(parts[0].header)
    if wrapped:
        ending = TrailerParser()
        ending.add(parts[-1].tail if parts[-1].closed else b"")
        if not ending.read(facts.header):
            facts.damage = [FileDamage(facts.raw_bytes, "the object around traceEvents is not closed", 0)]

    return facts


def _chunks(part: FilePart, seams: PartSeams) -> Iterator[bytes]:
    source, buffer = open_source(Path(part.path), part.begin, part.end), TextBuffer()
    try:
        while (load := source.take(buffer)) is not None:
            chunk = load()
            if chunk.damage or chunk.too_long or chunk.begin != seams.end:
                raise IndivisibleError(f"{part.path}: its members cannot be told apart")

            seams.end = chunk.end
            seams.raw_bytes += len(chunk.text)
            yield bytes(chunk.text)
    finally:
        source.close()


def _start(part: FilePart, text: bytes, seams: PartSeams) -> int | None:
    """Return where the first whole event of a part begins; None when more text is needed."""
    if part.begin == 0:
        beginning = HeaderParser()
        start = beginning.find(text, final=False)
        seams.header = beginning.header if beginning.wrapped else {}
        return start

    start = find_start(text)
    if start is not None:
        seams.head = text[:start]

    return start


def _member_from(file: Any, at: int, size: int) -> int:
    """Return where a gzip member may begin, from a place on; the end of the file when none does."""
    while at < size:
        file.seek(at)
        data = file.read(1 << 20)
        hit = data.find(MAGIC)
        if hit >= 0:
            return int(at + hit)

        at += max(1, len(data) - len(MAGIC) + 1) if len(data) == 1 << 20 else size

    return size


def _is_wrapped(path: Path) -> bool:
    source = open_source(path)
    try:
        load = source.take(TextBuffer())
        beginning = HeaderParser()
        beginning.find(bytes(load().text) if load else b"", final=False)
        return beginning.wrapped
    finally:
        source.close()
