"""Routing of workers' and agents' output to files, the screen and the user's handlers.

Each worker and each host's agent is a source with a logger name: `traceml.launch.<host>.<local rank>`, or
`traceml.launch.<host>`. Lines of stdout are records of level INFO, lines of stderr of level ERROR, but torch's C++
libraries name the level in theirs; records of `logging` keep their level. All have the attributes `hostname`,
`local_rank` (None for an agent) and `rank`.

One thread writes everything, so a slow disk or a stopped terminal never blocks the launcher's loop. It reports the
written bytes, and only then may a worker send more: a chatty worker waits for its own lines.
"""

from __future__ import annotations

import logging
import os
import queue
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from traceml.errors import UsageError
from traceml.launch.launcher.logs.log_handlers import (
    LineHandler,
    PlainHandler,
    SourceFilter,
    file_handler,
    stream_handler,
)
from traceml.launch.shared.log_records import RecordDecoder
from traceml.process_ends import start_without_signals

__all__ = ["LogRouter", "LogStream", "check_handlers", "make_handlers"]

Handlers = (
    Literal["auto"] | logging.Handler | Sequence[logging.Handler] | Callable[[], Sequence[logging.Handler]] | None
)

# Longer lines are split.
_MAX_LINE_BYTES = 1024 * 1024
_BAR_S = 10.0  # a progress bar, which carriage returns overwrite, is a line of a file this often, and at its end
_log = logging.getLogger("traceml")
_LEVELS = {"out": logging.INFO, "err": logging.ERROR}
# A line of torch's C++ libraries: `[W1120 23:59:04.123 socket.cpp:207] …`, under torchrun after `[rank0]:`; or of srun,
# which names errors only.
_NATIVE_LINE = re.compile(rb"^(?:(?:\[rank\d+\]:)?\[([IWEF])\d{4} \d\d:\d\d:\d\d|srun: (?!error: ))", re.MULTILINE)
_NATIVE_LEVELS = {
    b"I": logging.INFO, b"W": logging.WARNING, b"E": logging.ERROR, b"F": logging.CRITICAL, None: logging.WARNING,
}  # fmt: skip


def make_handlers(
    log_handlers: Handlers,
    hosts: Mapping[str, int],
    log_folder: Callable[[], Path | None],
    *,
    plain: bool = False,
    out: Any = None,
    err: Any = None,
) -> list[logging.Handler]:
    """Return the handlers of a launch.

    Args:
        log_handlers: "auto": the first host's agent and first worker to stdout, and everything to files; handlers, or
            a function that returns them: these alone; None: nothing.
        hosts: the number of workers of each host, in order.
        log_folder: returns the folder for files, None if they are turned off; called for "auto" only.
        plain: print the first worker's output unchanged: stdout to stdout, stderr to stderr, without time and name.
        out: target of printed output; None for stdout.
        err: target of printed errors if `plain`; None for stderr.
    """
    if log_handlers is None:
        return []

    if log_handlers != "auto":
        return _checked(log_handlers() if callable(log_handlers) else log_handlers)

    first = next(iter(hosts))
    made: list[logging.Handler] = [
        stream_handler(first, stream=err if plain else out),
        PlainHandler(first, out, err) if plain else stream_handler(first, 0, out),
    ]
    folder = log_folder()
    if folder is None:
        return made

    for host, workers in hosts.items():
        made.append(file_handler(host, log_dir=folder))
        made += [file_handler(host, local_rank, log_dir=folder) for local_rank in range(workers)]

    return made


def check_handlers(log_handlers: Any) -> Handlers:
    """Return `log_handlers`, which may be an iterator, as `make_handlers` accepts it.

    Raises:
        UsageError: the value is invalid; the result of a function is not checked yet.
    """
    if log_handlers is None or log_handlers == "auto" or callable(log_handlers):
        return log_handlers  # type: ignore[no-any-return]

    return _checked(log_handlers)


def _checked(handlers: Any) -> list[logging.Handler]:
    if isinstance(handlers, logging.Handler):
        return [handlers]

    if isinstance(handlers, str) or not isinstance(handlers, Iterable):
        raise UsageError(f"log_handlers must be 'auto', a list of logging.Handler, or None, got {handlers!r}")

    found = list(handlers)
    for handler in found:
        if not isinstance(handler, logging.Handler):
            raise UsageError(f"log_handlers has {handler!r}, which is not a logging.Handler")

    return found


_Queue = queue.SimpleQueue["tuple[LogStream, bytes | None] | None"]


class LogStream:
    """One stream of one source: `out`, `err`, or `records`."""

    def __init__(self, log_queue: _Queue, source: LogSource, kind: str) -> None:
        self._queue, self.source, self.kind = log_queue, source, kind
        self.grant: Callable[[int], object] | None = None  # called in the loop's thread
        self._partial = b""
        self._next_bar_s = 0.0
        self._decoder = RecordDecoder() if kind == "records" else None

    def feed(self, data: memoryview | bytes) -> None:
        """Queue bytes; return at once."""
        self._queue.put((self, bytes(data)))

    def end(self, _error: object = None) -> None:
        """End the stream: the last line needs no newline."""
        self._queue.put((self, None))

    def write(self, data: bytes, *, last: bool) -> None:
        """Pass bytes to the source; called in the router's thread."""
        if self._decoder is not None:
            for record in self._decoder.feed(data):
                self.source.record(record)

            return

        lines, self._partial = _whole_lines(self._partial + data, last=last)
        for is_plain, each in ((True, lines), (False, self._without_bars(lines))):
            for level, part in _by_level(each, _LEVELS[self.kind]):
                self.source.lines(part, level, self.kind, is_plain=is_plain)

    def _without_bars(self, lines: bytes) -> bytes:
        """Return lines without what a carriage return has overwritten, and with few states of a progress bar."""
        if b"\r" not in lines:
            return lines

        *whole, bar = lines.split(b"\n")
        found = [_last_state(line) for line in whole]
        now_s = time.monotonic()
        if now_s >= self._next_bar_s and (state := _last_state(bar)):
            self._next_bar_s = now_s + _BAR_S
            found.append(state)

        return b"".join(line + b"\n" for line in found)


class LogRouter:
    """Writes the output of sources to handlers, in a thread of its own.

    The owner's loop waits on `fd` and calls `grant_written` when it can be read, which calls `LogStream.grant`.

    Args:
        handlers: the targets; their levels and filters apply as in `logging`.
    """

    def __init__(self, handlers: Iterable[logging.Handler]) -> None:
        self.handlers = list(handlers)
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._sources: dict[tuple[str, int | None], LogSource] = {}
        self._queue: _Queue = queue.SimpleQueue()
        self._written: dict[LogStream, int] = defaultdict(int)
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="traceml-logs", daemon=True)
        start_without_signals(self._thread)

    def open(self, hostname: str, local_rank: int | None, kind: str, *, rank: int | None = None) -> LogStream:
        """Open a stream of one source.

        Args:
            hostname: the host, as the user named it.
            local_rank: the worker's; None for the agent.
            kind: `out`, `err` or `records`.
            rank: the worker's global rank.
        """
        key = (hostname, local_rank)
        if key not in self._sources:
            self._sources[key] = LogSource(hostname, local_rank, rank, self.handlers)

        return LogStream(self._queue, self._sources[key], kind)

    def grant_written(self) -> None:
        """Call each stream's `grant` with the number of its written bytes."""
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            pass

        with self._lock:
            written, self._written = self._written, defaultdict(int)

        for stream, n in written.items():
            if stream.grant is not None:
                stream.grant(n)

    def close(self) -> None:
        """Write the rest, and close the handlers that `make_handlers` made."""
        if self.fd < 0:
            return

        self._queue.put(None)
        self._thread.join()
        for handler in self.handlers:
            if isinstance(handler, LineHandler):
                handler.close()
                continue

            try:
                handler.flush()
            except Exception:  # noqa: BLE001 - as above, and the results are not to be lost
                _log.exception("the log handler %r failed at the end of the launch", handler)

        os.close(self.fd)
        self.fd = -1

    def _work(self) -> None:
        for handler in self.handlers:
            if isinstance(handler, LineHandler):
                handler.prepare()

        ended = False
        while not ended:
            batch = [self._queue.get()]
            while len(batch) < 256 and not self._queue.empty():
                batch.append(self._queue.get())

            ended = None in batch
            self._write_all([item for item in batch if item is not None])

    def _write_all(self, batch: list[tuple[LogStream, bytes | None]]) -> None:
        gathered: dict[LogStream, list[bytes | None]] = {}
        for stream, data in batch:
            gathered.setdefault(stream, []).append(data)

        for stream, pieces in gathered.items():
            data = b"".join(piece for piece in pieces if piece is not None)
            stream.write(data, last=None in pieces)
            with self._lock:
                self._written[stream] += len(data)

        for source in {stream.source for stream in gathered}:
            source.flush()

        os.eventfd_write(self.fd, 1)


class LogSource:
    """A worker or an agent, and the handlers of its output."""

    def __init__(
        self, hostname: str, local_rank: int | None, rank: int | None, handlers: Sequence[logging.Handler]
    ) -> None:
        own = "" if local_rank is None else f".{local_rank}"
        self.name = f"traceml.launch.{hostname}{own}"
        self._known: dict[str, Any] = {"hostname": hostname, "local_rank": local_rank, "rank": rank}
        wanting = [handler for handler in handlers if _may_want(handler, hostname, local_rank)]
        self._lined = [h for h in wanting if isinstance(h, LineHandler)]
        self._plain = [h for h in self._lined if isinstance(h, PlainHandler)]
        self._fast = [h for h in self._lined if h.is_plain and h not in self._plain]
        self._slow = [h for h in wanting if h not in (*self._plain, *self._fast)]

    def lines(self, lines: bytes, level: int, kind: str, *, is_plain: bool) -> None:
        """Handle whole lines, each ended by a newline.

        Args:
            is_plain: whether they are for a `PlainHandler`, and may have carriage returns.
        """
        bulk, slow = (self._plain, []) if is_plain else (self._fast, self._slow)
        if not bulk and not slow:
            return

        text = lines.decode("utf-8", "replace")
        for handler in bulk:
            if level >= handler.level:
                handler.write_lines(text, level, kind)

        if not slow:
            return

        for line in text.split("\n")[:-1]:
            record = logging.LogRecord(self.name, level, "", 0, line, None, None)
            self._hand_over(record, self._slow)

    def flush(self) -> None:
        """Flush the handlers."""
        for handler in self._lined:
            handler.flush_lines()

    def record(self, record: logging.LogRecord) -> None:
        """Handle a record."""
        self._hand_over(record, [*self._plain, *self._fast, *self._slow])

    def _hand_over(self, record: logging.LogRecord, handlers: Sequence[logging.Handler]) -> None:
        record.__dict__.update(self._known)
        for handler in handlers:
            if record.levelno < handler.level:
                continue

            try:
                handler.handle(record)
            except BaseException:  # noqa: BLE001 - a user's handler may raise anything, as SystemExit at an error
                self._drop(handler)

    def _drop(self, handler: logging.Handler) -> None:
        """Remove a user's handler that raised; the others stay."""
        _log.exception("the log handler %r failed on the output of %s and receives no more of it", handler, self.name)
        self._fast = [h for h in self._fast if h is not handler]
        self._slow = [h for h in self._slow if h is not handler]


def _may_want(handler: logging.Handler, hostname: str, local_rank: int | None) -> bool:
    ours = [found for found in handler.filters if isinstance(found, SourceFilter)]
    return all(found.matches(hostname, local_rank) for found in ours)


def _by_level(lines: bytes, default: int) -> list[tuple[int, bytes]]:
    """Split lines where their level changes."""
    if default == logging.INFO or not _NATIVE_LINE.search(lines):
        return [(default, lines)] if lines else []

    found: list[tuple[int, bytes]] = []
    for line in lines.splitlines(keepends=True):
        match = _NATIVE_LINE.match(line)
        level = default if match is None else _NATIVE_LEVELS[match[1]]
        if found and found[-1][0] == level:
            found[-1] = level, found[-1][1] + line
        else:
            found.append((level, line))

    return found


def _whole_lines(data: bytes, *, last: bool) -> tuple[bytes, bytes]:
    """Return the whole lines of `data`, and what follows them; a progress bar's carriage return ends one, too."""
    if last or len(data) > _MAX_LINE_BYTES:
        lines, rest = data if not data or data.endswith(b"\n") else data + b"\n", b""
    else:
        end = max(data.rfind(b"\n"), data.rfind(b"\r", 0, -1)) + 1
        lines, rest = data[:end], data[end:]

    return lines.replace(b"\r\n", b"\n"), rest


def _last_state(line: bytes) -> bytes:
    """Return what a terminal shows of a line with carriage returns."""
    return line.rstrip(b"\r").rpartition(b"\r")[2]
