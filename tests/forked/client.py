"""`Popen` and `run` as in `subprocess`, for Python processes that share one import of torch.

A process is forked if nothing in its options or environment asks for a new interpreter; else it is started as usual.
"""

from __future__ import annotations

import atexit
import inspect
import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tests.forked.program import Program

__all__ = ["Popen", "run"]

# Read when the interpreter or a shared module starts: what differs from the server's asks for a new interpreter.
_READ_AT_START = ("PYTHON", "LC_", "LANG", "LD_", "MALLOC_", "OMP_", "MKL_", "KMP_", "GOMP_", "OPENBLAS_", "TORCH_")
_PLAIN = {"executable": None, "preexec_fn": None, "shell": False, "process_group": -1, "umask": -1, "uid": None}
_PIPES = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
_APPLIED_LATER = {"PYTHONPATH", "PYTHONWARNINGS", "PYTHONUNBUFFERED"}
# By importing torch or scikit-learn in this process.
_SET_BY_LIBRARIES = {"KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK"}


class _Server:
    """The process that forks, kept until this one ends."""

    def __init__(self) -> None:
        self.environ = {name: value for name, value in os.environ.items() if name not in _APPLIED_LATER}
        self.environ["OMP_NUM_THREADS"] = "1"
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, str(Path(__file__).with_name("server.py")), str(theirs.fileno())]
        self._process = subprocess.Popen(command, env=self.environ, pass_fds=[theirs.fileno()])
        theirs.close()
        atexit.register(self._close)

    def start(self, request: dict[str, Any], fds: Sequence[int]) -> tuple[int, int]:
        """Fork a process; return its id, and a pipe that yields its wait status."""
        status, theirs = os.pipe()
        try:
            socket.send_fds(self._sock, [json.dumps(request).encode()], [theirs, *fds])
        finally:
            os.close(theirs)

        return _number(status), status

    def _close(self) -> None:
        self._sock.close()
        self._process.wait()


@cache
def _server() -> _Server:
    return _Server()


class Popen(subprocess.Popen):  # type: ignore[type-arg]
    """Python process; forked if that makes no difference to it."""

    _status_pipe: int | None = None

    @property
    def forked(self) -> bool:
        """Whether it was forked."""
        return self._status_pipe is not None

    def _execute_child(self, *values: Any) -> None:
        options = inspect.signature(super()._execute_child).bind(*values).arguments
        environ = dict(os.environ if options["env"] is None else options["env"])
        words = [os.fspath(each) for each in options["args"]]
        if not _can_be_forked(words, options, environ):
            super()._execute_child(*values)
            return

        sys.audit("subprocess.Popen", words[0], words, options["cwd"], options["env"])
        streams = [options[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        fds = [i if fd == -1 else fd for i, fd in enumerate(streams)] + list(options["pass_fds"])
        request = {
            "words": words[1:],
            "folder": str(Path(options["cwd"] or ".").absolute()),
            "environ": environ,
            "new_session": options["start_new_session"],
            "fds": [0, 1, 2, *options["pass_fds"]],
        }
        self.pid, self._status_pipe = _server().start(request, fds)
        self._child_created = True
        self._close_pipe_fds(*(options[name] for name in _PIPES))

    def _internal_poll(self, *values: Any, **options: Any) -> int | None:
        if self._status_pipe is None or self.returncode is not None:
            return super()._internal_poll(*values, **options)

        if self._waitpid_lock.acquire(blocking=False):
            try:
                self._note_end(os.WNOHANG)
            finally:
                self._waitpid_lock.release()

        return self.returncode

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if self._status_pipe is None:
            return super()._try_wait(wait_flags)

        if wait_flags & os.WNOHANG and not select.select([self._status_pipe], [], [], 0)[0]:
            return 0, 0

        status = _number(self._status_pipe)
        os.close(self._status_pipe)
        return self.pid, status

    def _note_end(self, wait_flags: int) -> None:
        pid, status = self._try_wait(wait_flags)
        if pid and self.returncode is None:
            self._handle_exitstatus(status)


def run(
    words: Sequence[str | os.PathLike[str]],
    *,
    input: str | None = None,  # noqa: A002 - as in subprocess
    timeout: float | None = None,
    check: bool = False,
    capture_output: bool = False,
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """Run a process to its end, as `subprocess.run` does."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}

    if input is not None:
        options["stdin"] = subprocess.PIPE

    with Popen(words, **options) as process:
        try:
            stdout, stderr = process.communicate(input, timeout)
        except BaseException:
            process.kill()
            raise

    done = subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
    if check:
        done.check_returncode()

    return done


def _can_be_forked(words: list[str], options: Mapping[str, Any], environ: Mapping[str, str]) -> bool:
    if words[0] != sys.executable or any(options[name] != value for name, value in _PLAIN.items()):
        return False

    program = Program.parse(words[1:])
    if program is None or not (program.kind or Path(options["cwd"] or ".", program.target).is_file()):
        return False

    mine = _server().environ
    return all(
        environ.get(name) == mine.get(name)
        for name in {*environ, *mine}
        if name.startswith(_READ_AT_START) and name not in _APPLIED_LATER | _SET_BY_LIBRARIES
    )


def _number(pipe: int) -> int:
    line = os.read(pipe, 32)  # written in one piece
    assert line, "the process that forks is gone: see above for what it said"
    return int(line)
