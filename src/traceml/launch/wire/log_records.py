"""`logging` records on their way out of a worker: through a pipe of their own, in pieces that cannot interleave.

A piece is `<HI?` (length, the writer's pid, whether it is the last of its record) and bytes; it is no longer than what
a pipe takes in one go, so forked children of a worker may share its pipe. A record is a msgpack map of `FIELDS`.
"""

from __future__ import annotations

import logging
import os
import select
import struct
from collections.abc import Iterator
from typing import Any

import msgpack

__all__ = ["FIELDS", "RecordDecoder", "RecordHandler", "install"]

FIELDS = (
    "name",
    "levelno",
    "levelname",
    "created",
    "msecs",
    "pathname",
    "filename",
    "module",
    "lineno",
    "funcName",
    "process",
    "processName",
    "thread",
    "threadName",
)
_PIECE = struct.Struct("<HI?")
_PIECE_BYTES = select.PIPE_BUF - _PIECE.size
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
    """Writes each record to a pipe, complete when `emit` returns: what a process logged before it died arrives."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record; it waits while the pipe is full."""
        try:
            for piece in _pieces(msgpack.packb(_as_map(record), unicode_errors="surrogatepass")):
                os.write(self._fd, piece)
        except (OSError, ValueError, TypeError):
            self.handleError(record)


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


def _pieces(body: bytes) -> Iterator[bytes]:
    pid = os.getpid()
    for start in range(0, len(body), _PIECE_BYTES):
        part = body[start : start + _PIECE_BYTES]
        yield _PIECE.pack(len(part), pid, start + len(part) == len(body)) + part


class RecordDecoder:
    """Turns the bytes of the pipe back into records."""

    def __init__(self) -> None:
        self._buffer = b""
        self._begun: dict[int, bytes] = {}
        self._broken = False

    def feed(self, data: bytes) -> list[logging.LogRecord]:
        """Return the records that are complete now; after bytes that are no records, none."""
        if self._broken:
            return []

        self._buffer += data
        found: list[logging.LogRecord] = []
        at = 0
        while len(self._buffer) - at >= _PIECE.size:
            length, pid, last = _PIECE.unpack_from(self._buffer, at)
            end = at + _PIECE.size + length
            if end > len(self._buffer):
                break

            body = self._begun.pop(pid, b"") + self._buffer[at + _PIECE.size : end]
            at = end
            if not last and len(body) <= _MAX_RECORD_BYTES:
                self._begun[pid] = body
                continue

            record = _record(body)
            if record is None:
                self._broken, self._buffer = True, b""
                return [*found, _complaint()]

            found.append(record)

        self._buffer = self._buffer[at:]
        return found


def _record(body: bytes) -> logging.LogRecord | None:
    try:
        known = msgpack.unpackb(body, unicode_errors="surrogatepass")
        message, fields = str(known.pop("message")), {name: known[name] for name in (*FIELDS, "exc_text", "stack_info")}
        fields["levelno"] = int(fields["levelno"])
    except (ValueError, TypeError, KeyError, AttributeError, msgpack.UnpackException):
        return None

    return logging.makeLogRecord({**fields, "msg": message, "args": None, "exc_info": None})


def _complaint() -> logging.LogRecord:
    text = "the worker's logging records are unreadable from here on: something else writes to their pipe"
    return logging.makeLogRecord({"name": __name__, "levelno": logging.ERROR, "levelname": "ERROR", "msg": text})
