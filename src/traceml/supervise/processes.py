"""Child processes that end with this one, and the pipe or pseudo-terminal for a script's output."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from traceml.helper_programs import helper_program
from traceml.process_ends import PR_SET_PDEATHSIG, has_terminal, in_slurm_job

__all__ = [
    "FORWARDED_SIGNALS",
    "REPORT_LIMIT_S",
    "PseudoTerminal",
    "ScriptPipe",
    "SignalWitness",
    "spawn",
    "spawn_server",
]

REPORT_LIMIT_S = 120.0
"""Longest time for the report of an ended run."""

# Signals that a supervisor blocks for itself and forwards to the job.
FORWARDED_SIGNALS = frozenset(
    {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}
)

_WITNESS_S = 0.1  # until a signal that was sent to all processes has come to each


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


def _before_exec(death_signal: signal.Signals | None, *, unblocks: bool = True) -> Callable[[], None]:
    # looked up before the fork: the child should do as little as possible
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def prepare() -> None:
        if unblocks:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED_SIGNALS)

        if death_signal is None:
            return

        prctl(PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0)
        if os.getppid() != parent:  # the parent died before prctl
            os._exit(128 + int(death_signal))

    return prepare


class SignalWitness:
    """A process beside the job, which shows whether a signal was sent to all processes, as schedulers and systemd do.

    It blocks what its parent blocks. A signal that it has received therefore stays pending, which /proc shows. There is
    none at a terminal, whose signals are known, but in a job of Slurm.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process, in the job's process group."""
        if has_terminal() and not in_slurm_job():
            return

        prepare = _before_exec(signal.SIGKILL, unblocks=False)
        try:
            self._process = subprocess.Popen(
                ["sleep", "infinity"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                preexec_fn=prepare,  # noqa: PLW1509 - as above
            )
        except OSError:  # the host has no such program: each signal is taken for one to its receiver alone
            self._process = None

    def has_received(self, number: int) -> bool:
        """Return whether the signal has come to the witness, too; the next one counts again."""
        until_s = time.monotonic() + _WITNESS_S
        while self._process is not None and self._process.poll() is None:
            if self._pending() >> (number - 1) & 1:
                self.close()
                self.start()
                return True

            if time.monotonic() > until_s:
                break

            time.sleep(_WITNESS_S / 10)

        return False

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _pending(self) -> int:
        """Return the set of the signals that wait for the process, as a mask."""
        assert self._process is not None
        for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines():
            if line.startswith("ShdPnd:"):
                return int(line.split()[1], 16)

        return 0


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
