"""Signs of progress in a rank, cheap ones first.

These are a row, batch, phase or collective; a value that the training thread logs; a byte that it writes (output, a
checkpoint), also of a child that it waits for, but of other threads only many (`thread_output`); and a line of the
user's code, or of a module that is being imported, below all lines seen in its function since the last progress. A loop
that polls a file runs the same lines again and again, which is no progress. Nor are the answers of torch's store, which
ranks that wait for others ask all the time.
"""

from __future__ import annotations

import ctypes
import functools
import socket
import sys
from collections.abc import Callable, Iterable
from types import CodeType
from typing import TYPE_CHECKING, Any

from traceml.database.schema import EPOCHS, EVALS, STEPS, USER_PHASES, Phase, Slot
from traceml.inspection.kernel_state import awaited_descriptor, current_syscall, written_bytes
from traceml.inspection.thread_frames import running_line, stack_frames, thread_frame, thread_number
from traceml.recorder.no_progress.library_waits import awaited_child
from traceml.recorder.no_progress.thread_output import ThreadOutput

if TYPE_CHECKING:
    from traceml.database.flight.flight import FlightFile
    from traceml.recorder.user_code import UserCode

__all__ = ["ProgressCounters", "received_bytes"]

_TABLES = (STEPS.name, USER_PHASES.name, EVALS.name, EPOCHS.name)
_WORDS = (*range(len(Phase)), int(Slot.STEP_START), int(Slot.USER_NAME), int(Slot.EXIT_START), int(Slot.LOGGED))
_MAX_DEPTH, _MAX_CODES = 200, 4096
_DISTRIBUTED = "/torch/distributed/"
_RECEIVED_AT, _INFO_BYTES = 128, 136  # `tcpi_bytes_received` of struct tcp_info


class ProgressCounters:
    """Compares what a rank has done with the last time.

    Args:
        thread: returns the id of the training thread.
        user: recognizes the user's code.
        work: returns numbers that change with each batch, forward and backward, also of an evaluation.
        collectives: returns text that changes with each collective.
    """

    def __init__(
        self,
        flight: FlightFile,
        thread: Callable[[], int],
        user: UserCode,
        work: Callable[[], Iterable[Any]],
        collectives: Callable[[], object],
    ) -> None:
        self._tables: list[Any] = [flight.ring(name) for name in _TABLES]
        self._slots = flight.open_slots
        self._thread, self._user, self._work, self._collectives = thread, user, work, collectives
        self._done: tuple[Any, ...] = ()
        self._rest: tuple[Any, ...] | None = None
        self._received = 0
        self.output = ThreadOutput(lambda: thread_number(thread()))
        # The furthest line that was seen in each function, by id of its code, whose hash takes long.
        self._lines: dict[int, tuple[CodeType, int]] = {}

    def moved(self) -> bool:
        """Return whether there was progress since the last call."""
        moved = self._moved()
        if moved:
            self.output.forget()

        return moved

    def _moved(self) -> bool:
        done = (*(table.appended for table in self._tables), *(self._slots[word] for word in _WORDS))
        if done != self._done:
            self._done, self._rest = done, None
            self._lines.clear()
            return True

        moved = self.output.progress_bytes(), self._written_by_child(), self._received_bytes()
        before, self._rest = self._rest, (*self._work(), self._collectives(), *moved)
        if before not in (None, self._rest):
            self._lines.clear()
            return True

        return self._is_elsewhere()

    def _written_by_child(self) -> int:
        """Return the bytes that the child which the training thread waits for has written, and its own children."""
        child = awaited_child(thread_frame(self._thread()), self._user.contains)
        return written_bytes(child) if child is not None else 0

    def _received_bytes(self) -> int:
        """Return the bytes that have come on the connection that the training thread waits for, if it does."""
        ident = self._thread()
        frame = thread_frame(ident)
        if frame is not None and _DISTRIBUTED in frame.f_code.co_filename:  # it asks torch's store
            return self._received

        number = thread_number(ident)
        before, self._received = self._received, received_bytes(number) if number else 0
        if not self._received:  # it waits for no connection now, as between two parts: that alone is no progress
            self._received = before

        return self._received

    def _is_elsewhere(self) -> bool:
        """Whether the training thread is further on in the user's code than ever since the last progress."""
        is_new = False
        for frame in stack_frames(thread_frame(self._thread()), _MAX_DEPTH):
            # A module counts while it is being imported.
            if frame.f_code.co_name == "<module>" or self._user.contains(frame):
                is_new |= self._is_further(frame.f_code, running_line(frame))

        return is_new

    def _is_further(self, code: CodeType, line: int) -> bool:
        known = self._lines.get(id(code))
        if (known is not None and line <= known[1]) or len(self._lines) >= _MAX_CODES:
            return False

        self._lines[id(code)] = code, line
        return True


def received_bytes(thread: int) -> int:
    """Return the bytes that have arrived on the TCP connection that a thread of this process waits for; 0 without one.

    Args:
        thread: the kernel's id of the thread.
    """
    descriptor = awaited_descriptor(thread, current_syscall(thread))
    if descriptor < 0:
        return 0

    info, size = ctypes.create_string_buffer(_INFO_BYTES), ctypes.c_uint32(_INFO_BYTES)
    # By the C function: a socket object of Python may change the socket's mode.
    failed = _libc().getsockopt(descriptor, socket.IPPROTO_TCP, socket.TCP_INFO, info, ctypes.byref(size))
    return 0 if failed or size.value < _INFO_BYTES else int.from_bytes(info.raw[_RECEIVED_AT:], sys.byteorder)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
