"""Chunks of files, loaded and scanned by a pool of threads, and joined in order by the thread that iterates."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from traceml.traces.reader.chunk_source import open_source
from traceml.traces.reader.chunks import Chunk, ChunkSource, TextBuffer
from traceml.traces.reader.columns import EventBatch, FileDamage, TraceFileFacts
from traceml.traces.reader.file_reader import FileReader, ScanAhead
from traceml.traces.reader.formats import time_decimals
from traceml.traces.reader.python_scanner import PythonScanner

__all__ = ["ReadPipeline"]

_AHEAD = 1  # chunks beyond one per thread: threads scan while the events of earlier chunks are added up


@dataclass(slots=True)
class _ChunkTask:
    """A chunk of a file."""

    number: int  # position in the order of all chunks
    reader: FileReader  # joins the chunks of the file
    source: ChunkSource
    load: Callable[[], Chunk] | None  # loads the text; None for the end of the file
    first: bool  # first chunk of the file, in which the start of the events is parsed instead of guessed
    buffer: TextBuffer
    chunk: Chunk | None = None
    ahead: ScanAhead | None = None  # result of the scan; None when no start was found


class ReadPipeline:
    """Reads files with a pool of threads.

    Args:
        files: the files; completed while they are read.
        make_scanner: returns a scanner for one thread.
    """

    def __init__(self, files: list[TraceFileFacts], make_scanner: Callable[[], PythonScanner], workers: int) -> None:
        self._files, self._make_scanner, self._workers = files, make_scanner, workers
        self._taking = threading.Lock()
        self._tasks = self._all_tasks()
        self._sources: set[ChunkSource] = set()  # those that are open
        self._executor = ThreadPoolExecutor(workers, "traceml-read")
        self._running: deque[Future[_ChunkTask | None]] = deque()
        # A thread takes one of each for a task. Memory that is used again is faster than fresh memory.
        self._scanners: deque[PythonScanner] = deque()
        self._buffers: deque[TextBuffer] = deque()

    def batches(self) -> Iterator[EventBatch]:
        """Yield the batches of all files in order; raise the first error of a thread."""
        scanner = self._make_scanner()
        scanned: dict[int, _ChunkTask] = {}
        number = 0
        try:
            for _ in range(self._workers + _AHEAD):
                self._submit()

            while self._running:
                task = self._running.popleft().result()
                if task is not None:
                    scanned[task.number] = task

                while number in scanned:
                    yield from self._joined(scanned.pop(number), scanner)
                    number += 1
        finally:
            self._executor.shutdown(cancel_futures=True)
            for source in self._sources:
                source.close()

    def _submit(self) -> None:
        self._running.append(self._executor.submit(self._scan_next))

    def _all_tasks(self) -> Iterator[_ChunkTask]:
        """Yield a task per chunk of each file, and one for its end; advanced under `_taking`."""
        number = 0
        for place, facts in enumerate(self._files):
            try:
                source = open_source(facts.path)
            except OSError as error:
                facts.damage.append(FileDamage(0, f"cannot be read: {error.strerror}", facts.bytes))
                continue

            self._sources.add(source)
            reader, first = FileReader(facts, place, time_decimals(facts.path)), True
            while True:
                buffer = self._buffers.pop() if self._buffers else TextBuffer()
                load = source.next_chunk(buffer)
                yield _ChunkTask(number, reader, source, load, first, buffer)
                number, first = number + 1, False
                if load is None:
                    break

    def _scan_next(self) -> _ChunkTask | None:
        """Load and scan the next chunk; return None when there is none. Runs in a thread of the pool."""
        with self._taking:
            task = next(self._tasks, None)

        if task is None or task.load is None:
            return task

        task.chunk = task.load()
        if not task.first:
            scanner = self._scanners.pop() if self._scanners else self._make_scanner()
            scanner.rows.decimals = task.reader.decimals
            task.ahead = ScanAhead.of(task.chunk.text, scanner)
            self._scanners.append(scanner)

        return task

    def _joined(self, task: _ChunkTask, scanner: PythonScanner) -> Iterator[EventBatch]:
        """Yield the events of a chunk, once all chunks before it were joined; its buffer goes to the next task."""
        reader, chunk, batch = task.reader, task.chunk, None
        scanner.rows.decimals = reader.decimals
        if chunk is None:
            batch = reader.finish(scanner)
            self._sources.discard(task.source)
            task.source.close()
        elif chunk.begin == reader.position and not chunk.too_long:
            batch = reader.accept(chunk, task.ahead, scanner)
        else:
            for part in task.source.parts(reader.position, chunk.stop, task.buffer):
                if (events := reader.accept(part, None, scanner)) is not None:
                    yield events

        self._buffers.append(task.buffer)
        self._submit()
        if batch is not None:
            yield batch
