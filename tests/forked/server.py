"""Process that has imported torch and forks a child for each request: `python server.py KIND SOCKET_FD LISTENING_FD`.

With arguments of pytest after these it has imported the tests that they select, and forks the workers that run them.

A child runs a script, a module or code as `python` does. The parent reports its process id and its wait status through
a pipe that comes with the request. It has no threads, and has called nothing of the modules that it has imported.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import io
import itertools
import json
import os
import select
import socket
import struct
import sys
import threading
import time
import warnings
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

from enter import enter
from fork_request import Request, fork_as_siblings
from preloaded import Preloaded
from program import Program
from server_imports import BY_DEFAULT, OWN, PLAIN, SHARED, SMALL, WITHHELD
from sibling import end_with_parent, fork_sibling, is_possible, rename, start_helper

__all__: list[str] = []

_STREAMS = ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w"))
_MAX_FDS = 64


class Server:
    """Loop of a process that forks.

    Args:
        client: the first one.
        listening: socket at which other ones of this user connect.
        for_parent: the new processes are children of the parent, which waits for them.
    """

    def __init__(
        self, client: socket.socket, listening: socket.socket | None = None, *, for_parent: bool = False
    ) -> None:
        self._clients = {client.fileno(): client}
        self._listening = listening
        self._for_parent = for_parent
        self._poll = select.poll()
        for sock in filter(None, (client, listening)):
            self._poll.register(sock, select.POLLIN)

        self._children: dict[int, tuple[int, int]] = {}  # by pidfd: the process, the pipe for its status

    def serve(self) -> Request:
        """Serve requests. Return in each new process; in this one, exit when all clients are gone."""
        while True:
            for fd, _ in self._poll.poll():
                if fd in self._children:
                    self._report_end(fd)
                elif self._listening is not None and fd == self._listening.fileno():
                    self._accept(self._listening)
                elif (request := self._receive(self._clients[fd])) is not None:
                    return request

    def _accept(self, listening: socket.socket) -> None:
        client, _ = listening.accept()
        _, user, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if user != os.getuid():
            client.close()
            return

        with contextlib.suppress(BrokenPipeError):  # it is gone again
            client.send(b"1")

        self._clients[client.fileno()] = client
        self._poll.register(client, select.POLLIN)

    def _receive(self, client: socket.socket) -> Request | None:
        """Receive a request and fork; return the request in the child."""
        try:
            data, received, _, _ = socket.recv_fds(client, 1 << 20, _MAX_FDS)
        except ConnectionResetError:  # it was killed
            data, received = b"", []

        if not data:
            self._forget(client)
            return None

        status, *fds = received
        request = Request(**json.loads(data))
        ready, theirs = os.pipe()
        if (pid := fork_sibling() if self._for_parent else os.fork()) == 0:
            for sock in filter(None, (self._listening, *self._clients.values())):
                sock.detach()

            if request.new_session:
                os.setsid()

            _place_fds(fds, request.fds)  # closes the pipe
            if request.inside:
                os.chdir(request.folder)  # may be a mount of the machine alone
                enter(request.inside)

            return request

        for fd in (theirs, *fds):
            os.close(fd)

        os.read(ready, 1)  # it is in its session, whose group may be signaled as soon as its id is known
        os.close(ready)

        _write(status, pid)
        if self._for_parent:
            os.close(status)
        else:
            pidfd = os.pidfd_open(pid)
            self._children[pidfd] = pid, status
            self._poll.register(pidfd, select.POLLIN)

        return None

    def _forget(self, client: socket.socket) -> None:
        self._poll.unregister(client)
        del self._clients[client.fileno()]
        client.close()
        if not self._clients:
            os._exit(0)

    def _report_end(self, pidfd: int) -> None:
        pid, pipe = self._children.pop(pidfd)
        self._poll.unregister(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        _write(pipe, status)
        os.close(pipe)


def _write(pipe: int, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody waits for it
        os.write(pipe, b"%d\n" % number)


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


def _begin(request: Request, preloaded: Preloaded) -> Request:
    """Make this process a new interpreter; return what it runs at last."""
    _become(request, preloaded)
    program = Program.parse(request.words)
    if program is not None and program.kind == "-ISc":
        request = replace(request, words=program.run_until_exec(), new_session=False, death_signal=0)
        _become(request, preloaded)

    return request


def _become(request: Request, preloaded: Preloaded) -> None:
    """Make this process what a new interpreter is."""
    if request.death_signal:
        end_with_parent(os.getppid(), request.death_signal)

    if is_possible():
        rename([sys.executable, *request.words], request.environ)

    os.environ.clear()
    os.environ.update(request.environ)
    time.tzset()
    os.chdir(request.folder)
    unbuffered = bool(request.environ.get("PYTHONUNBUFFERED")) or request.words[:1] == ["-u"]
    for fd, name, mode in _STREAMS:
        setattr(sys, name, _stream(fd, name, mode, unbuffered=unbuffered))
        setattr(sys, f"__{name}__", getattr(sys, name))

    if (numpy_random := preloaded.peek("numpy.random") or sys.modules.get("numpy.random")) is not None:
        numpy_random.seed()  # `random` does so itself

    threading.main_thread()._set_native_id()
    if "multiprocessing.process" in sys.modules:
        sys.modules["multiprocessing.process"].ORIGINAL_DIR = request.folder


def _collect(arguments: list[str]) -> None:
    """Import tests as pytest does; each worker collects them itself, from the imported modules."""
    import pytest

    sys.path.insert(0, str(Path.cwd()))  # as `python -m pytest` does
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        pytest.main([*arguments, "--collect-only", "-n0", "-p", "no:cacheprovider"])

    if "torch" in sys.modules:
        importlib.import_module("torch._dynamo")  # as the first optimizer does, which each worker makes


def _load_backends(torch: Any) -> None:
    """Do what torch does at the end of its import."""
    if torch._is_device_backend_autoload_enabled():
        torch._import_device_backends()


def _stream(fd: int, name: str, mode: str, *, unbuffered: bool) -> io.TextIOWrapper:
    """Return a standard stream as the interpreter makes it."""
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
    sys.path[:0] = [*program.folders, *folders]
    sys.argv = list(program.argv)


class _LastExit:
    """Last of the exit handlers: it ends a process without the interpreter's own clean-up.

    To clear torch's modules takes three times as long as all else that a small script does. In a rank, gloo's
    destructor joins its threads there with the GIL held, while one of them may wait for the GIL to free an object of
    the last backward.

    Attributes:
        program: the program that this process runs.
    """

    def __init__(self) -> None:
        self.program: Program | None = None

    def __call__(self) -> None:
        """End with the program's status; leave it to the interpreter where it ends by a signal or cannot write."""
        status = None if self.program is None else self.program.status
        if status is None:
            return

        files = [each for each in gc.get_objects() if isinstance(each, (io.TextIOWrapper, io.BufferedWriter))]
        try:
            for file in sorted(
                files, key=lambda each: isinstance(each, io.BufferedWriter)
            ):  # texts write to the others
                if not file.closed:
                    file.flush()
        except (OSError, ValueError):
            return

        os._exit(status)


if __name__ == "__main__":
    del sys.path[0]  # this folder
    last_exit = _LastExit()
    atexit.register(last_exit)  # before those of all modules
    filters = list(warnings.filters)
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # pyarrow's, which pandas imports
    kind, client_fd, listening_fd, *of_pytest = sys.argv[1:]
    if of_pytest:
        _collect(of_pytest)

    withheld = dict.fromkeys(WITHHELD.get(kind, ()))
    sys.modules.update(withheld)
    for name in (*SMALL, *PLAIN.get(kind, ())):
        importlib.import_module(name)

    for name in withheld:
        del sys.modules[name]

    preloaded = Preloaded(SHARED.get(kind, BY_DEFAULT), {"torch": _load_backends}, OWN)
    for each in list(weakref.finalize._registry):  # torch removes its operators one by one: 30 ms in each child
        each.atexit = False

    warnings.resetwarnings()
    warnings.filters[:] = filters
    gc.freeze()  # else each child goes through all of these objects when it ends
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a process with threads must not fork"
    server = Server(*(socket.socket(fileno=int(fd)) for fd in (client_fd, listening_fd)))
    request = _begin(server.serve(), preloaded)
    while request.forks:
        sock = start_helper()
        if sock is not None:
            fork_as_siblings(sock)
            break

        request = _begin(Server(socket.socket(fileno=3), for_parent=True).serve(), preloaded)

    program = last_exit.program = Program.parse(request.words)
    assert program is not None, request.words
    sys.orig_argv[1:] = request.words
    _set_up_interpreter(program)
    preloaded.leave_out_others()
    for name in ("enter", "preloaded", "program", "server_imports", "fork_request", "sibling"):
        del sys.modules[name]

    program.run()
