"""Forwarding of a worker's output from a pipe to a stream of the channel."""

from __future__ import annotations

import fcntl
import logging
import os
import selectors
import time
from collections import deque

from traceml.launch.shared.channel_streams import OutgoingStream
from traceml.launch.shared.log_records import RecordDecoder, decode_record

__all__ = ["OutputTail", "PipeReader"]

_READ_BYTES = 256 * 1024
# Kept of one pipe while the launcher does not accept it; beyond that, only its writer waits.
_MAX_QUEUED_BYTES = 4 * 1024 * 1024
_PIPE_BYTES = 256 * 1024
_TAIL_BYTES = 64 * 1024
_TAIL_LINES = 50
_CRASH = b"Fatal Python error: "
_CRASH_BYTES = 32 * 1024
# After a worker's end, a process that it has left may hold its pipe open.
_QUIET_S, _LONGEST_S = 0.5, 2.0
_FORMATTER = logging.Formatter(logging.BASIC_FORMAT)


class OutputTail:
    """The last lines of a worker from all its pipes, in the order of reading."""

    def __init__(self) -> None:
        self._pieces: deque[tuple[str, bytes]] = deque()  # of the records: one encoded record
        self._size = 0
        self._records = RecordDecoder()

    def add(self, name: str, data: bytes) -> None:
        """Add output of the pipe `name`."""
        if name != "records":
            self._add(name, data[-_TAIL_BYTES:])
            return

        for record in self._records.split(data)[-_TAIL_LINES:]:
            if len(record) <= _TAIL_BYTES:
                self._add(name, record)

    def _add(self, name: str, data: bytes) -> None:
        self._pieces.append((name, data))
        self._size += len(data)
        while self._size > _TAIL_BYTES and len(self._pieces) > 1:
            self._size -= len(self._pieces.popleft()[1])

    def lines(self) -> list[str]:
        """Return the last lines; lines of two pipes are not mixed."""
        rest: dict[str, bytes] = {}
        found: list[bytes] = []
        for name, data in self._pieces:
            if name == "records":
                found += _lines_of_record(data)
                continue

            *whole, rest[name] = (rest.get(name, b"") + data).split(b"\n")
            found += whole

        found += [line for line in rest.values() if line]
        return [line.decode("utf-8", "replace").rstrip("\r")[:4096] for line in found[-_TAIL_LINES:]]

    def crash_text(self) -> str:
        """Return what faulthandler has written last, from "Fatal Python error" on; empty without that.

        It may be longer than the lines of `lines`: the innermost frame is the first of its thread.
        """
        errors = b"".join(data for name, data in self._pieces if name == "err")
        _, mark, text = errors.rpartition(_CRASH)
        return (mark + text)[:_CRASH_BYTES].decode("utf-8", "replace") if mark else ""


def _lines_of_record(encoded: bytes) -> list[bytes]:
    record = decode_record(encoded)
    return [] if record is None else _FORMATTER.format(record).encode("utf-8", "replace").split(b"\n")


class PipeReader:
    """The agent's end of one pipe of a worker.

    Args:
        tail: keeps the last lines.

    Attributes:
        write_fd: the worker's end; `started` closes it here once the worker has it.
        closed: whether all output was read.
        paused: whether reading waits for the launcher.
    """

    def __init__(self, selector: selectors.BaseSelector, stream: OutgoingStream, name: str, tail: OutputTail) -> None:
        self._selector, self._stream, self._name, self._tail = selector, stream, name, tail
        self._read_fd, self.write_fd = os.pipe()
        os.set_blocking(self._read_fd, False)
        try:
            fcntl.fcntl(self._read_fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        except OSError:  # the user's limit of pipe memory is reached: a smaller pipe works too
            pass

        self.closed = self.paused = False
        self._read_s = self._ended_s = 0.0
        selector.register(self._read_fd, selectors.EVENT_READ, self._read)

    def started(self) -> None:
        """Close this process's copy of the write end: the pipe closes when the worker exits."""
        os.close(self.write_fd)

    def tick(self) -> None:
        """Resume once the launcher has caught up; after the worker's end, close a pipe that others hold open."""
        if self.closed:
            return

        if self.paused and (self._stream.queued_bytes < _MAX_QUEUED_BYTES // 2 or self._ended_s):
            self.paused = False
            self._selector.register(self._read_fd, selectors.EVENT_READ, self._read)

        now_s = time.monotonic()
        if self._ended_s and (
            now_s - max(self._read_s, self._ended_s) > _QUIET_S or now_s - self._ended_s > _LONGEST_S
        ):
            self.close()

    def worker_ended(self) -> None:
        """Read the rest; close the pipe soon even if others hold it open."""
        self._ended_s = time.monotonic()
        self.tick()
        while not self.closed and self._read():
            pass

    def close(self) -> None:
        """Stop reading; bytes that were read are still sent."""
        if self.closed:
            return

        self.closed = True
        if not self.paused:
            self._selector.unregister(self._read_fd)

        os.close(self._read_fd)
        self._stream.end()

    def _read(self, _events: int = 0) -> bool:
        """Read once; return whether there may be more now."""
        if self.closed:  # by an earlier event of the same iteration
            return False

        try:
            data = os.read(self._read_fd, _READ_BYTES)
        except BlockingIOError:
            return False

        if not data:
            self.close()
            return False

        self._read_s = time.monotonic()
        self._stream.write(data)
        self._tail.add(self._name, data)
        if self._stream.queued_bytes >= _MAX_QUEUED_BYTES and not self._ended_s:
            self.paused = True
            self._selector.unregister(self._read_fd)
            return False

        return not self._ended_s or self._read_s - self._ended_s < _LONGEST_S
