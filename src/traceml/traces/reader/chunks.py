"""A chunk of a trace's text, and the interface of the files that chunks come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from traceml.traces.reader.buffers import TextBuffer
from traceml.traces.reader.columns import FileDamage

__all__ = ["CHUNK_BYTES", "GAP", "MAX_TEXT_BYTES", "Chunk", "ChunkSource"]

CHUNK_BYTES = 4 * 1024 * 1024  # of text, about: the work of one thread at a time
MAX_TEXT_BYTES = 32 * 1024 * 1024  # of compressed parts that are taken together; more is read in parts
GAP = b"\x1e\n"
"""Text in place of what was lost. No JSON value contains it, so that halves on its sides are not read as one event."""


@dataclass(slots=True)
class Chunk:
    """A part of a file.

    Args:
        text: its text; valid until the next chunk is loaded into the same buffer.
        end: where the next chunk has to begin.
        stop: its expected end, where the next chunk was assumed to begin.
        damage: ranges that could not be decompressed; offsets in the file.
        too_long: the text exceeds the limit and is only the beginning: read the chunk in parts.
    """

    text: memoryview
    begin: int
    end: int
    stop: int
    damage: list[FileDamage] = field(default_factory=list)
    too_long: bool = False


class ChunkSource(Protocol):
    """A file as chunks. `take` is called under a lock, its result without one."""

    def take(self, buffer: TextBuffer) -> Callable[[], Chunk] | None:
        """Return a function that loads the next chunk into a buffer; None at the end."""

    def parts(self, begin: int, stop: int, buffer: TextBuffer) -> Iterator[Chunk]:
        """Load a range in chunks of limited size."""

    def close(self) -> None:
        """Close the file."""
