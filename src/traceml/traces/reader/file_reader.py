"""Assembly of one file from its chunks: each begins where the one before it ended, in the file and in its events."""

from __future__ import annotations

from dataclasses import dataclass

from traceml.traces.reader.chunks import Chunk
from traceml.traces.reader.columns import EventBatch, FileDamage, TraceFileFacts
from traceml.traces.reader.event_rows import MICROSECONDS
from traceml.traces.reader.formats import HeaderParser, TrailerParser, find_start
from traceml.traces.reader.python_scanner import PythonScanner, Text
from traceml.traces.reader.scan_result import ScanResult

__all__ = ["FileReader", "ScanAhead"]

_MAX_DAMAGE = 1000  # entries per file: further damage is added up in the last one
_SAME_BYTES = 8  # distance up to which two ranges of damage are reported as one


@dataclass(frozen=True, slots=True)
class ScanAhead:
    """Scan of a chunk from a place where an event seems to begin, before the text in front of it is known."""

    start: int
    result: ScanResult

    @classmethod
    def of(cls, text: Text, scanner: PythonScanner) -> ScanAhead | None:
        """Scan a chunk; None if there is no such place."""
        start = find_start(text)
        return None if start is None else cls(start, scanner.scan(text, start, wrapped=True, final=False))


class FileReader:
    """Joins the chunks of one file, in order.

    Args:
        facts: facts about the file; completed while it is read.
        decimals: decimals of a time in the file that make it nanoseconds.

    Attributes:
        position: where the next chunk has to begin.
        tail: text that belongs in front of the next chunk.
        trailer: of the text after the events, once they have ended.
    """

    def __init__(self, facts: TraceFileFacts, source: int, decimals: int) -> None:
        self.position, self.decimals = 0, decimals
        self._facts, self._source = facts, source
        self._header: HeaderParser | None = HeaderParser()
        self.trailer: TrailerParser | None = None
        self._wrapped = self._searching = False
        self.tail = b""
        self._text_bytes = 0  # text so far, the tail included

    @property
    def has_begun(self) -> bool:
        """Whether the first event was found."""
        return self._header is None

    def begin_inside(self, text: bytes, scanner: PythonScanner, *, wrapped: bool) -> EventBatch | None:
        """Take the first text of a part of a file, which begins with an event; return its events.

        Args:
            wrapped: the events are in an object.
        """
        self._header, self._wrapped, self._text_bytes = None, wrapped, len(text)
        return self._scan(scanner, text, 0, final=False)

    def accept(self, chunk: Chunk, ahead: ScanAhead | None, scanner: PythonScanner) -> EventBatch | None:
        """Take the next chunk; return its events, None when it has none.

        Args:
            ahead: its scan by another thread, None without one.
        """
        self.position = chunk.end
        self._add_damage(chunk.damage)
        self._text_bytes += len(chunk.text)
        self._facts.raw_bytes = self._text_bytes
        if self.trailer is not None:
            self.trailer.add(bytes(chunk.text))
            return None

        if ahead is not None and self._header is None:
            result = self._attached(chunk.text, ahead, scanner)
            if result is not None:
                return self._batch(result, chunk.text)

        text, start = self.tail + chunk.text, 0
        if self._header is not None:
            found = self._read_header(text, final=False)
            if found is None:
                self.tail = text
                return None

            start = found

        return self._scan(scanner, text, start, final=False)

    def finish(self, scanner: PythonScanner) -> EventBatch | None:
        """Take the end of the file; return the events that were still open."""
        start = 0 if self._header is None else self._read_header(self.tail, final=True) or 0
        batch = None
        if self.trailer is None and (self.tail or self._searching):
            batch = self._scan(scanner, self.tail, start, final=True)

        if self._text_bytes == 0 and not self._facts.damage:
            self._add_damage([FileDamage(0, "an empty file", 0)])
        elif self.trailer is not None and (lost := self.trailer.other_bytes):
            what = "another object after that of traceEvents; it is not read: make it a file of its own"
            self._add_damage([FileDamage(self._text_bytes - lost, what, lost)])
        elif self._wrapped and (self.trailer is None or not self.trailer.read(self._facts.header)):
            self._add_damage([FileDamage(self._text_bytes, "the object around traceEvents is not closed", 0)])

        return batch

    def _read_header(self, text: bytes, *, final: bool) -> int | None:
        """Return where the events begin; None when more text is needed."""
        assert self._header is not None
        start = self._header.find(text, final=final)
        if start is not None:
            self._wrapped = self._header.wrapped
            self._facts.header.update(self._header.header if self._wrapped else {})
            self._header = None

        return start

    def _attached(self, text: Text, ahead: ScanAhead, scanner: PythonScanner) -> ScanResult | None:
        """Return a scan ahead with the events in front of it; None when it began in the wrong place."""
        findings = ahead.result.findings
        if self._searching or (not self._wrapped and (findings.damage or findings.closed)):
            return None

        seam = self.tail + text[: ahead.start]
        head = scanner.scan(seam, 0, wrapped=self._wrapped, final=False)
        before = head.findings
        if before.stop != len(seam) or before.damage or before.closed or before.searching:
            return None

        return ahead.result.after(head)

    def _scan(self, scanner: PythonScanner, text: bytes, start: int, *, final: bool) -> EventBatch | None:
        """Scan text that ends where the text so far does."""
        result = scanner.scan(text, start, wrapped=self._wrapped, final=final, searching=self._searching)
        return self._batch(result, text)

    def _batch(self, result: ScanResult, text: Text) -> EventBatch | None:
        """Record the findings in a text that ends where the text so far does; return its events."""
        begin, findings = self._text_bytes - len(text), result.findings
        self._add_damage([FileDamage(begin + each.offset, each.what, each.lost_bytes) for each in findings.damage])
        self.tail, self._searching = bytes(text[findings.stop :]), findings.searching
        if findings.closed:
            self.trailer, self.tail = TrailerParser(), b""
            self.trailer.add(bytes(text[findings.stop :]))

        self._facts.events += result.events
        if not result.events and not findings.metadata:
            return None

        findings.fractional |= self.decimals < MICROSECONDS
        return result.batch(self._source)

    def _add_damage(self, damage: list[FileDamage]) -> None:
        """Add damage; a range that begins where the last one ended, apart from commas and brackets, extends it."""
        known = self._facts.damage
        for each in damage:
            last = known[-1] if known else None
            if (
                last is not None
                and last.lost_bytes
                and each.lost_bytes
                and 0 <= each.offset - _end(last) <= _SAME_BYTES
            ):
                known[-1] = FileDamage(last.offset, last.what, _end(each) - last.offset)
            elif last is not None and (not each.what or len(known) >= _MAX_DAMAGE):
                what = last.what if not each.what else "this and further damage"
                known[-1] = FileDamage(last.offset, what, last.lost_bytes + each.lost_bytes)
            else:
                known.append(each)


def _end(damage: FileDamage) -> int:
    return damage.offset + damage.lost_bytes
