"""Reading of traces by a pool of threads.

Memory is bounded whatever the size of the files: a chunk of text per thread (4 MiB, up to 32 MiB where gzip members are
that long), the columns of a few chunks, and the distinct strings.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from traceml.errors import TraceEmptyError
from traceml.traces.reader.columns import EventBatch, StringTable, TraceFileFacts
from traceml.traces.reader.native_scanner import new_scanner
from traceml.traces.reader.pipeline import ReadPipeline
from traceml.traces.reader.python_scanner import PythonScanner
from traceml.traces.reader.trace_files import conversion_advice, discover

__all__ = ["TraceReader", "check_read", "read"]

_MAX_WORKERS = 8
_SHOWN = 5  # files named in an error
_COMPLETE = "Was it written by a tracer, and to its end?"


def read(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    args: Iterable[str] = (),
    strings: StringTable | None = None,
    workers: int = 0,
    metadata: Collection[str] | None = None,
) -> TraceReader:
    """Return a reader of traces.

    Examples:
        >>> reader = traces.read("trace.pfw.gz")
        >>> sum(len(batch.name) for batch in reader)
        1

    Args:
        paths: files, folders and patterns, as in `discover`.
        args: keys of the events' `args` to return as columns.
        strings: numbers of names; a new table when None.
        workers: threads; 0 for one per core that this process may use, at most 8.
        metadata: names of the metadata events to return; None for all.

    Returns:
        Batches to iterate over, once.

    Raises:
        TraceNotFoundError: no trace was found under a path.
    """
    threads = workers or min(len(os.sched_getaffinity(0)), _MAX_WORKERS)
    known = StringTable() if strings is None else strings
    make_scanner = partial(new_scanner, tuple(dict.fromkeys(args)), known, metadata)
    return TraceReader(discover(paths), known, make_scanner, threads)


class TraceReader:
    """Traces as batches of columns; iterate over it once.

    Attributes:
        files: facts about the files, in order; complete after the iteration.
        strings: the values of the numbers in the columns.
    """

    def __init__(
        self, paths: Sequence[Path], strings: StringTable, make_scanner: Callable[[], PythonScanner], workers: int
    ) -> None:
        self.files = [TraceFileFacts(path, path.stat().st_size) for path in paths]
        self.strings = strings
        self._make_scanner, self._workers = make_scanner, workers

    def __iter__(self) -> Iterator[EventBatch]:
        """Yield batches: file after file, in the order of each file.

        Raises:
            TraceEmptyError: at the end, when no file contains an event, and one is no trace.
        """
        yield from ReadPipeline(self.files, self._make_scanner, self._workers).batches()
        check_read(self.files)


def check_read(files: Sequence[TraceFileFacts]) -> None:
    """Check files that were read: a trace may be empty.

    Raises:
        TraceEmptyError: no file contains an event, and one is no trace.
    """
    if any(facts.damage for facts in files) and not any(facts.events for facts in files):
        raise TraceEmptyError(_nothing_in(files))


def _nothing_in(files: Sequence[TraceFileFacts]) -> str:
    """Return the text of an error about files without events."""
    shown = [f"{facts.path} ({_reason(facts)})" for facts in files[:_SHOWN]]
    more = f", and {len(files) - _SHOWN} more" if len(files) > _SHOWN else ""
    advice = next(filter(None, (conversion_advice(facts.path) for facts in files[:_SHOWN])), _COMPLETE)
    return f"there is no trace event in {', '.join(shown)}{more}. {advice}"


def _reason(facts: TraceFileFacts) -> str:
    damage = facts.damage[0].what if facts.damage else "only metadata or an empty list"
    return f"{facts.bytes:,} bytes, {facts.raw_bytes:,} of text; {damage}"
