"""Python stacks of a worker: its own thread is asked; while the GIL is held, faulthandler writes them on a signal.

faulthandler reads the frames of all threads without the GIL. A process in which another thread runs Python code crashes
after 3 to 80 such signals, so only a silent worker gets one: there the GIL is held inside one call into C, and no frame
changes. It is sent to one thread, as a signal to the process would end a wait of the user's C code early.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

from traceml.launch.wire.fd_socket import FdSocket
from traceml.launch.wire.process_cleanup import process_info
from traceml.launch.wire.signals import STACK_SIGNAL

__all__ = ["StackReader"]

# A worker that has a core answers within the interpreter's switch interval, 5 ms, unless the GIL is held in C.
_SILENT_S, _TARGET_S = 1.0, 1.3
_FIRST_S, _QUIET_S = 0.3, 0.05
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
    """The agent's side of a worker's stacks."""

    def __init__(self) -> None:
        self._socket, self._worker_end = FdSocket.pair()
        # A file, as a pipe would be full before the main thread's stack, which faulthandler writes last.
        self._file = os.memfd_create("traceml-stacks")
        self._thread: int | None = None
        self._waiting = self._closed = False
        self._text = ""
        self._pid = self._size = 0
        self._requested_s = self._signaled_s = self._grown_s = 0.0

    @property
    def worker_fds(self) -> tuple[int, int]:
        """The worker's ends: the socket of its thread, and the file of its faulthandler."""
        return self._worker_end.fileno(), self._file

    def started(self) -> None:
        """Close the worker's end here."""
        self._worker_end.close()

    def request(self, pid: int) -> None:
        """Request a worker's stacks."""
        self._receive()
        os.ftruncate(self._file, 0)
        os.lseek(self._file, 0, os.SEEK_SET)  # the worker writes at the same position
        self._pid, self._text, self._size = pid, "", 0
        self._requested_s, self._signaled_s = time.monotonic(), 0.0
        if not self._waiting:  # else the answer to an earlier request is still to come
            with contextlib.suppress(OSError):
                self._socket.send("stacks")
                self._waiting = True

    def done(self) -> bool:
        """Return whether the stacks are complete, or the worker does not answer."""
        self._receive()
        if self._text or self._closed:
            return True

        now_s = time.monotonic()
        if self._signaled_s:
            return self._is_written(now_s)

        silent_s = now_s - self._requested_s
        if silent_s > _SILENT_S and self._signal():
            self._signaled_s = self._grown_s = now_s

        return not self._signaled_s and silent_s > _TARGET_S

    def answer(self, pid: int | None) -> dict[str, Any]:
        """Return the stacks, the main thread's first, and the kernel's state: `stack`, `state`, `wchan`."""
        process = process_info(pid) if pid is not None else None
        wchan = ""
        with contextlib.suppress(OSError):
            wchan = Path(f"/proc/{pid}/wchan").read_text(encoding="ascii").strip("0\n ")

        state = "gone" if process is None else _STATES.get(process.state, process.state)
        return {"stack": self._text or self._written(), "state": state, "wchan": wchan}

    def close(self) -> None:
        """Close our ends."""
        self._socket.close()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

        self._closed = True

    def _receive(self) -> None:
        """Take the messages of the worker's thread."""
        try:
            while not self._closed and (received := self._socket.receive(wait=False)) is not None:
                message, _ = received
                if message["t"] == "thread":
                    self._thread = message["tid"]
                else:
                    self._waiting, self._text = False, message["text"]
        except EOFError:
            self._closed = True

    def _is_written(self, now_s: float) -> bool:
        """Whether faulthandler has written everything."""
        size = os.fstat(self._file).st_size
        if size != self._size:
            self._size, self._grown_s = size, now_s

        return now_s - self._grown_s > (_QUIET_S if size else _FIRST_S)

    def _written(self) -> str:
        """Return what faulthandler has written, with the main thread first."""
        text = os.pread(self._file, _MAX_BYTES, 0).decode("utf-8", "replace") if self._file >= 0 else ""
        return "\n\n".join(reversed(text.rstrip("\n").split("\n\n")))

    def _signal(self) -> bool:
        """Send faulthandler's signal to one thread; return False where it is not safe now."""
        import ctypes

        target = self._target()
        return target is not None and ctypes.CDLL(None).tgkill(self._pid, target, STACK_SIGNAL) == 0

    def _target(self) -> int | None:
        """Return the thread for the signal: one that is in no wait of the user's.

        A main thread that runs is in none; else it is the thread that we have asked. Where that one only lacks a core,
        others may run Python. A stopped process would handle the signal later, when it runs again.
        """
        asked = process_info(self._thread) if self._thread is not None else None
        main = process_info(self._pid)
        if asked is None or main is None or asked.state != "S" or main.state in "TtZ" or not self._is_handled():
            return None

        return self._pid if main.state == "R" else self._thread

    def _is_handled(self) -> bool:
        """Whether the worker has a handler: else the signal would kill it."""
        with contextlib.suppress(OSError, ValueError):
            status = Path(f"/proc/{self._pid}/status").read_text(encoding="utf-8", errors="replace")
            caught = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), "0")
            return bool(int(caught, 16) >> (STACK_SIGNAL - 1) & 1)

        return False
