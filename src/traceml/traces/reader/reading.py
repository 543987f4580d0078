"""TraceReader traces: threads take chunks in turn, inflate and scan them side by side, and put them together in order.

Memory is bounded whatever the size of the files: per thread one chunk of text (4 MiB, up to 32 MiB where gzip members
are that long) and its columns, a few finished batches, and the strings that occurred.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from traceml.errors import TraceEmptyError
from traceml.traces.reader.columns import EventBatch, StringTable, TraceFileFacts
from traceml.traces.reader.pipeline import ReadPipeline
from traceml.traces.reader.trace_files import discover

__all__ = ["TraceReader", "read"]

_MAX_WORKERS = 8
_SHOWN = 5  # files named in an error
Value = TypeVar("Value")


def read(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    args: Iterable[str] = (),
    strings: StringTable | None = None,
    workers: int = 0,
) -> TraceReader:
    """Begin to read traces.

    Args:
        paths: files, folders and patterns, as `discover` takes them.
        args: keys of the events' `args` that are wanted as columns.
        strings: where names get their numbers; a new one when None.
        workers: threads; 0 for one per core that this process may use, at most 8.

    Returns:
        Batches to iterate over, once.

    Raises:
        TraceNotFoundError: a path leads to no trace.
    """
    threads = workers or min(len(os.sched_getaffinity(0)), _MAX_WORKERS)
    return TraceReader(
        discover(paths), tuple(dict.fromkeys(args)), StringTable() if strings is None else strings, threads
    )


class TraceReader:
    """Traces as batches of columns; iterate over it once.

    Attributes:
        files: the files in their order; complete when the iteration is over.
        strings: the values behind the numbers in the columns.
    """

    def __init__(self, paths: Sequence[Path], keys: tuple[str, ...], strings: StringTable, workers: int) -> None:
        self.files = [TraceFileFacts(path, path.stat().st_size) for path in paths]
        self.strings = strings
        self._keys, self._workers = keys, workers

    def __iter__(self) -> Iterator[EventBatch]:
        """Yield batches: file after file, each in its own order.

        Raises:
            TraceEmptyError: at the end, when there was not one event in all files.
        """
        return self.map(lambda batch: batch)

    def map(self, function: Callable[[EventBatch], Value]) -> Iterator[Value]:
        """Yield what a function makes of each batch, in the order of the batches.

        Args:
            function: called in the reading threads, several at a time.

        Raises:
            TraceEmptyError: at the end, when there was not one event in all files.
        """
        line = ReadPipeline(self.files, self._keys, self.strings, function, self._workers)
        threads = [threading.Thread(target=line.work, daemon=True, name=f"trace-{i}") for i in range(self._workers)]
        for thread in threads:
            thread.start()

        try:
            yield from line.values()
        finally:
            line.stop()
            for thread in threads:
                thread.join()

            line.close()

        if not any(facts.events for facts in self.files):
            raise TraceEmptyError(_nothing_in(self.files))


def _nothing_in(files: list[TraceFileFacts]) -> str:
    """Say of which files it is that no event was found in them, and why."""
    shown = [f"{facts.path} ({_why_not(facts)})" for facts in files[:_SHOWN]]
    more = f", and {len(files) - _SHOWN} more" if len(files) > _SHOWN else ""
    return f"there is no trace event in {', '.join(shown)}{more}. Was it written by a tracer, and to its end?"


def _why_not(facts: TraceFileFacts) -> str:
    damage = facts.damage[0].what if facts.damage else "only metadata or an empty list"
    return f"{facts.bytes:,} bytes, {facts.raw_bytes:,} of text; {damage}"
