"""Text of a zstd file in chunks.

The headers of its blocks show where a frame ends, so frames are found without decompressing. Short frames (as pzstd
writes) are taken a few at a time and decompressed in parallel, a long one (as zstd writes) sequentially.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from traceml.traces.reader.chunks import GAP, TextBuffer
from traceml.traces.reader.columns import FileDamage
from traceml.traces.reader.compressed_chunks import CompressedChunks, Inflater
from traceml.traces.reader.gzip_salvage import next_member, read_at
from traceml.traces.reader.trace_files import SKIPPABLE, ZSTD_MAGIC, is_zstd

__all__ = ["ZstdChunks", "frame_end", "frame_starts"]

_FRAMES_BYTES = 512 * 1024  # compressed: frames are taken together until they have this much
_MAX_FRAMES_BYTES = 1024 * 1024  # compressed: a longer frame is decompressed sequentially
_PART_BYTES = 512 * 1024  # of text, taken from the decompressor at a time
_FED_BYTES = 256 * 1024
_SEARCHED_BYTES = 64 * 1024
_HEADER_BYTES = 18  # at most
_WINDOW_BYTES = 2**27  # at most, of a frame that is read; as zstd without --long=28 and more
_NO_LIMIT = 2**62


def frame_end(descriptor: int, begin: int, size: int, limit_bytes: int = _NO_LIMIT) -> int | None:
    """Return where a frame ends.

    Args:
        limit_bytes: give up on a longer one.

    Returns:
        Its end; None when no frame begins there, the file ends within it, or it is too long.
    """
    end = None
    try:
        for end in _block_ends(descriptor, begin, size):
            if end - begin > limit_bytes:
                return None
    except ValueError:
        return None

    return end


def frame_starts(descriptor: int, size: int, step_bytes: int) -> list[int]:
    """Return starts of frames at least a step apart, beginning at 0; only 0 when the file is not frames throughout."""
    starts, at = [0], 0
    while at < size:
        end = frame_end(descriptor, at, size)
        if end is None:
            return [0]

        at = end
        if at < size and at - starts[-1] >= step_bytes:
            starts.append(at)

    return starts


class ZstdChunks(CompressedChunks):
    """A zstd file of one or many frames."""

    def _inflater(self, begin: int) -> Inflater:
        return ZstdInflater(self._descriptor, begin, self._size)

    def _after_units(self, begin: int) -> int:
        end = begin
        while end < self._end and end - begin < _FRAMES_BYTES:
            found = frame_end(self._descriptor, end, self._size, _MAX_FRAMES_BYTES)
            if found is None:
                break

            end = found

        return end


class ZstdInflater(Inflater):
    """Decompresses frames one after another."""

    def __init__(self, descriptor: int, begin: int, size: int) -> None:
        super().__init__(descriptor, begin, size)
        self._input: Any = _FrameInput(descriptor, begin, size)

    def _more(self, buffer: TextBuffer) -> int:
        import zstandard

        if self._open is None and not self._next_frame():
            return self._skip_to_frame(buffer)

        try:
            made: int = self._open.readinto(buffer.room(_PART_BYTES))
        except zstandard.ZstdError as error:
            buffer.take_back(_PART_BYTES)
            buffer.add(GAP)
            self._skip(str(error).removeprefix("zstd decompress error: "))
            return len(GAP)

        buffer.take_back(_PART_BYTES - made)
        if not made:
            self._close_frame()

        return made

    def _next_frame(self) -> bool:
        """Open the frame at the current position; return whether there is one."""
        import zstandard

        begin = self._at
        if is_zstd(read_at(self._descriptor, begin, len(ZSTD_MAGIC))):
            self._input = _FrameInput(self._descriptor, begin, self._size)
            decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES)
            self._open = decompressor.stream_reader(self._input, read_size=_FED_BYTES, read_across_frames=False)
            return True

        return False

    def _skip_to_frame(self, buffer: TextBuffer) -> int:
        """Continue at the next frame; return the number of bytes of the text in place of others before it."""
        begin, self._at = self._at, _next_frame(self._descriptor, self._at, self._size)
        if _is_padding(self._descriptor, begin, self._size):
            return 0

        self._damage.append(FileDamage(begin, "bytes that are not a zstd frame", self._at - begin))
        buffer.add(GAP)
        return len(GAP)

    def _close_frame(self) -> None:
        """Go to the end of the open frame, all of whose text was returned."""
        self._open, end = None, self._input.end()
        if end is None:
            lost = self._size - self._at
            self._damage.append(FileDamage(self._at, f"the file ends within a zstd frame of {lost} bytes", 0))

        self._at = self._size if end is None else end

    def _skip(self, reason: str) -> None:
        """Go to the frame after the open, broken one."""
        begin, self._open = max(self._at, self._input.position - _FED_BYTES), None
        self._at = _next_frame(self._descriptor, max(begin, self._at + 1), self._size)
        self._damage.append(FileDamage(begin, f"a broken zstd frame ({reason})", self._at - begin))


class _FrameInput:
    """Bytes of one frame, for the decompressor, which would continue with the next one."""

    def __init__(self, descriptor: int, begin: int, size: int) -> None:
        self._descriptor, self._size = descriptor, size
        self._ends = _block_ends(descriptor, begin, size)
        self._known = begin  # end of a block, or of the frame
        self._ended = False
        self.position = begin

    def read(self, size: int) -> bytes:
        """Return the next bytes."""
        while self._known < self.position + size and not self._ended:
            self._advance()

        data = read_at(self._descriptor, self.position, min(size, max(self._known - self.position, 0)))
        self.position += len(data)
        return data

    def end(self) -> int | None:
        """Return where the frame ends, once all of it was read; None when it is cut off."""
        while not self._ended:
            self._advance()

        return self._known if self._known <= self._size else None

    def _advance(self) -> None:
        try:
            self._known = next(self._ends)
        except StopIteration:
            self._ended = True
        except ValueError:  # the decompressor is to find the cause in what follows
            self._ended, self._known = True, self._size + 1


def _block_ends(descriptor: int, begin: int, size: int) -> Iterator[int]:
    """Yield where the header, the blocks and the frame end; ValueError where that is not a frame, or is cut off."""
    header = read_at(descriptor, begin, _HEADER_BYTES)
    if len(header) >= 8 and int.from_bytes(header[:4], "little") in SKIPPABLE:
        yield _within(begin + 8 + int.from_bytes(header[4:8], "little"), size)
        return

    if not header.startswith(ZSTD_MAGIC) or len(header) < 6:
        raise ValueError("not a frame")

    at, last = begin + _header_bytes(header[4]), False
    while not last:
        yield _within(at + 3, size)
        block = int.from_bytes(read_at(descriptor, at, 3), "little")
        last, kind, length = bool(block & 1), block >> 1 & 3, block >> 3
        if kind == 3:
            raise ValueError("a reserved kind of block")

        at = _within(at + 3 + (1 if kind == 1 else length), size)  # 1: a byte that is repeated

    yield _within(at + 4 * (header[4] >> 2 & 1), size)  # a checksum


def _within(position: int, size: int) -> int:
    if position > size:
        raise ValueError("the frame is cut off")

    return position


def _header_bytes(descriptor: int) -> int:
    """Return the size of a frame's header by its first byte after the magic number."""
    single, dictionary, content = descriptor >> 5 & 1, descriptor & 3, descriptor >> 6
    return 5 + (1 - single) + (0, 1, 2, 4)[dictionary] + (single, 2, 4, 8)[content]


def _next_frame(descriptor: int, position: int, size: int) -> int:
    """Return the start of the first whole frame at or after a position; `size` when there is none."""
    return next_member(
        descriptor, position, size, ZSTD_MAGIC, lambda file, begin: frame_end(file, begin, size) is not None
    )


def _is_padding(descriptor: int, begin: int, size: int) -> bool:
    """Return whether only zeros follow, as at the end of tape blocks."""
    return size - begin <= _SEARCHED_BYTES and not read_at(descriptor, begin, size - begin).strip(b"\0")
