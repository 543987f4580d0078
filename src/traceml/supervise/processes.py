"""Child processes that end with this one, and the pipe or pseudo-terminal for a script's output."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

from traceml.helper_programs import helper_program
from traceml.process_ends import PR_SET_PDEATHSIG

__all__ = ["FORWARDED_SIGNALS", "REPORT_LIMIT_S", "PseudoTerminal", "ScriptPipe", "spawn", "spawn_server"]

REPORT_LIMIT_S = 120.0
"""Longest time for the report of an ended run."""

# Signals that a supervisor blocks for itself and forwards to the job.
FORWARDED_SIGNALS = frozenset(
    {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}
)


def spawn(
    command: Sequence[str],
    *,
    environ: Mapping[str, str],
    stdin: int | None = None,
    stdout: int | IO[Any] | None = None,
    stderr: int | IO[Any] | None = None,
    pass_fds: Sequence[int] = (),
    death_signal: signal.Signals | None = None,
    own_session: bool = False,
) -> subprocess.Popen[bytes]:
    """Start a process with the signals unblocked that a supervisor blocks.

    Args:
        environ: its whole environment.
        stdin: its standard input; None inherits ours.
        death_signal: the signal that the kernel sends it when this process dies.
        own_session: start it in a session of its own, without the terminal's signals.
    """
    return subprocess.Popen(
        command,
        env=dict(environ),
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        pass_fds=tuple(pass_fds),
        start_new_session=own_session,
        preexec_fn=_before_exec(death_signal),  # noqa: PLW1509 - runs a prebound C function and no imports
    )


def spawn_server(
    module: str, config: Mapping[str, Any], pass_fds: Sequence[int] = (), *arguments: str
) -> subprocess.Popen[bytes]:
    """Start a Python module that reads its configuration, one line of JSON, on standard input.

    Args:
        config: its configuration; not on the command line, which every user of the host can read.
    """
    import json  # here and below: a script waits for the imports of `traceml run`

    settings_in, settings_out = os.pipe()
    try:
        return spawn(
            helper_program(module, *arguments),
            environ=os.environ,
            stdin=settings_in,
            stdout=subprocess.DEVNULL,
            pass_fds=pass_fds,
            death_signal=signal.SIGTERM,
            own_session=True,
        )
    finally:
        os.close(settings_in)
        with open(settings_out, "w") as pipe:
            pipe.write(json.dumps(config) + "\n")


def _before_exec(death_signal: signal.Signals | None) -> Callable[[], None]:
    # looked up before the fork: the child should do as little as possible
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def prepare() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED_SIGNALS)
        if death_signal is None:
            return

        prctl(PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0)
        if os.getppid() != parent:  # the parent died before prctl
            os._exit(128 + int(death_signal))

    return prepare


class ScriptPipe:
    """A pipe for the script's output in place of our standard output; bytes arrive unchanged."""

    def __init__(self) -> None:
        self.master, self.slave = self._open()
        os.set_blocking(self.master, False)

    def _open(self) -> tuple[int, int]:
        return os.pipe()

    def follow_size(self) -> None:
        """Do nothing: a pipe has no size."""

    def read(self) -> bytes | None:
        """Return the script's output; empty if there is none now, None if all writers have closed it."""
        try:
            return os.read(self.master, 65536) or None
        except BlockingIOError:
            return b""
        except OSError:  # EIO: every process that held a terminal's slave has closed it
            return None

    def close_slave(self) -> None:
        """Close the script's end here, so that its end can be detected."""
        os.close(self.slave)

    def close(self) -> None:
        """Close our end; may be called again."""
        if self.master >= 0:
            os.close(self.master)
            self.master = -1


class PseudoTerminal(ScriptPipe):
    """A pseudo-terminal of the same size, if our standard output is a terminal."""

    def __init__(self, like_fd: int) -> None:
        super().__init__()
        self._like_fd = like_fd
        self._size = b""
        self.follow_size()

    def _open(self) -> tuple[int, int]:
        import pty
        import termios

        master, slave = pty.openpty()
        attributes = termios.tcgetattr(slave)
        attributes[1] &= ~termios.OPOST  # no newline translation: the real terminal does it
        termios.tcsetattr(slave, termios.TCSANOW, attributes)
        return master, slave

    def follow_size(self) -> None:
        """Give the pseudo-terminal the real one's size; the kernel signals a change to the script."""
        import fcntl
        import struct
        import termios

        try:
            size = fcntl.ioctl(self._like_fd, termios.TIOCGWINSZ, struct.pack("4H", 24, 80, 0, 0))
        except OSError:  # it was closed
            return

        if size != self._size:
            self._size = size
            fcntl.ioctl(self.master, termios.TIOCSWINSZ, size)
