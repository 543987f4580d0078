"""One pass over the stored frames of a run, for an export."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from traceml.database.schema import NAMES
from traceml.database.store.reader import Frame, StoreReader, StreamRecord
from traceml.database.store.run_clocks import RunClocks
from traceml.errors import StoreError

__all__ = ["FramePass", "Progress"]

Progress = Callable[[int, int], object]
"""Called from time to time with the cursor in the store and its end; the end may be passed while the run is written."""


class FramePass:
    """Reads the frames of a run in their order, as far as they can be read.

    Args:
        damage: gets the messages about unreadable parts; a frame may be read twice.

    Raises:
        StoreError: the streams cannot be read.
    """

    def __init__(self, reader: StoreReader, damage: dict[str, None], progress: Progress) -> None:
        self.reader, self.damage, self._progress = reader, damage, progress
        self.streams = {stream.id: stream for stream in reader.streams()}
        self.clocks = RunClocks(self.streams.values())
        self._names: dict[tuple[int, int], str] = {}

    def name_of(self, stream: int, number: int) -> str:
        """Return a name by its number."""
        return self._names.get((stream, number), f"(name {number})")

    def read(self, tables: Iterable[str], take: Callable[[StreamRecord, Frame], None]) -> None:
        """Pass the frames of tables on, and learn the names in between."""
        tables, after = (NAMES.name, *tables), 0
        try:
            last = self.reader.last_id()
            while frames := self.reader.frames_of(tables, after):
                after = frames[-1].id
                self._progress(after, last)
                for frame in frames:
                    self._take(frame, take)
        except StoreError as error:  # a damaged page ends the order: names come first then
            self.damage[str(error)] = None
            for frame in self.reader.salvaged_frames(tables, after):
                self._take(frame, take)

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Note the damage that a block meets, which ends the block alone."""
        try:
            yield
        except StoreError as error:
            self.damage[str(error)] = None

    def _take(self, frame: Frame, take: Callable[[StreamRecord, Frame], None]) -> None:
        stream = self.streams.get(frame.stream)
        if stream is None:  # it is newer than this export
            return

        try:
            if frame.table == NAMES.name:
                self._names |= {(stream.id, int(row["id"])): str(row["name"]) for row in frame.maps()}
            else:
                take(stream, frame)
        except (StoreError, KeyError, ValueError) as error:
            self.damage[f"frame {frame.id} of {frame.table}: {error}"] = None
