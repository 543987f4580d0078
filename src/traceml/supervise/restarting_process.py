"""Helper processes that are restarted when they die."""

from __future__ import annotations

import logging
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from traceml.errors import TraceMLError
from traceml.helper_programs import end_process

__all__ = ["RestartPolicy", "RestartingProcess", "RestartingServer"]

_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _STABLE_S = 0.5, 30.0, 60.0
_STOP_TIMEOUT_S = 5.0

_log = logging.getLogger("traceml")


class RestartPolicy:
    """Restart times: at once after a long life, else after pauses that double."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started_s = self._due_s = 0.0
        self._pause_s = _FIRST_PAUSE_S

    def started(self) -> None:
        """Record that the process was started now."""
        self._started_s = self._clock()

    def due(self) -> bool:
        """Return whether a dead process is to be started now; if so, the next start has to wait."""
        now_s = self._clock()
        if now_s < self._due_s:
            return False

        if now_s - self._started_s > _STABLE_S:
            self._pause_s = _FIRST_PAUSE_S

        self._due_s = now_s + self._pause_s
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        return True


class RestartingProcess:
    """A process that is started, restarted when it dies, and ended. A context manager: its exit ends it.

    Subclasses implement `spawn_process`.
    """

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self._restarts = RestartPolicy()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def running(self) -> bool:
        """Whether the process runs."""
        return self.process is not None and self.process.poll() is None

    def spawn_process(self) -> subprocess.Popen[bytes]:
        """Start the process.

        Raises:
            TraceMLError, OSError: it cannot be started.
        """
        raise NotImplementedError

    def start(self) -> None:
        """Start the process.

        Raises:
            TraceMLError, OSError: it cannot be started.
        """
        self._restarts.started()
        self.process = self.spawn_process()

    def restart_if_dead(self) -> None:
        """Start the process again if it died. Call it often."""
        if self.process is None or self.running or not self._restarts.due():
            return

        try:
            self.start()
        except (TraceMLError, OSError) as error:  # it is tried again
            _log.debug("%r cannot be restarted now: %s", self, error)

    def close(self) -> None:
        """End the process. May be called again."""
        raise NotImplementedError

    def wait_or_kill(self, timeout_s: float) -> None:
        """Wait for the end of the process; kill it if it takes longer than `timeout_s`."""
        if self.process is not None:
            end_process(self.process, timeout_s)


class RestartingServer(RestartingProcess):
    """A server at a socket that its parent holds, so that one that dies is replaced at the same address.

    Attributes:
        kind: what it serves, `auth.PAGE` or `auth.METRICS`.
    """

    kind: str

    def __init__(self, runs_dir: Path, listener: socket.socket) -> None:
        super().__init__()
        self.runs_dir = runs_dir.absolute()
        self.listener = listener
        self.port: int = listener.getsockname()[1]

    def __repr__(self) -> str:
        return f"<{self.kind} process at port {self.port}>"

    def close(self) -> None:
        """End the server. May be called again."""
        if self.process is not None and self.running:
            self.process.terminate()
            self.wait_or_kill(_STOP_TIMEOUT_S)

        self.process = None
        self.listener.close()

    def kept_token(self) -> str:
        """Return the token of the last server at this port, which is ours now; a new one without one."""
        from traceml.transport import auth

        before = auth.discover(self.port, include_dead=True, kind=self.kind)
        return before.token if before is not None and before.token else auth.new_token()
