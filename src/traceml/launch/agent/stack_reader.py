"""Python stacks of a worker, written by faulthandler on a signal even while the GIL is held."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

from traceml.launch.wire.process_cleanup import process_info
from traceml.launch.wire.signals import STACK_SIGNAL

__all__ = ["StackReader"]

_QUIET_S, _AGAIN_S, _LONGEST_S = 0.05, 0.25, 1.0
_MAX_BYTES = 1024 * 1024
_STATES = {
    "R": "running",
    "S": "sleeping",
    "D": "waiting for a disk or a device",
    "T": "stopped",
    "t": "stopped by a debugger",
    "Z": "dead",
}


class StackReader:
    """The agent's end of a pipe into which a worker's faulthandler writes.

    Attributes:
        write_fd: the worker's end.
    """

    def __init__(self) -> None:
        self._read_fd, self.write_fd = os.pipe()
        os.set_blocking(self._read_fd, False)
        os.set_blocking(self.write_fd, False)  # a worker never waits for the reader
        self._text = b""
        self._requested_s = self._received_s = self._again_s = 0.0
        self._pid = 0

    def started(self) -> None:
        """Close the worker's end here."""
        os.close(self.write_fd)

    def request(self, pid: int) -> None:
        """Request a worker's stacks."""
        self._read()
        self._text = b""
        self._pid = pid
        self._requested_s, self._received_s = time.monotonic(), 0.0
        self._send()

    def done(self) -> bool:
        """Return whether the stacks are complete, or the worker does not answer."""
        if self._read():
            self._received_s = time.monotonic()

        now_s = time.monotonic()
        if self._received_s and now_s - self._received_s > _QUIET_S:
            return True

        if not self._received_s and now_s >= self._again_s:
            self._send()  # a worker that was just forked ignores the signal

        return now_s - self._requested_s > _LONGEST_S

    def answer(self, pid: int | None) -> dict[str, Any]:
        """Return the stacks and the kernel's state of the process: `stack`, `state`, `wchan`."""
        process = process_info(pid) if pid is not None else None
        wchan = ""
        with contextlib.suppress(OSError):
            wchan = Path(f"/proc/{pid}/wchan").read_text(encoding="ascii").strip("0\n ")

        state = "gone" if process is None else _STATES.get(process.state, process.state)
        return {"stack": self._text.decode("utf-8", "replace"), "state": state, "wchan": wchan}

    def close(self) -> None:
        """Close our end."""
        if self._read_fd >= 0:
            os.close(self._read_fd)
            self._read_fd = -1

    def _send(self) -> None:
        self._again_s = time.monotonic() + _AGAIN_S
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, STACK_SIGNAL)

    def _read(self) -> bool:
        found = False
        with contextlib.suppress(BlockingIOError):
            while len(self._text) < _MAX_BYTES and (data := os.read(self._read_fd, 65536)):
                self._text += data
                found = True

        return found
