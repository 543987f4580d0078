"""Search for gzip members, and recovery of data from damaged ones."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from traceml.traces.native.library import find
from traceml.traces.reader.trace_files import GZIP_MAGIC

__all__ = ["MAGIC", "Salvaged", "is_member", "new_inflater", "next_member", "read_at", "salvaged"]

MAGIC = GZIP_MAGIC + b"\x08"
_GZIP, _RAW = 31, -15  # zlib's window bits
_HEADER_BYTES, _TRAILER_BYTES = 10, 8
_HAS_SUM, _HAS_EXTRA, _HAS_NAME, _HAS_COMMENT = 2, 4, 8, 16
_SEARCHED_BYTES = 64 * 1024
_TRIED_BYTES = 4096  # compressed, to check whether a member begins there
_STEPS = (4096, 64, 1)  # bytes fed at a time: finer and finer up to the damage
_CONTROLS = bytes(code for code in range(32) if code not in b"\t\n\r\f\v")


@dataclass(slots=True)
class Salvaged:
    """Text of a broken member, up to its damage."""

    text: bytes  # the text that was not returned before
    end: int  # position of the damage; the end of the member when it is complete
    whole: bool  # the member is complete, only the checksum is wrong


def new_inflater() -> Any:
    """Return a decompressor for one gzip member: isal's where installed, four times as fast as zlib's."""
    try:
        from isal import igzip_lib
    except ImportError:
        return _Zlib()

    return igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)


def read_at(descriptor: int, position: int, size: int) -> bytes:
    """Read bytes of a file at a position; fewer only at its end."""
    data = os.pread(descriptor, size, position)
    while 0 < len(data) < size and (more := os.pread(descriptor, size - len(data), position + len(data))):
        data += more

    return data


def is_member(descriptor: int, position: int) -> bool:
    """Return whether a member of text begins at a position, and not only a magic number by chance."""
    try:
        start = new_inflater().decompress(read_at(descriptor, position, _TRIED_BYTES), 1024)
    except Exception:  # noqa: BLE001 - isal and zlib raise their own errors, and all mean no
        return False

    return bool(start) and start[:256].translate(None, _CONTROLS) == start[:256]


def next_member(
    descriptor: int, position: int, end: int, magic: bytes = MAGIC, is_sound: Callable[[int, int], bool] = is_member
) -> int:
    """Return the start of the first sound member at or after a position; `end` when there is none before it."""
    while position < end:
        data = read_at(descriptor, position, min(_SEARCHED_BYTES, end - position))
        hit = find(data, magic)
        if hit >= 0 and is_sound(descriptor, position + hit):
            return position + hit

        position += hit + 1 if hit >= 0 else max(len(data) - len(magic) + 1, 1)

    return end


def salvaged(descriptor: int, begin: int, size: int, skipped_bytes: int) -> Salvaged:
    """Decompress a broken member as far as possible.

    Args:
        begin: where the member begins.
        skipped_bytes: bytes of its text that were returned before.
    """
    position = begin + _header_bytes(read_at(descriptor, begin, _SEARCHED_BYTES))
    inflater = zlib.decompressobj(_RAW)
    made, parts = 0, []
    for step in _STEPS:
        while position < size and not inflater.eof:
            data = read_at(descriptor, position, min(step, size - position))
            before = inflater.copy()
            try:
                text = inflater.decompress(data)
            except zlib.error:
                inflater = before
                break

            position += len(data) - len(inflater.unused_data)
            parts.append(text[max(skipped_bytes - made, 0) :])
            made += len(text)

    end = position + _TRAILER_BYTES if inflater.eof else position
    return Salvaged(b"".join(parts), min(end, size), inflater.eof)


def _header_bytes(data: bytes) -> int:
    flags = data[3] if len(data) > _HEADER_BYTES else 0
    position = _HEADER_BYTES
    if flags & _HAS_EXTRA:
        position += 2 + int.from_bytes(data[position : position + 2], "little")

    for flag in (_HAS_NAME, _HAS_COMMENT):
        if flags & flag:
            position = data.find(b"\0", position) + 1

    return position + (2 if flags & _HAS_SUM else 0)


class _Zlib:
    """zlib's decompressor with the interface of isal's."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(_GZIP)

    @property
    def eof(self) -> bool:
        """Whether the member is complete."""
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        """Input after the end of the member."""
        return self._inner.unused_data

    @property
    def needs_input(self) -> bool:
        """Whether all input was decompressed."""
        return not self._inner.unconsumed_tail

    def decompress(self, data: bytes, limit_bytes: int) -> bytes:
        """Return some text."""
        return self._inner.decompress(self._inner.unconsumed_tail + data, limit_bytes)
