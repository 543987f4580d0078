"""The rank's end of the collectors' process: starts it, takes its rows, and ends it.

Collectors run in a process of their own because reading takes the interpreter's lock for long: listing the installed
packages alone stalls a training for 100 ms. It is the rank's child and not the aggregator's, because what it reads is
on the rank's host, and the aggregator may be on another.
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

__all__ = ["CollectorProcess"]

_log = logging.getLogger("traceml")
# The environment stays as it is, because it is among what is read.
_BOOT = "import sys; sys.path[:0] = sys.argv[1:]; from traceml.track.rank.collectors.collector_main import main; main()"


class CollectorProcess:
    """A child process with collectors in it, and the thread that reads what it says.

    Args:
        collectors: names or import paths.
        known: names that `register` was given -> import path.
        mask: the `mask` setting.
        take: called with each row, on the reading thread.
    """

    def __init__(
        self,
        collectors: Sequence[str],
        known: Mapping[str, str],
        mask: Sequence[str],
        take: Callable[[dict[str, Any]], None],
    ) -> None:
        self._take = take
        self._pid = os.getpid()
        self._once = threading.Event()
        path = [str(Path(each).absolute()) for each in sys.path]
        argv, folder = list(sys.argv), str(Path.cwd())
        facts = {"script": argv[0] if argv else "", "folder": folder, "argv": argv, "executable": sys.executable}
        given = {
            "collectors": list(collectors),
            "known": dict(known),
            "mask": list(mask),
            "path": path,
            "config": facts | {"path": path, "mask": list(mask)},
        }
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _BOOT, *_roots()],  # -P: no file beside the script hides a library's
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("TRACEML_DEBUG") else subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is the training's; the child ends with its pipe
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(given, default=str).encode() + b"\n")
        self._process.stdin.flush()
        self._thread = threading.Thread(target=self._read, name="traceml collectors", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        """The child's."""
        return self._process.pid

    def stop(self, *, timeout_s: float) -> None:
        """End the child; first wait until what is read once has been read.

        Args:
            timeout_s: the longest to wait for that.
        """
        if self._pid != os.getpid():  # a forked child of the training's: the process is not its own
            return

        self._once.wait(timeout_s)
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
        except OSError:
            pass  # it has ended

        try:
            self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

        self._thread.join(1.0)
        if not self._thread.is_alive() and self._process.stdout is not None:
            self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        unpacker = msgpack.Unpacker(max_buffer_size=4 << 20)
        try:
            while data := os.read(self._process.stdout.fileno(), 1 << 16):
                unpacker.feed(data)
                for row in unpacker:
                    self._handle(row)
        except Exception as error:  # noqa: BLE001 - fail open: a run without its environment is still a run
            _log.warning("collectors: what they say cannot be read: %r", error)
        finally:
            self._once.set()

    def _handle(self, row: dict[str, Any]) -> None:
        kind = row.get("kind")
        if kind == "once":
            self._once.set()
        elif kind == "warning":
            _log.warning("%s", row["text"])
        else:
            self._take(row)


def _roots() -> list[str]:
    """Return where the child finds traceml and msgpack; it takes the rest of the rank's path from what it is given."""
    import traceml

    own = Path(traceml.__file__).parents[1]
    return list(dict.fromkeys([str(own), str(Path(msgpack.__file__).parents[1])]))
