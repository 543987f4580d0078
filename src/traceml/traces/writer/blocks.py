"""Queue of events that a thread writes to a file in blocks; bounded and fork-safe."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from traceml.inspection.loaded_modules import multiprocessing_parent
from traceml.process_ends import start_without_signals
from traceml.traces.writer.encoding import lines
from traceml.traces.writer.sinks import LineSink, sink_of

__all__ = ["BlockWriter", "TraceWriterStatistics"]

_BLOCK = 8192  # events: a megabyte of text
_MOST = 65_536  # pending events; a thread that adds one more writes a block itself
_PAUSE_S = 0.5
_ONE_PROCESS = ".json.gz"  # closed by the process that began it: a child gets its own file
_log = logging.getLogger("traceml")
_all: weakref.WeakSet[BlockWriter] = weakref.WeakSet()


@dataclass(frozen=True, slots=True)
class TraceWriterStatistics:
    """Counts of a writer in this process."""

    written: int  # events in the file
    pending: int  # events that are not written yet
    lost: int  # events that could not be written, or came after `close`
    blocks: int  # number of written blocks
    written_bytes: int  # size of the written blocks in the file


class BlockWriter:
    """Writes events in blocks. A forked child begins with none, and continues on its own.

    `push(event)` adds an event; when more than `limit` are `pending` after it, call `schedule()`.

    Args:
        path: the file; its suffix selects the format.
        on_fork: called in a child, before anything is written there.
    """

    def __init__(self, path: Path, on_fork: Callable[[], None]) -> None:
        self.path = path
        self._on_fork = on_fork
        self._sink: LineSink | None = sink_of(path)(path)
        self._closed = False
        self._begin()
        _all.add(self)
        atexit.register(self.close)

    def _begin(self) -> None:
        self.pending: deque[Any] = deque()
        self.push = self.pending.append
        self.limit = 0  # the first event starts the thread
        self._lock = threading.RLock()
        self._wakeup = threading.Event()
        self._thread: threading.Thread | None = None
        self._writing = False
        self._written = self._lost = self._blocks = self._bytes = 0

    @property
    def statistics(self) -> TraceWriterStatistics:
        """Counts of written, pending and lost events in this process."""
        return TraceWriterStatistics(self._written, len(self.pending), self._lost, self._blocks, self._bytes)

    def schedule(self) -> None:
        """Have the pending events written: by this thread now, or soon by the writer's thread."""
        if self._closed:
            self._lost += len(self.pending)
            self.pending.clear()
            return

        if self._thread is None:
            self._start()

        if len(self.pending) >= (_BLOCK if self._thread is None else _MOST):
            self._write_block()
        elif len(self.pending) > _BLOCK:
            self.limit = _MOST - 1  # waking the thread once is enough
            self._wakeup.set()

    def flush(self) -> None:
        """Write all pending events now."""
        while self.pending and self._write_block():
            pass

    def write_lines(self, text: bytes, events: int) -> None:
        """Write events that are encoded already, after the pending ones."""
        with self._lock:
            self.flush()
            if self._closed or self._writing:
                self._lost += events
                return

            with self._alone():
                self._guarded(lambda: self._write_text(text, events), events)

    def close(self) -> None:
        """Write all pending events and finish the file; may be called again."""
        atexit.unregister(self.close)
        with self._lock:
            if self._closed:
                return

            self._closed, self.limit = True, 0
            self.flush()
            sink, self._sink = self._sink, None

        self._wakeup.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

        if sink is not None:
            self._guarded(sink.close, 0)

        if self._lost:
            _log.warning("%s lacks %d events that could not be written", self.path, self._lost)

    def _start(self) -> None:
        with self._lock:
            if self._thread is not None or self._closed:
                return

            self.limit = _BLOCK
            self._thread = threading.Thread(target=self._run, name="traceml-trace-writer", daemon=True)
            try:
                start_without_signals(self._thread)
            except OSError as error:  # the system gives none: the next block is written without it
                self._thread = None
                _log.debug("no thread writes the trace %s: %s", self.path, error)

            if multiprocessing_parent() is not None:
                # Such a child ends with os._exit, without atexit handlers.
                from multiprocessing.util import Finalize

                Finalize(None, self.close, exitpriority=10)

    def _run(self) -> None:
        while not self._closed:
            self._wakeup.wait(_PAUSE_S)
            self._wakeup.clear()
            self.flush()

    def _write_block(self) -> bool:
        with self._lock:
            if self._writing:
                return False  # called by a signal handler during a write

            with self._alone():
                block = [self.pending.popleft() for _ in range(min(len(self.pending), _BLOCK))]
                if len(self.pending) <= _BLOCK and not self._closed:
                    self.limit = _BLOCK

                if block:
                    self._guarded(lambda: self._write_text(lines(block), len(block)), len(block))

        return True

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep signal handlers of this thread from writing."""
        self._writing = True
        try:
            yield
        finally:
            self._writing = False

    def _write_text(self, text: bytes, events: int) -> None:
        if self._sink is None:
            self._sink = sink_of(self.path)(self.path)

        self._bytes += self._sink.write(text)
        self._written += events
        self._blocks += 1

    def _guarded(self, write: Callable[[], None], events: int) -> None:
        """Write without raising: events that the disk does not accept are lost and counted, with one warning."""
        try:
            write()
        except OSError as error:
            if not self._lost:
                _log.warning("cannot write the trace %s: %s; the program continues, events are lost", self.path, error)

            self._lost += events

    def _after_fork(self) -> None:
        """Start over in a child: the pending events and the open file belong to the parent."""
        self._begin()
        self._sink = None
        if self.path.name.endswith(_ONE_PROCESS):
            self.path = self.path.with_name(f"{self.path.name.removesuffix(_ONE_PROCESS)}-{os.getpid()}{_ONE_PROCESS}")

        self._on_fork()


def _hold_all() -> None:
    _forking.acquire()
    _held.extend(_all)
    for blocks in _held:
        blocks._lock.acquire()


def _release_all() -> None:
    while _held:
        _held.pop()._lock.release()

    _forking.release()


def _start_again() -> None:
    while _held:
        _held.pop()._after_fork()

    _forking.release()


_forking = threading.Lock()
_held: list[BlockWriter] = []
os.register_at_fork(before=_hold_all, after_in_parent=_release_all, after_in_child=_start_again)
