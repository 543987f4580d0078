"""Output of a script: passed to the screen, copied to the run's folder, and read at the end if nobody else does.

A process that writes to a full pipe waits for the reader, also if it was asked to end: Python with its traceback,
torchrun with its log, and this program with the verdict.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

__all__ = ["OutputCopy", "PassThroughScreen", "UnreadOutput"]

_MAX_BYTES = 64 << 20

_log = logging.getLogger("traceml")


class PassThroughScreen:
    """A screen without a view: the script's output goes to standard output unchanged."""

    def tick(self) -> None:
        """Do nothing."""

    def write(self, data: bytes) -> None:
        """Write output of the script."""
        sys.stdout.flush()
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(sys.stdout.fileno(), rest) :]

    def close(self) -> None:
        """Do nothing: standard output is not ours."""


class OutputCopy:
    """Copies the script's output to a file. A full disk ends the copy, not the job.

    Args:
        most_bytes: limit of the file's growth, so that endless output does not fill the disk.
    """

    def __init__(self, path: Path, most_bytes: int = _MAX_BYTES) -> None:
        self._left_bytes = most_bytes
        self._file: BinaryIO | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            self._give_up(error)

    def write(self, data: bytes) -> None:
        """Append output up to the limit."""
        if self._file is None:
            return

        if len(data) > self._left_bytes:
            data = data[: self._left_bytes] + b"\n[traceml keeps no more of this output]\n"

        self._left_bytes -= len(data)
        try:
            self._file.write(data)
        except OSError as error:
            self._give_up(error)

        if self._left_bytes < 0:
            self.close()

    def close(self) -> None:
        """Close the file; may be called again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _give_up(self, error: OSError) -> None:
        _log.warning("the script's output is not kept in the run's folder: %s", error)
        self.close()


_EVERY_S, _CHUNK_BYTES = 0.5, 65536


class UnreadOutput:
    """Reads pipes that stay full while a job is ending, in a thread. A context manager.

    Args:
        files: descriptors that the job writes to; those that are not pipes are left alone.
        is_ending: returns whether the job has to end, or has ended. Before, the reader may be slow.
        full_for_s: time for which a pipe must have been full meanwhile.
    """

    def __init__(
        self,
        files: Iterable[int],
        is_ending: Callable[[], bool],
        keep: Callable[[bytes], object],
        full_for_s: float = 10.0,
    ) -> None:
        self._is_ending, self._keep, self._full_for_s = is_ending, keep, full_for_s
        self._full_since: dict[int, float | None] = dict.fromkeys(file for file in files if _is_pipe(file))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="traceml-unread", daemon=True)

    def __enter__(self) -> UnreadOutput:
        if self._full_since:
            self._thread.start()

        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._full_since:
            self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(min(_EVERY_S, self._full_for_s)):
            for file in self._full_since:
                with contextlib.suppress(OSError):  # without the right to read it, it stays full
                    self._check(file)

    def _check(self, file: int) -> None:
        if not (_is_full(file) and self._is_ending()):
            self._full_since[file] = None
            return

        since_s = self._full_since[file]
        if since_s is None:
            self._full_since[file] = time.monotonic()
        elif time.monotonic() - since_s >= self._full_for_s:
            self._empty(file)

    def _empty(self, file: int) -> None:
        """Read what is in the pipe; a writer may fill it again at once, which the next call reads."""
        reader = os.open(f"/proc/self/fd/{file}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            with contextlib.suppress(BlockingIOError):
                self._keep(os.read(reader, _CHUNK_BYTES))
        finally:
            os.close(reader)


def _is_pipe(file: int) -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(file).st_mode)
    except OSError:  # it is closed
        return False


def _is_full(file: int) -> bool:
    """Whether a write would wait; not if the reader has closed its end: a write fails."""
    poll = select.poll()
    poll.register(file, select.POLLOUT)
    return not poll.poll(0)
