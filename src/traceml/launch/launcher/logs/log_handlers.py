"""Log handlers for the output of one worker or one agent: to a file or the screen."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from traceml.coerce import BAD, coerce
from traceml.errors import SettingsError, UsageError
from traceml.settings import declarations, level_number, load

__all__ = [
    "LineHandler",
    "PlainHandler",
    "SourceFilter",
    "add_filter_to_handler",
    "file_handler",
    "level_of",
    "log_level",
    "new_log_folder",
    "stream_handler",
]

_TIME = "%Y-%m-%d %H:%M:%S"
_log = logging.getLogger("traceml")


def file_handler(
    hostname: str, local_rank: int | None = None, log_dir: str | os.PathLike[str] | None = None
) -> LineHandler:
    """Return a handler that writes a worker's output to `<log_dir>/<hostname>[<local_rank>].log`.

    Examples:
        >>> [traceml.file_handler("node1", local_rank, log_dir="logs") for local_rank in range(2)]
        [file_handler('logs/node1[0].log'), file_handler('logs/node1[1].log')]

    Args:
        hostname: the host, as it is named in `hostnames`.
        local_rank: the worker's; None for the host's agent, whose file is `<hostname>.log`.
        log_dir: the folder; created by the launch that uses the handler. None: the default folder of `launch`.
    """
    folder = new_log_folder(os.environ) or Path() if log_dir is None else Path(log_dir)
    own = "" if local_rank is None else f"[{local_rank}]"
    return _FileHandler(hostname, local_rank, folder / f"{hostname.replace(os.sep, '_')}{own}.log")


def stream_handler(hostname: str, local_rank: int | None = None, stream: TextIO | None = None) -> LineHandler:
    """Return a handler that prints a worker's output.

    Examples:
        >>> import sys
        >>> handlers = [traceml.stream_handler("node1", local_rank, sys.stderr) for local_rank in range(2)]

    Args:
        hostname: the host, as it is named in `hostnames`.
        local_rank: the worker's; None for the host's agent.
        stream: the target; None: the `sys.stdout` of the time of writing.

    Raises:
        UsageError: nothing can be written to it.
    """
    if stream is not None and not hasattr(stream, "write"):
        raise UsageError(f"stream={stream!r} is no stream: give one, and set a level by the handler's setLevel")

    return _StreamHandler(hostname, local_rank, stream)


def add_filter_to_handler(
    handler: logging.Handler, hostname: str, local_rank: int | None = None, log_level: int | str | None = None
) -> None:
    """Restrict `handler` to the output of one worker, or of one host's agent.

    Examples:
        >>> import logging
        >>> handler = logging.StreamHandler()
        >>> traceml.add_filter_to_handler(handler, "node1", 0, logging.WARNING)

    Args:
        handler: any handler of `logging`.
        hostname: the host, as it is named in `hostnames`.
        local_rank: the worker's; None for the host's agent.
        log_level: the lowest level that is handled; by default the handler's own.
    """
    handler.addFilter(SourceFilter(hostname, local_rank))
    if log_level is not None:
        handler.setLevel(log_level)


def new_log_folder(environ: Mapping[str, str]) -> Path | None:
    """Return a new folder name for the files of one launch; None if files are turned off."""
    base = environ.get("TRACEML_LOG_DIR", environ.get("TORCHRUNX_LOG_DIR"))
    if base is None:
        base = str(load().log_dir)

    if not base:
        return None

    now = datetime.now()  # local time, for people who look for a recent run
    folder = Path(base).absolute() / now.isoformat(timespec="seconds")
    number = 1
    while folder.exists() or folder in _reserved:
        number += 1
        folder = folder.with_name(f"{now.isoformat(timespec='seconds')}-{number}")

    _reserved.add(folder)
    return folder


# Folders named in this process, created or not.
_reserved: set[Path] = set()


def log_level(environ: Mapping[str, str]) -> int:
    """Return the level of workers' root loggers: by default INFO, or this process's if it is lower.

    Raises:
        SettingsError: `TRACEML_LOG_LEVEL` or `TORCHRUNX_LOG_LEVEL` names no level.
    """
    level = level_of(environ)
    return min(logging.INFO, logging.getLogger().getEffectiveLevel()) if level is None else level


# Words of `logging` that the setting does not have, and torchrunx's users do.
_SAME_LEVELS = {"WARN": "warning", "FATAL": "critical", "NOTSET": "0"}


def level_of(environ: Mapping[str, str]) -> int | None:
    """Return the level that `TRACEML_LOG_LEVEL` or `TORCHRUNX_LOG_LEVEL` asks for, None without them.

    Raises:
        SettingsError: one of them names no level.
    """
    setting = declarations()["log_level"]
    for variable in (setting.env, "TORCHRUNX_LOG_LEVEL"):
        if value := environ.get(variable, "").strip():
            level = coerce(setting.kind, _SAME_LEVELS.get(value.upper(), value), setting.limits)
            if level is BAD:
                raise SettingsError("log_level", f"{value!r} is not a level", source=variable, allowed=setting.allowed)

            return level_number(level)

    return None


class SourceFilter(logging.Filter):
    """Filter that passes the records of one worker, or of one agent."""

    def __init__(self, hostname: str, local_rank: int | None) -> None:
        super().__init__()
        self._source = (hostname, local_rank)

    def matches(self, hostname: str | None, local_rank: int | None) -> bool:
        """Return whether these name the filter's source."""
        return (hostname, local_rank) == self._source

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record comes from the source."""
        return self.matches(getattr(record, "hostname", None), getattr(record, "local_rank", None))


class LineHandler(logging.Handler):
    """A handler that also accepts many lines at once, and formats them like one record per line."""

    def __init__(self, hostname: str, local_rank: int | None, layout: str) -> None:
        super().__init__()
        self._own_formatter = logging.Formatter(layout, datefmt=_TIME)
        self._head, self._head_of = "", (0, 0)
        self._failed = False
        self.setFormatter(self._own_formatter)
        self.addFilter(SourceFilter(hostname, local_rank))

    @property
    def is_plain(self) -> bool:
        """Whether format and filters are unchanged, so that many lines can be written at once."""
        return self.formatter is self._own_formatter and len(self.filters) == 1

    def prepare(self) -> None:
        """Create the target even if nothing is written; called when a launch begins."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        self._write_safely(self.format(record) + "\n")

    def write_lines(self, text: str, level: int, kind: str) -> None:  # noqa: ARG002 - one needs the level, one the kind
        """Write whole lines.

        Args:
            text: the lines, each ended by a newline.
            level: the level of all of them.
            kind: the stream that they come from, `out` or `err`.
        """
        now = (int(time.time()), level)
        if now != self._head_of:
            record = logging.LogRecord("", level, "", 0, "", None, None)
            self._head, self._head_of = self.format(record), now

        head = self._head
        body = text[:-1].replace("\n", f"\n{head}")
        self.acquire()
        try:
            self._write_safely(f"{head}{body}\n")
        finally:
            self.release()

    def flush_lines(self) -> None:
        """Flush the written lines."""
        try:
            self.flush()
        except Exception as error:  # noqa: BLE001 - a stream of the user may raise anything, and workers wait for us
            self._give_up(error)

    def _write(self, text: str) -> None:
        raise NotImplementedError

    def _write_safely(self, text: str) -> None:
        if self._failed:
            return

        try:
            self._write(text)
        except Exception as error:  # noqa: BLE001 - as above
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        if not self._failed:
            self._failed = True
            self._complain(error)

    def _complain(self, error: Exception) -> None:
        _log.warning("%r cannot write: %s. The rest of the output is missing there; the launch continues", self, error)


# Open files of all launches, oldest first: a thousand workers have more files than a process may open.
_open_files: dict[_FileHandler, None] = {}
_MAX_OPEN_FILES = 256
_unwritable: set[Path] = set()


class _FileHandler(LineHandler):
    def __init__(self, hostname: str, local_rank: int | None, path: Path) -> None:
        super().__init__(hostname, local_rank, "%(asctime)s:%(levelname)s: %(message)s")
        self.path = path
        self._file: Any = None

    def __repr__(self) -> str:
        return f"file_handler({str(self.path)!r})"

    def prepare(self) -> None:
        """Create the file: an empty one shows that nothing was written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
        except OSError as error:
            self._give_up(error)

    def _complain(self, error: Exception) -> None:
        folder = self.path.parent
        if folder not in _unwritable:  # warn once for all its files
            _unwritable.add(folder)
            _log.warning("%s: logs cannot be written there: %s. The launch continues without them", folder, error)

    def _write(self, text: str) -> None:
        if self._file is None:
            self._open()

        self._file.write(text)

    def _open(self) -> None:
        while len(_open_files) >= _MAX_OPEN_FILES:
            next(iter(_open_files)).close()

        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", encoding="utf-8", errors="backslashreplace")
        _open_files[self] = None

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            _open_files.pop(self, None)
            try:
                file.close()
            except OSError as error:
                self._give_up(error)

        super().close()


class _StreamHandler(LineHandler):
    def __init__(self, hostname: str, local_rank: int | None, stream: TextIO | None, layout: str = "") -> None:
        own = "" if local_rank is None else f"[{local_rank}]"
        source = f"{hostname}{own}".replace("%", "%%")
        super().__init__(hostname, local_rank, layout or f"%(asctime)s:%(levelname)s:{source}: %(message)s")
        self._stream = stream
        self._dirty: TextIO | None = None

    def __repr__(self) -> str:
        return f"stream_handler({self._stream!r})"

    @property
    def _target(self) -> TextIO | None:
        """Stream to write to; None where this process has none, as without a console."""
        return self._stream or sys.stdout

    def _write(self, text: str) -> None:
        stream = self._target
        if stream is None:
            return

        try:
            stream.write(text)
        except UnicodeEncodeError:
            stream.write(text.encode("ascii", "backslashreplace").decode("ascii"))

        self._dirty = stream

    def flush(self) -> None:
        if self._dirty is not None:
            stream, self._dirty = self._dirty, None
            stream.flush()


class PlainHandler(_StreamHandler):
    """Writes worker 0's output unchanged: its stderr and records of `logging` to `err`, else its stdout to `out`.

    Args:
        out: None for `sys.stdout`.
        err: None for `sys.stderr`.
    """

    def __init__(self, hostname: str, out: TextIO | None, err: TextIO | None) -> None:
        super().__init__(hostname, 0, None, layout="%(message)s")
        self._out, self._err = out, err

    @property
    def _target(self) -> TextIO | None:
        return self._stream  # that of the last line's kind

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record to `err`."""
        self._stream = self._err or sys.stderr
        super().emit(record)

    def write_lines(self, text: str, level: int, kind: str) -> None:  # noqa: ARG002 - one needs the level, one the kind
        """Write whole lines to the stream of their kind."""
        stream = (self._err or sys.stderr) if kind == "err" else (self._out or sys.stdout)
        if stream is not self._stream:
            self.flush_lines()  # keep the order of arrival
            self._stream = stream

        self._write_safely(text)
