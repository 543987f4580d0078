"""State of one worker, as its agent knows it, and its Python stacks."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Sequence

from traceml.inspection.kernel_state import HALTED_STATES, process_info, wait_state
from traceml.inspection.stack_signal import SignaledStacks, create_stack_file
from traceml.inspection.stack_text import main_first
from traceml.launch.agent.pipe_reader import OutputTail, PipeReader
from traceml.launch.shared.channel_streams import OutgoingStream
from traceml.launch.shared.fd_socket import FdSocket
from traceml.launch.shared.launch_messages import Message, StacksRequest, StackThread, ThreadStacks, WorkerStack

__all__ = ["STACK_MESSAGES", "StackReader", "WorkerState"]

# A worker that has a core answers within the interpreter's switch interval, 5 ms, unless the GIL is held in C. On a
# busy host it may get none for seconds; one that is stopped is not waited for.
_SILENT_S, _STOPPED_GIVE_UP_S, _GIVE_UP_S = 1.0, 1.3, 4.0
STACK_MESSAGES: Sequence[type[Message]] = (StackThread, ThreadStacks)
_STATES = {
    "R": "running",
    "S": "sleeping",
    "D": "waiting for a disk or a device",
    "T": "stopped",
    "t": "stopped by a debugger",
    "Z": "dead",
    "X": "gone",
}


class StackReader:
    """The agent's side of a worker's stacks."""

    def __init__(self) -> None:
        self._socket, self._worker_end = FdSocket.pair()
        self._file = create_stack_file()
        self._thread: int | None = None
        self._waiting = self._closed = False
        self._text = ""
        self._pid = 0
        self._requested_s = 0.0
        self._signaled: SignaledStacks | None = None

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
        self._pid, self._text, self._signaled = pid, "", None
        self._requested_s = time.monotonic()
        if not self._waiting:  # else the answer to an earlier request is still to come
            try:
                self._socket.send(StacksRequest())
                self._waiting = True
            except OSError:
                return

    def done(self) -> bool:
        """Return whether the stacks are complete, or the worker does not answer."""
        self._receive()
        if self._text or self._closed:
            return True

        silent_s = time.monotonic() - self._requested_s
        if self._signaled is None and silent_s > _SILENT_S and self._thread is not None:
            self._signaled = SignaledStacks(self._pid, self._file, silent_thread=self._thread)

        if self._signaled is not None and self._signaled.step():
            self._text = main_first(self._signaled.text)
            self._signaled = None

        return bool(self._text) or (self._signaled is None and self._is_given_up(silent_s))

    def _is_given_up(self, silent_s: float) -> bool:
        if silent_s <= _STOPPED_GIVE_UP_S:
            return False

        info = process_info(self._pid)
        return silent_s > _GIVE_UP_S or info is None or info.state in HALTED_STATES

    def answer(self, pid: int | None) -> WorkerStack:
        """Return the stacks and the kernel's state."""
        seen = wait_state(pid or 0)
        return {"stack": self._text, "state": _STATES.get(seen.state, seen.state), "wchan": seen.wchan}

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
            while not self._closed and (received := self._socket.receive(*STACK_MESSAGES, wait=False)) is not None:
                message, _ = received
                if isinstance(message, StackThread):
                    self._thread = message.tid
                elif isinstance(message, ThreadStacks):
                    self._waiting, self._text = False, message.text
        except EOFError:
            self._closed = True


class WorkerState:
    """One worker.

    Args:
        worker_end: the other end of `socket`, until the fork.

    Attributes:
        socket: to the worker.
        answers: the streams with its result or exception, which nobody waits for once the job is stopped.
        status: as `waitpid` returns it.
        reported: whether its function has returned or raised; it then waits to be released.
        end_sent: whether the launcher was notified of its end.
    """

    def __init__(
        self,
        rank: int,
        local_rank: int,
        *,
        socket: FdSocket,
        worker_end: FdSocket,
        streams: list[OutgoingStream],
        readers: list[PipeReader],
        tail: OutputTail,
    ) -> None:
        self.rank, self.local_rank = rank, local_rank
        self.socket, self.worker_end = socket, worker_end
        self.streams, self.readers, self.tail = streams, readers, tail
        self.answers: list[OutgoingStream] = []
        self.stacks = StackReader()
        self.pid: int | None = None
        self.status: int | None = None
        self.reported = self.end_sent = False

    @property
    def running(self) -> bool:
        """Whether its process was forked and has not ended."""
        return self.pid is not None and self.status is None

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send the worker a message."""
        try:
            self.socket.send(message, fds)
        except OSError:  # it has ended, which is reported elsewhere
            return

    def ask(self) -> None:
        """Send SIGTERM to the worker alone."""
        if self.running and self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL to the worker's process group."""
        if self.running and self.pid is not None:
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                return
