"""State of one worker, as its agent knows it."""

from __future__ import annotations

import os
import signal

from traceml.launch.agent.pipe_reader import OutputTail, PipeReader
from traceml.launch.agent.stack_reader import StackReader
from traceml.launch.wire.channel_streams import OutgoingStream
from traceml.launch.wire.fd_socket import FdSocket

__all__ = ["WorkerState"]


class WorkerState:
    """One worker.

    Args:
        worker_end: the other end of `socket`, until the fork.

    Attributes:
        socket: to the worker.
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
        self.stacks = StackReader()
        self.pid: int | None = None
        self.status: int | None = None
        self.reported = self.end_sent = False

    @property
    def running(self) -> bool:
        """Whether its process was forked and has not ended."""
        return self.pid is not None and self.status is None

    def send(self, name: str, fds: tuple[int, ...] | list[int] = ()) -> None:
        """Send the worker a message."""
        try:
            self.socket.send(name, fds)
        except OSError:  # it has ended, which is reported elsewhere
            return

    def kill(self) -> None:
        """Send SIGKILL to the worker's process group."""
        if self.running and self.pid is not None:
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                return
