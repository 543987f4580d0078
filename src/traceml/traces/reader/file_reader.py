"""The chunks of a file put together again: each begins where the one before it ended, in the file and in its events."""

from __future__ import annotations

from traceml.traces.reader.chunk_source import Chunk
from traceml.traces.reader.columns import EventBatch, FileDamage, TraceFileFacts
from traceml.traces.reader.event_rows import MICROSECONDS
from traceml.traces.reader.formats import HeaderParser, TrailerParser, time_decimals
from traceml.traces.reader.native_scanner import NativeScanner
from traceml.traces.reader.python_scanner import PythonScanner, Text
from traceml.traces.reader.scan_result import ScanResult, joined

__all__ = ["MAX_DAMAGE", "FileReader", "Guess", "Scanner"]

Scanner = NativeScanner | PythonScanner
MAX_DAMAGE = 1000  # entries per file: further damage is added up in the last one
_SAME_BYTES = 8  # between two damages that are reported as one

# A chunk that was scanned from a place where an event seemed to begin: that place, and what was found.
Guess = tuple[int, ScanResult]


class FileReader:
    """The reading of one file, in order.

    Args:
        facts: completed on the way.
        source: the number of the file.
    """

    def __init__(self, facts: TraceFileFacts, source: int) -> None:
        self.expected = 0  # where the next chunk has to begin
        self.decimals = time_decimals(facts.path)
        self._facts, self._source = facts, source
        self._beginning: HeaderParser | None = HeaderParser()
        self._ending: TrailerParser | None = None
        self._wrapped = self._lost = False
        self._tail = b""  # text that belongs in front of the next chunk
        self._raw = 0  # bytes of text so far, the tail included
        self._sequence = 0

    def accept(self, chunk: Chunk, guess: Guess | None, scanner: Scanner) -> EventBatch | None:
        """Take the next chunk; return its events, None when it has none.

        Args:
            chunk: the chunk.
            guess: what a thread found in it ahead, None when that was not tried.
            scanner: scans what is left to be scanned.
        """
        self.expected = chunk.end
        self._note(chunk.damage)
        self._raw += len(chunk.text)
        self._facts.raw_bytes = self._raw
        if self._ending is not None:
            self._ending.add(bytes(chunk.text))
            return None

        if guess is not None and self._beginning is None:
            piece = self._stitched(chunk.text, guess, scanner)
            if piece is not None:
                return self._batch(piece, chunk.text)

        text, start = self._tail + chunk.text, 0
        if self._beginning is not None:
            found = self._begin(text, final=False)
            if found is None:
                self._tail = text
                return None

            start = found

        return self._scan(scanner, text, start, final=False)

    def finish(self, scanner: Scanner) -> EventBatch | None:
        """Take the end of the file; return the events that were still open."""
        start = 0 if self._beginning is None else self._begin(self._tail, final=True) or 0
        batch = None
        if self._ending is None and (self._tail or self._lost):
            batch = self._scan(scanner, self._tail, start, final=True)

        if self._raw == 0 and not self._facts.damage:
            self._note([FileDamage(0, "an empty file", 0)])
        elif self._wrapped and (self._ending is None or not self._ending.read(self._facts.header)):
            self._note([FileDamage(self._raw, "the object around traceEvents is not closed", 0)])

        return batch

    def _begin(self, text: bytes, *, final: bool) -> int | None:
        """Return where the events begin, once that can be told."""
        assert self._beginning is not None
        start = self._beginning.find(text, final=final)
        if start is not None:
            self._wrapped = self._beginning.wrapped
            self._facts.header.update(self._beginning.header if self._wrapped else {})
            self._beginning = None

        return start

    def _stitched(self, text: Text, guess: Guess, scanner: Scanner) -> ScanResult | None:
        """Put a piece that was scanned ahead behind what precedes it; None when it does not fit there."""
        start, ahead = guess
        if self._lost or (not self._wrapped and (ahead.found.damage or ahead.found.closed)):
            return None

        seam = self._tail + text[:start]
        head = scanner.scan(seam, 0, wrapped=self._wrapped, final=False)
        if head.found.stop != len(seam) or head.found.damage or head.found.closed or head.found.lost:
            return None

        whole = joined(head, ahead)
        whole.found.damage = ahead.found.damage
        return whole

    def _scan(self, scanner: Scanner, text: bytes, start: int, *, final: bool) -> EventBatch | None:
        """Scan text that ends where the text so far does."""
        piece = scanner.scan(text, start, wrapped=self._wrapped, final=final, lost=self._lost)
        return self._batch(piece, text)

    def _batch(self, piece: ScanResult, text: Text) -> EventBatch | None:
        """Note what was found in a text that ends where the text so far does."""
        begin = self._raw - len(text)
        self._note([FileDamage(begin + hurt.offset, hurt.what, hurt.lost_bytes) for hurt in piece.found.damage])
        self._tail, self._lost = bytes(text[piece.found.stop :]), piece.found.lost
        if piece.found.closed:
            self._ending, self._tail = TrailerParser(), b""
            self._ending.add(bytes(text[piece.found.stop :]))

        self._facts.events += piece.events
        if not piece.events and not piece.found.meta:
            return None

        piece.found.fractional |= self.decimals < MICROSECONDS
        self._sequence += 1
        return piece.batch(self._source, self._sequence - 1)

    def _note(self, damage: list[FileDamage]) -> None:
        for hurt in damage:
            self._note_one(hurt)

    def _note_one(self, hurt: FileDamage) -> None:
        """Add a damage; what begins where the last one ended, but for commas and brackets, is the same one."""
        known = self._facts.damage
        last = known[-1] if known else None
        if last is not None and last.lost_bytes and hurt.lost_bytes and 0 <= hurt.offset - _end(last) <= _SAME_BYTES:
            known[-1] = FileDamage(last.offset, last.what, _end(hurt) - last.offset)
        elif last is not None and (not hurt.what or len(known) >= MAX_DAMAGE):
            what = last.what if not hurt.what else "this and further damage"
            known[-1] = FileDamage(last.offset, what, last.lost_bytes + hurt.lost_bytes)
        else:
            known.append(hurt)


def _end(damage: FileDamage) -> int:
    return damage.offset + damage.lost_bytes
