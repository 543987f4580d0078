"""`Popen` and `run` as in `subprocess`, for Python processes that share one import of torch.

A process is forked if nothing in its options or environment asks for a new interpreter; else it is started as usual.
"""

from __future__ import annotations

import atexit
import hashlib
import inspect
import os
import select
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from tests.eventually import eventually
from tests.forked.fork_request import (
    APPLIED_LATER,
    Request,
    can_be_forked,
    note_started,
    number_from,
    read_at_start,
    send,
)
from tests.forked.server_imports import SHARED
from tests.forked.sibling import is_possible

__all__ = ["TRACKERS", "ForkServer", "Popen", "command_inside", "run", "run_code"]

_PROGRAM, _ENTER = (Path(__file__).with_name(name) for name in ("server.py", "enter.py"))
TRACKERS = frozenset({"aim", "clearml", "mlflow", "trackio", "wandb"})


class ForkServer:
    """The process that forks, kept until this one ends. Workers of one run of the tests share it.

    Args:
        kind: what it has imported; see `server`.
        arguments: of pytest, whose workers it forks.
    """

    def __init__(self, kind: str, arguments: Sequence[str] = ()) -> None:
        self._arguments = arguments
        self._kept = {name: value for name, value in os.environ.items() if name not in APPLIED_LATER}
        one_thread = "OPENBLAS_NUM_THREADS" if arguments else "OMP_NUM_THREADS"  # workers compute by as many as usual
        self._environ = self._kept | {one_thread: "1"}
        self._computes = kind in SHARED
        self._process: subprocess.Popen[bytes] | None = None
        run = os.environ.get("PYTEST_XDIST_TESTRUNUID", os.getpid())
        self._address = f"\0{__name__}-{run}-{kind}-{_digest(read_at_start(self._environ))}"
        self._sock = eventually(lambda: self._connect() or self._start(kind), "the process that forks")
        atexit.register(self._close)

    def _connect(self) -> socket.socket | None:
        """Return a socket of the running server; None: there is none, or its last client has just left it."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with suppress(ConnectionRefusedError, ConnectionResetError):
            sock.connect(self._address)
            if sock.recv(1):
                return sock

        sock.close()
        return None

    def _start(self, kind: str) -> socket.socket | None:
        """Start a server; return a socket of it. None: another process has the address, as it starts one."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
            try:
                listening.bind(self._address)
            except OSError:
                return None

            listening.listen()
            sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            fds = [theirs.fileno(), listening.fileno()]
            command = [sys.executable, str(_PROGRAM), kind, *map(str, fds), *self._arguments]
            self._process = subprocess.Popen(command, env=self._environ, pass_fds=fds)
            theirs.close()
            return sock

    def environ_for(self, requested: Mapping[str, str] | None) -> Mapping[str, str]:
        """Return its environment; as many threads as requested where nothing computes."""
        if self._arguments:
            return self._kept

        threads = (os.environ if requested is None else requested).get("OMP_NUM_THREADS")
        if self._computes or threads == self._environ["OMP_NUM_THREADS"]:
            return self._environ

        kept = {name: value for name, value in self._environ.items() if name != "OMP_NUM_THREADS"}
        return kept if threads is None else kept | {"OMP_NUM_THREADS": threads}

    def start(self, request: Request, options: Mapping[str, Any]) -> tuple[int, int]:
        """Fork a process; return its id, and a pipe that yields its wait status."""
        return send(self._sock, request, options)

    def _close(self) -> None:
        self._sock.close()
        if self._process is not None:
            self._process.wait()


def _digest(values: Mapping[str, str]) -> str:
    return hashlib.sha256(repr(sorted(values.items())).encode()).hexdigest()[:16]


@cache
def _server(kind: str) -> ForkServer:
    return ForkServer(kind)


def command_inside(process: int, words: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Return a command that runs one inside the namespaces of a process; it ends when that ends, and that with it."""
    return [sys.executable, "-SE", str(_ENTER), str(process), *map(os.fspath, words)]


class Popen(subprocess.Popen):  # type: ignore[type-arg]
    """Python process; forked if that makes no difference to it.

    Args:
        forks: if possible, fork what it starts, too: aggregator, torchrun, ranks; it does not import torch itself.
        imports: what it imports: `torch`, `lightning` with it, the name of a tracker, or the `aggregator`'s libraries
            only, since a process with more has more to clear when it ends.
        inside: process whose namespaces it enters; what is waited for and signaled is its parent, outside.
    """

    _status_pipe: int | None = None

    def __init__(
        self, *values: Any, forks: bool = False, imports: str = "torch", inside: int = 0, **options: Any
    ) -> None:
        self._forks = forks and is_possible()
        self._imports = imports
        self._inside = inside
        super().__init__(*values, **options)

    @property
    def forked(self) -> bool:
        """Whether it was forked."""
        return self._status_pipe is not None

    def _execute_child(self, *values: Any) -> None:
        bound = inspect.signature(super()._execute_child).bind(*values)
        options = bound.arguments
        server = self._server()
        if options["preexec_fn"] is not None or not can_be_forked(options, server.environ_for(options["env"])):
            if self._inside:
                options["args"] = command_inside(self._inside, options["args"])

            super()._execute_child(*bound.args)
            return

        request = Request.from_options(options, forks=self._forks, inside=self._inside)
        sys.audit("subprocess.Popen", sys.executable, request.words, options["cwd"], options["env"])
        pid, self._status_pipe = server.start(request, options)
        note_started(self, pid, options)

    def _server(self) -> ForkServer:
        return _server(self._imports)

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

        status = number_from(self._status_pipe)
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


def run_code(code: str, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run Python code to its end on one thread, as forked processes have; its output is captured."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    return run([sys.executable, "-c", code, *words], env=environ, capture_output=True, **options)
