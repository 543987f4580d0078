"""A process that outlives the one that starts it, and is nobody's child.

Schedulers end a worker together with its children: Ray kills the direct ones.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import IO

from traceml.helper_programs import without_debugger

__all__ = ["DetachedProcess"]

_START_S = 30.0  # it takes 20 ms, and seconds on a busy machine; what wraps Python programs may stop it
# Fork in a process of one thread; both the fork and the program that replaces it keep the pipe open.
_FORK = """
import os, signal, sys
signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the thread that starts it may block all
if os.fork():
    os._exit(0)
os.write(int(sys.argv[1]), b"%d" % os.getpid())
os.execv(sys.argv[2], sys.argv[2:])
"""


class DetachedProcess:
    """A program in a session of its own, whose parent has ended.

    Args:
        output: file for its standard output and error.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(
        self, command: Sequence[str], *, output: IO[bytes], environ: Mapping[str, str], fds: Collection[int]
    ) -> None:
        self._alive_fd, theirs = os.pipe()  # reads as ended when no process has the other end
        try:
            with without_debugger():
                done = subprocess.run(
                    [sys.executable, "-ISc", _FORK, str(theirs), *command],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=dict(environ),
                    pass_fds=(*fds, theirs),
                    start_new_session=True,  # Ctrl-C at the terminal is not for it
                    timeout=_START_S,
                    check=False,
                )
        except subprocess.TimeoutExpired as error:
            os.close(self._alive_fd)
            raise OSError(f"the process that starts it has not ended within {_START_S:.0f} s") from error
        except BaseException:
            os.close(self._alive_fd)
            raise
        finally:
            os.close(theirs)

        if done.returncode:
            os.close(self._alive_fd)
            raise OSError(f"the process that starts it ended with {done.returncode}")

        self.pid = int(os.read(self._alive_fd, 32) or 0)
        os.set_blocking(self._alive_fd, False)

    def close(self) -> None:
        """Stop watching it; it runs on."""
        os.close(self._alive_fd)

    def has_ended(self) -> bool:
        """Return whether the process has ended."""
        try:
            return not os.read(self._alive_fd, 1)
        except BlockingIOError:
            return False
