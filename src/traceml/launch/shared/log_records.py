"""Transport of `logging` records from a worker to the launcher, through a pipe of their own.

A record is a msgpack map of `FIELDS`, split into chunks: `<HI?` (length, the writer's pid, whether it is the last of
its record) and bytes. A chunk is no longer than an atomic write to a pipe, so forked children may share the pipe.

Process: the worker writes, the launcher reads, the agent keeps the last ones.
"""

from __future__ import annotations

import logging
import os
import select
import struct
import sys
from collections.abc import Iterator
from typing import Any

import msgpack

from traceml.trusted_files import GuardedDescriptor

__all__ = ["FIELDS", "RecordDecoder", "RecordHandler", "decode_record", "install"]

FIELDS = (
    "name", "levelno", "levelname", "created", "msecs", "pathname", "filename", "module", "lineno", "funcName",
    "process", "processName", "thread", "threadName",
)  # fmt: skip
_CHUNK = struct.Struct("<HI?")
_CHUNK_BYTES = select.PIPE_BUF - _CHUNK.size
_MAX_MESSAGE_CHARACTERS = 1024 * 1024
_MAX_RECORD_BYTES = 16 * 1024 * 1024
_plain = logging.Formatter()


def install(fd: int, level: int | str = "INFO") -> RecordHandler:
    """Send the records of this process's loggers through `fd`; `level` is that of the root logger."""
    handler = RecordHandler(fd)
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(level)
    return handler


class RecordHandler(logging.Handler):
    """Writes records to a pipe before `emit` returns, so that the last records of a dying process arrive.

    Once the function has closed the pipe, records go to standard error.
    """

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._pipe = GuardedDescriptor(fd)
        self._is_told = False

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record; wait while the pipe is full."""
        try:
            body = msgpack.packb(_as_map(record), unicode_errors="surrogatepass")
            if not self._write(body):
                self._write_as_text(record)
        except Exception:  # noqa: BLE001 - formatting runs the user's code; as in plain `logging`, the call goes on
            self.handleError(record)

    def _write(self, body: bytes) -> bool:
        """Write a record to the pipe; return False if the function has closed it."""
        try:
            self._pipe.check()
        except OSError:
            return False

        for chunk in _chunks(body):
            os.write(self._pipe.number, chunk)

        return True

    def _write_as_text(self, record: logging.LogRecord) -> None:
        if not self._is_told:
            self._is_told = True
            sys.stderr.write("traceml: the function has closed the pipe for its logging records: they follow here\n")

        sys.stderr.write(_plain.format(record) + "\n")


def _as_map(record: logging.LogRecord) -> dict[str, Any]:
    known = {name: getattr(record, name, None) for name in FIELDS}
    text = record.getMessage()
    if len(text) > _MAX_MESSAGE_CHARACTERS:
        text = f"{text[:_MAX_MESSAGE_CHARACTERS]}… ({len(text)} characters)"

    known["message"] = text
    if record.exc_info and not record.exc_text:
        record.exc_text = _plain.formatException(record.exc_info)

    known["exc_text"], known["stack_info"] = record.exc_text, record.stack_info
    return known


def _chunks(body: bytes) -> Iterator[bytes]:
    pid = os.getpid()
    for start in range(0, len(body), _CHUNK_BYTES):
        part = body[start : start + _CHUNK_BYTES]
        yield _CHUNK.pack(len(part), pid, start + len(part) == len(body)) + part


class RecordDecoder:
    """Decoder of the pipe's bytes."""

    def __init__(self) -> None:
        self._buffer = b""
        self._partial: dict[int, bytes] = {}
        self._broken = False

    def feed(self, data: bytes) -> list[logging.LogRecord]:
        """Return the records that are complete now; none after invalid bytes."""
        found: list[logging.LogRecord] = []
        for body in [] if self._broken else self.split(data):
            record = decode_record(body)
            if record is None:
                self._broken, self._buffer = True, b""
                return [*found, _unreadable()]

            found.append(record)

        return found

    def split(self, data: bytes) -> list[bytes]:
        """Return the encoded records that are complete now, for `decode_record`."""
        self._buffer += data
        found: list[bytes] = []
        at = 0
        while len(self._buffer) - at >= _CHUNK.size:
            length, pid, last = _CHUNK.unpack_from(self._buffer, at)
            end = at + _CHUNK.size + length
            if end > len(self._buffer):
                break

            body = self._partial.pop(pid, b"") + self._buffer[at + _CHUNK.size : end]
            at = end
            if not last and len(body) <= _MAX_RECORD_BYTES:
                self._partial[pid] = body
            else:
                found.append(body)

        self._buffer = self._buffer[at:]
        return found


def decode_record(body: bytes) -> logging.LogRecord | None:
    """Return an encoded record; None if it is invalid."""
    try:
        known = msgpack.unpackb(body, unicode_errors="surrogatepass")
        message, fields = str(known.pop("message")), {name: known[name] for name in (*FIELDS, "exc_text", "stack_info")}
        fields["levelno"] = int(fields["levelno"])
    except (ValueError, TypeError, KeyError, AttributeError, msgpack.UnpackException):
        return None

    return logging.makeLogRecord({**fields, "msg": message, "args": None, "exc_info": None})


def _unreadable() -> logging.LogRecord:
    text = "the worker's logging records are unreadable from here on: something else writes to their pipe"
    return logging.makeLogRecord({"name": __name__, "levelno": logging.ERROR, "levelname": "ERROR", "msg": text})
