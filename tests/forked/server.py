"""Process that has imported torch and forks a child for each request: `python server.py SOCKET_FD`.

A child runs a script, a module or code as `python` does. The parent reports its process id and its wait status through
a pipe that comes with the request. It has no threads, and has called nothing of the modules that it has imported.
"""

from __future__ import annotations

import gc
import io
import itertools
import json
import os
import select
import socket
import sys
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preloaded import Preloaded
from program import Program

__all__: list[str] = []

# Imports that cost much; of each, the ones that it needs. torch imports `_dynamo` only when an optimizer is made.
_SHARED = {
    "numpy": (),
    "pydantic": (),
    "pydantic_settings": ("pydantic",),
    "torch": ("numpy",),
    "torch._dynamo": ("torch",),
}
_STREAMS = ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w"))
_MAX_FDS = 64


@dataclass(frozen=True)
class Request:
    """Python process to start.

    Attributes:
        words: the interpreter's arguments.
        folder: working directory.
        environ: all of its environment.
        new_session: start it in a session of its own.
        fds: the numbers that its file descriptors shall have.
    """

    words: list[str]
    folder: str
    environ: dict[str, str]
    new_session: bool
    fds: list[int]


class Server:
    """Loop of the parent."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._children: dict[int, tuple[int, int]] = {}  # by pidfd: the process, the pipe for its status

    def serve(self) -> Request:
        """Serve requests. Return in each child; in the parent, exit when the client is gone."""
        while True:
            for fd, _ in self._poll.poll():
                if fd != self._sock.fileno():
                    self._report_end(fd)
                elif (request := self._receive()) is not None:
                    return request

    def _receive(self) -> Request | None:
        """Receive a request and fork; return the request in the child."""
        data, received, _, _ = socket.recv_fds(self._sock, 1 << 20, _MAX_FDS)
        if not data:
            os._exit(0)

        status, *fds = received
        request = Request(**json.loads(data))
        if (pid := os.fork()) == 0:
            self._sock.detach()
            _place_fds(fds, request.fds)
            return request

        for fd in fds:
            os.close(fd)

        os.write(status, b"%d\n" % pid)
        pidfd = os.pidfd_open(pid)
        self._children[pidfd] = pid, status
        self._poll.register(pidfd, select.POLLIN)
        return None

    def _report_end(self, pidfd: int) -> None:
        pid, pipe = self._children.pop(pidfd)
        self._poll.unregister(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        try:
            os.write(pipe, b"%d\n" % status)
        except BrokenPipeError:
            pass  # nobody waits for it

        os.close(pipe)


def _place_fds(received: list[int], numbers: list[int]) -> None:
    """Give file descriptors their numbers, and close all others."""
    free = max([*received, *numbers]) + 1
    for i, fd in enumerate(received):
        os.dup2(fd, free + i)

    for i, number in enumerate(numbers):
        os.dup2(free + i, number)

    for low, high in itertools.pairwise([*sorted(numbers), os.sysconf("SC_OPEN_MAX")]):
        if low + 1 < high:
            os.closerange(low + 1, high)


def _become(request: Request, preloaded: Preloaded) -> None:
    """Make this process what a new interpreter is."""
    if request.new_session:
        os.setsid()

    os.environ.clear()
    os.environ.update(request.environ)
    time.tzset()
    os.chdir(request.folder)
    for fd, name, mode in _STREAMS:
        setattr(sys, name, _stream(fd, name, mode))
        setattr(sys, f"__{name}__", getattr(sys, name))

    preloaded.peek("numpy.random").seed()  # `random` does so itself
    threading.main_thread()._set_native_id()
    if "multiprocessing.process" in sys.modules:
        sys.modules["multiprocessing.process"].ORIGINAL_DIR = request.folder


def _stream(fd: int, name: str, mode: str) -> io.TextIOWrapper:
    """Return a standard stream as the interpreter makes it."""
    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))
    raw: Any = io.FileIO(fd, mode, closefd=False)
    raw.name = f"<{name}>"
    buffered = io.BufferedReader(raw) if mode == "r" else raw if unbuffered else io.BufferedWriter(raw)
    stream = io.TextIOWrapper(
        buffered,
        encoding="utf-8",
        errors="backslashreplace" if name == "stderr" else "strict",
        newline=None if mode == "r" else "\n",
        line_buffering=not unbuffered and (raw.isatty() or name == "stderr"),
        write_through=unbuffered and mode == "w",
    )
    stream.mode = mode
    return stream


def _set_up_interpreter(program: Program) -> None:
    """Set what the interpreter sets from its arguments and environment."""
    options = [each for each in os.environ.get("PYTHONWARNINGS", "").split(",") if each] + program.warning_filters
    sys.warnoptions[:] = options
    warnings._processoptions(options)
    folders = [str(Path(each).absolute()) for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]
    sys.path[:0] = [program.folder, *folders]
    sys.argv = list(program.argv)


if __name__ == "__main__":
    del sys.path[0]  # this folder
    filters = list(warnings.filters)
    preloaded = Preloaded(_SHARED)
    warnings.resetwarnings()
    warnings.filters[:] = filters
    gc.freeze()  # else each child goes through all of these objects when it ends
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a process with threads must not fork"
    request = Server(socket.socket(fileno=int(sys.argv[1]))).serve()
    _become(request, preloaded)
    program = Program.parse(request.words)
    assert program is not None, request.words
    sys.orig_argv[1:] = request.words
    _set_up_interpreter(program)
    for name in ("preloaded", "program"):
        del sys.modules[name]

    program.run()
