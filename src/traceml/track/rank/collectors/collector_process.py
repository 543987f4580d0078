"""Handle of the collector process in its parent, the rank: start, rows, end.

Collectors run in a process of their own because reading holds the GIL for long: listing the installed
packages alone stalls a training for 100 ms. It is a child of the rank, not of the aggregator, because it reads facts
about the rank's host, and the aggregator may be on another.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgpack

from traceml.errors import PluginError
from traceml.fail_open import fail_open
from traceml.helper_programs import end_process, without_debugger
from traceml.inspection.user_files import working_folder
from traceml.process_ends import start_without_signals

__all__ = ["CollectorProcess"]

_log = logging.getLogger("traceml")
_CLEANUP_S, _END_S = 0.5, 0.5
# The environment is unchanged, because a collector reads it.
_BOOT = "import sys; sys.path[:0] = sys.argv[1:]; from traceml.track.rank.collectors.collector_main import main; main()"


class CollectorProcess:
    """A child process with collectors, and the thread that reads its rows.

    Args:
        collectors: names or import paths.
        known: names given to `register` -> import path.
        on_row: called with each row, on the reading thread.
        debug: show what the collectors print.
        cleanup_s: longest time for collectors with an interval to release what they took, at the end.
    """

    def __init__(
        self,
        collectors: Sequence[str],
        known: Mapping[str, str],
        mask: Sequence[str],
        on_row: Callable[[dict[str, Any]], None],
        *,
        debug: bool = False,
        cleanup_s: float = _CLEANUP_S,
    ) -> None:
        self._on_row = on_row
        self._cleanup_s = cleanup_s
        self._pid = os.getpid()
        self._first_readings = threading.Event()
        argv, folder = list(sys.argv), working_folder()
        path = [str(Path(folder, each)) for each in sys.path]
        facts = {"script": argv[0] if argv else "", "folder": folder, "argv": argv, "executable": sys.executable}
        request = {
            "collectors": list(collectors),
            "known": dict(known),
            "mask": list(mask),
            "cleanup_s": cleanup_s,
            "path": path,
            "config": facts | {"path": path, "mask": list(mask)},
        }
        with without_debugger():
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _BOOT, *_roots()],  # -P: no file beside the script shadows a library
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=None if debug else subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the training; the child ends with its pipe
            )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request, default=str).encode() + b"\n")
        self._process.stdin.flush()
        self._thread = threading.Thread(target=self._read, name="traceml collectors", daemon=True)
        start_without_signals(self._thread)

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._process.pid

    def stop(self, *, timeout_s: float) -> None:
        """End the child; first wait until collectors that read once have done so."""
        if self._pid != os.getpid():  # in a forked child of the training, whose child the process is not
            return

        self._first_readings.wait(timeout_s)
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
        except OSError:
            pass  # it has ended

        end_process(self._process, self._cleanup_s + _END_S)
        self._thread.join(1.0)
        if not self._thread.is_alive() and self._process.stdout is not None:
            self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        unpacker = msgpack.Unpacker(max_buffer_size=4 << 20)
        try:
            with fail_open(_log, "track", "rows of collectors cannot be read"):
                while data := os.read(self._process.stdout.fileno(), 1 << 16):
                    unpacker.feed(data)
                    for row in unpacker:
                        self._handle(row)
        finally:
            self._first_readings.set()

    def _handle(self, row: dict[str, Any]) -> None:
        kind = row.get("kind")
        if kind == "once":
            self._first_readings.set()
        elif kind == "warning":
            with fail_open(_log, "track", "collected facts are missing"):
                raise PluginError(row["text"])
        else:
            self._on_row(row)


def _roots() -> list[str]:
    """Return the folders of traceml and msgpack; the child gets the rest of the rank's path from its request."""
    own = Path(__file__).parents[4]
    return list(dict.fromkeys([str(own), str(Path(msgpack.__file__).parents[1])]))
