"""The reading threads' common work: chunks are handed out, put together, and given to the user, each in order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from traceml.traces.reader.buffers import TextBuffer
from traceml.traces.reader.chunk_source import Chunk, ChunkSource, open_source
from traceml.traces.reader.columns import EventBatch, FileDamage, StringTable, TraceFileFacts
from traceml.traces.reader.file_reader import FileReader, Guess, Scanner
from traceml.traces.reader.formats import find_start
from traceml.traces.reader.native_scanner import new_scanner
from traceml.traces.reader.python_scanner import Text

__all__ = ["ReadPipeline"]

_AHEAD = 2  # chunks handed out beyond one per thread, before the user has taken what was made of the oldest
_HELD = 2  # values that one chunk may have waiting
Value = TypeVar("Value")


class _StoppedError(Exception):
    """Nobody wants the rest."""


@dataclass(slots=True)
class _ChunkTask(Generic[Value]):
    """A chunk on its way.

    Args:
        number: its place among all.
        chain: its file.
        source: where its text comes from.
        load: loads it; None for the end of the file.
        first: it is the first of its file: where events begin in it is not guessed, but found.
        values: made of it, not taken yet.
        done: there will be no more values.
    """

    number: int
    chain: FileReader
    source: ChunkSource
    load: Callable[[], Chunk] | None
    first: bool
    values: deque[Value] = field(default_factory=deque)
    done: bool = False


class ReadPipeline(Generic[Value]):
    """Where reading threads and the one that iterates meet.

    Args:
        files: completed on the way.
        keys: the keys of `args` that were asked for.
        strings: where names get their numbers.
        function: makes the values of batches.
        workers: how many threads will call `work`.
    """

    def __init__(
        self,
        files: list[TraceFileFacts],
        keys: tuple[str, ...],
        strings: StringTable,
        function: Callable[[EventBatch], Value],
        workers: int,
    ) -> None:
        self._files, self._keys, self._strings, self._function = files, keys, strings, function
        self._window = workers + _AHEAD
        self._taking = threading.Lock()  # held by the thread that takes a chunk
        self._changed = threading.Condition()  # guards all below; what is read one after another waits for it
        self._jobs: deque[_ChunkTask[Value]] = deque()  # handed out, and not yet given to the user
        self._turn = 0  # the chunk that may be put behind those before
        self._over = self._stopped = False
        self._error: BaseException | None = None
        self._open: dict[int, ChunkSource] = {}
        self._chunks = self._all_jobs()
        self._buffer = TextBuffer()  # of the thread that takes a chunk

    def values(self) -> Iterator[Value]:
        """Yield the values in order; raises what went wrong in a thread."""
        while (job := self._oldest()) is not None:
            while self._has_value(job):
                yield job.values.popleft()

        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Let the threads end."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def close(self) -> None:
        """Close the files; after the threads have ended."""
        for source in self._open.values():
            source.close()

        self._open.clear()

    def work(self) -> None:
        """Work on chunks until there are no more; the whole life of a thread."""
        try:
            scanner = new_scanner(self._keys, self._strings)
            buffer = TextBuffer()
            while (job := self._take(buffer)) is not None:
                self._run(job, scanner, buffer)
        except _StoppedError:
            return
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that iterates
            self._error = self._error or error
            self.stop()

    def _all_jobs(self) -> Iterator[_ChunkTask[Value]]:
        """Yield all chunks of all files; the next one is asked for under `_taking`."""
        number = 0
        for place, facts in enumerate(self._files):
            try:
                source = self._open[place] = open_source(facts.path)
            except OSError as error:
                facts.damage.append(FileDamage(0, f"cannot be read: {error.strerror}", facts.bytes))
                continue

            chain, first = FileReader(facts, place), True
            while (load := source.take(self._buffer)) is not None:
                yield _ChunkTask(number, chain, source, load, first)
                number, first = number + 1, False

            yield _ChunkTask(number, chain, source, None, first)
            number += 1

    def _take(self, buffer: TextBuffer) -> _ChunkTask[Value] | None:
        with self._taking:
            self._wait(lambda: len(self._jobs) < self._window)
            self._buffer = buffer
            job = next(self._chunks, None)
            with self._changed:
                self._over |= job is None
                self._jobs.extend([] if job is None else [job])
                self._changed.notify_all()

            return job

    def _run(self, job: _ChunkTask[Value], scanner: Scanner, buffer: TextBuffer) -> None:
        chain = job.chain
        scanner.rules.decimals = chain.decimals
        chunk = job.load() if job.load else None
        guess = None if chunk is None or job.first else _scanned_ahead(chunk.text, scanner)
        self._wait(lambda: self._turn == job.number)
        if chunk is None:
            batch = chain.finish(scanner)
        elif chunk.begin == chain.expected and not chunk.too_long:
            batch = chain.accept(chunk, guess, scanner)
        else:
            for part in job.source.parts(chain.expected, chunk.stop, buffer):
                self._give(job, chain.accept(part, None, scanner))

            batch = None

        with self._changed:
            self._turn += 1
            self._changed.notify_all()

        self._give(job, batch)
        with self._changed:
            job.done = True
            self._changed.notify_all()

    def _give(self, job: _ChunkTask[Value], batch: EventBatch | None) -> None:
        if batch is None:
            return

        value = self._function(batch)
        self._wait(lambda: len(job.values) < _HELD)
        with self._changed:
            job.values.append(value)
            self._changed.notify_all()

    def _oldest(self) -> _ChunkTask[Value] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._over or self._stopped)
            return None if self._stopped or not self._jobs else self._jobs[0]

    def _has_value(self, job: _ChunkTask[Value]) -> bool:
        """Wait for a value of the oldest chunk; without more to come, be done with the chunk."""
        with self._changed:
            self._changed.notify_all()  # the one before was taken
            self._changed.wait_for(lambda: job.values or job.done or self._stopped)
            if not job.values and not self._stopped:
                self._jobs.popleft()
                self._changed.notify_all()

            return bool(job.values) and not self._stopped

    def _wait(self, ready: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: ready() or self._stopped)
            if self._stopped:
                raise _StoppedError


def _scanned_ahead(text: Text, scanner: Scanner) -> Guess | None:
    """Scan from where an event seems to begin, before it is known what precedes the text."""
    start = find_start(text)
    return None if start is None else (start, scanner.scan(text, start, wrapped=True, final=False))
