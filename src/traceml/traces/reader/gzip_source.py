"""Text of a gzip file in chunks.

A file of many members (as dftracer and our writer produce) is taken a few members at a time. Members are found by
their magic number and first bytes. As these may also occur by chance, each chunk reports where its last member really
ended, and the next chunk is valid only if it begins there. A file of one large member is decompressed sequentially.
"""

from __future__ import annotations

from traceml.traces.native.library import find
from traceml.traces.reader.chunks import GAP, TextBuffer
from traceml.traces.reader.columns import FileDamage
from traceml.traces.reader.compressed_chunks import CompressedChunks, Inflater
from traceml.traces.reader.gzip_salvage import MAGIC, is_member, new_inflater, next_member, read_at, salvaged

__all__ = ["GzipChunks"]

_MEMBERS_BYTES = 256 * 1024  # compressed: members are taken together until they have this much
_MAX_MEMBERS_BYTES = 1024 * 1024  # compressed: a longer first member is decompressed sequentially
_FED_BYTES = 256 * 1024
_PART_BYTES = 512 * 1024  # of text, taken from the decompressor at a time


class GzipChunks(CompressedChunks):
    """A gzip file of one or many members."""

    def _inflater(self, begin: int) -> Inflater:
        return GzipInflater(self._descriptor, begin, self._size)

    def _after_units(self, begin: int) -> int:
        longest = begin + _MAX_MEMBERS_BYTES
        end = min(self._end, longest + 1) if begin == self._begin else self._end
        stop = next_member(self._descriptor, begin + _MEMBERS_BYTES, end)
        return begin if begin == self._begin and stop > longest else stop


class GzipInflater(Inflater):
    """Decompresses members one after another."""

    def __init__(self, descriptor: int, begin: int, size: int) -> None:
        super().__init__(descriptor, begin, size)
        self._fed = begin  # start of the unread bytes
        self._held = b""  # read, and not decompressed yet
        self._made = 0  # bytes of text from the open member

    def _more(self, buffer: TextBuffer) -> int:
        part = self._inflate()
        buffer.add(part)
        return len(part)

    def _inflate(self) -> bytes:
        """Return more text; may be empty."""
        if self._open is None and not self._next_member():
            return GAP

        data = self._input() if self._open.needs_input else b""
        if data is None:
            return GAP

        try:
            text: bytes = self._open.decompress(data, _PART_BYTES)
        except Exception:  # noqa: BLE001 - isal and zlib raise their own errors; the salvage finds the cause
            return self._salvage()

        self._made += len(text)
        if self._open.eof:
            self._held = self._open.unused_data + self._held
            self._open, self._at = None, self._fed - len(self._held)
        elif not data and not text and self._open.needs_input and self._fed >= self._size:
            lost = self._size - self._at
            self._fail(FileDamage(self._at, f"the file ends within a gzip member of {lost} bytes", 0), self._size)

        return text

    def _input(self) -> bytes | None:
        """Return the next bytes of the open member; None when it was cut, and another begins in its place."""
        if len(self._held) < len(MAGIC):
            read = read_at(self._descriptor, self._fed, min(_FED_BYTES, self._size - self._fed))
            self._fed, self._held = self._fed + len(read), self._held + read

        begin = self._fed - len(self._held)
        if self._made and self._held.startswith(MAGIC) and is_member(self._descriptor, begin):
            self._fail(FileDamage(begin, "a gzip member was cut here, where the next one begins", 0), begin)
            return None

        stop = _possible_member(self._held, last=self._fed >= self._size)
        data, self._held = self._held[:stop], self._held[stop:]
        return data

    def _next_member(self) -> bool:
        """Open the member at the current position; without one, continue at the next one."""
        if len(self._held) < len(MAGIC):
            self._fed = self._at
            self._held = read_at(self._descriptor, self._fed, min(_FED_BYTES, self._size - self._fed))
            self._fed += len(self._held)

        if self._held.startswith(MAGIC):
            self._open, self._made = new_inflater(), 0
            return True

        begin = self._at
        padding = not self._held.strip(b"\0") and self._fed == self._size  # as at the end of tape blocks and tar
        resume = next_member(self._descriptor, begin, self._size)
        self._fail(None if padding else FileDamage(begin, "bytes that are not a gzip member", resume - begin), resume)
        return False

    def _salvage(self) -> bytes:
        """Return the remaining text of the open, broken member before its damage."""
        begin = self._at
        found = salvaged(self._descriptor, begin, self._size, self._made)
        if found.whole:
            self._fail(FileDamage(begin, "a gzip member with a wrong checksum; its text was used", 0), found.end)
            return found.text

        resume = next_member(self._descriptor, found.end, self._size)
        self._fail(FileDamage(found.end, "a broken gzip member", resume - found.end), resume)
        return found.text + GAP

    def _fail(self, damage: FileDamage | None, resume: int) -> None:
        self._damage += [damage] if damage else []
        self._open, self._held, self._at = None, b"", resume


def _possible_member(data: bytes, *, last: bool) -> int:
    """Return the first position after the start at which a member may begin; the end of the data without one."""
    hit = find(data, MAGIC, 1)
    if hit >= 0:
        return hit

    parts = [] if last else [MAGIC[:size] for size in range(len(MAGIC) - 1, 0, -1)]
    return next((len(data) - len(part) for part in parts if data[1:].endswith(part)), len(data))
