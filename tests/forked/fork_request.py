"""Requests to a process that forks, made from the options of `subprocess.Popen`."""

from __future__ import annotations

import inspect
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

if __package__:
    from tests.forked.program import Program
else:  # in the process that forks, which knows nothing of the tests
    from program import Program

__all__ = [
    "APPLIED_LATER",
    "Request",
    "can_be_forked",
    "fork_as_siblings",
    "note_started",
    "number_from",
    "read_at_start",
    "send",
]

# Read when the interpreter or a shared module starts: what differs from the server's asks for a new interpreter.
_READ_AT_START = ("PYTHON", "LC_", "LANG", "LD_", "MALLOC_", "OMP_", "MKL_", "KMP_", "GOMP_", "OPENBLAS_", "TORCH_")
_PLAIN = {"executable": None, "shell": False, "process_group": -1, "umask": -1, "uid": None}
_PIPES = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
APPLIED_LATER = {"PYTHONPATH", "PYTHONWARNINGS", "PYTHONUNBUFFERED", "TORCH_DEVICE_BACKEND_AUTOLOAD"}
# By importing torch or scikit-learn in this process, and by torchrun, which means a process group.
_SET_BY_LIBRARIES = {"KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK", "TORCH_NCCL_ASYNC_ERROR_HANDLING"}
# Modules that import much, of all that `traceml run`, aggregators and torchrun start; and those that start others.
_STARTERS = {"mlflow", "traceml", "traceml.supervise.elastic", "torch.distributed.run"}
_IMPORT_MUCH = ("from multiprocessing.spawn ", "from multiprocessing.forkserver ", "import torch")  # code of `-c`
_LARGE = _STARTERS | {"alembic", "traceml.display.report_main", "traceml.track.delivery", "uvicorn"}

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Request:
    """Python process to start.

    Attributes:
        words: the interpreter's arguments.
        folder: working directory.
        environ: all of its environment.
        new_session: start it in a session of its own.
        fds: the numbers that its file descriptors shall have.
        forks: its own Python processes that import much are forked too.
        death_signal: signal that it gets when its parent ends; 0: none.
        inside: process whose namespaces it enters; 0: none.
    """

    words: list[str]
    folder: str
    environ: dict[str, str]
    new_session: bool
    fds: list[int] = field(default_factory=list)
    forks: bool = False
    death_signal: int = 0
    inside: int = 0

    @classmethod
    def from_options(cls, options: Options, *, forks: bool = False, death_signal: int = 0, inside: int = 0) -> Request:
        """Read the arguments of `Popen._execute_child`."""
        return cls(
            words=[os.fspath(each) for each in options["args"]][1:],
            folder=str(Path(options["cwd"] or ".").absolute()),
            environ=dict(os.environ if options["env"] is None else options["env"]),
            new_session=options["start_new_session"],
            fds=[0, 1, 2, *options["pass_fds"]],
            forks=forks,
            death_signal=death_signal,
            inside=inside,
        )


def can_be_forked(options: Options, mine: Mapping[str, str]) -> bool:
    """Whether a process with these options, forked from one with an environment of mine, is as a new one."""
    if os.fspath(options["args"][0]) != sys.executable or any(options[name] != value for name, value in _PLAIN.items()):
        return False

    request = Request.from_options(options)
    program = Program.parse(request.words)
    if program is None or not (program.kind or Path(request.folder, program.target).is_file()):
        return False

    return read_at_start(request.environ) == read_at_start(mine)


def read_at_start(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that must be the same in a process and in the one that it is forked from."""
    later = APPLIED_LATER | _SET_BY_LIBRARIES
    return {name: value for name, value in environ.items() if name.startswith(_READ_AT_START) and name not in later}


def send(sock: socket.socket, request: Request, options: Options) -> tuple[int, int]:
    """Ask for a process; return its id, and a pipe that yields its wait status if it is no child of this one."""
    streams = [options[name] for name in ("p2cread", "c2pwrite", "errwrite")]
    fds = [i if fd == -1 else fd for i, fd in enumerate(streams)] + list(options["pass_fds"])
    status, theirs = os.pipe()
    try:
        socket.send_fds(sock, [json.dumps(asdict(request)).encode()], [theirs, *fds])
    finally:
        os.close(theirs)

    return number_from(status), status


def number_from(pipe: int) -> int:
    """Read a number from the process that forks."""
    line = b""
    while not line.endswith(b"\n"):  # and no more: the status of a process that has ended already comes next
        part = os.read(pipe, 1)
        assert part, "the process that forks is gone: see above for what it said"
        line += part

    return int(line)


def note_started(process: Any, pid: int, options: Options) -> None:
    """Do the rest of what `Popen._execute_child` does."""
    process.pid = pid
    process._child_created = True
    process._close_pipe_fds(*(options[name] for name in _PIPES))


def fork_as_siblings(sock: socket.socket) -> None:
    """Let this process fork the programs that import much which it starts, by the process at the socket."""
    mine = dict(os.environ)

    def fork(options: Options, death_signal: int) -> int:
        """Return the id of a new process; 0: it cannot be forked, or imports little."""
        program = Program.parse([os.fspath(each) for each in options["args"]][1:])
        if program is None or not _is_large(program) or not can_be_forked(options, mine):
            return 0

        forks = program.kind != "-m" or program.target in _STARTERS
        pid, status = send(sock, Request.from_options(options, forks=forks, death_signal=death_signal), options)
        os.close(status)
        return pid

    _fork_of_subprocess(fork)
    if "multiprocessing.util" in sys.modules:
        _fork_of_multiprocessing(fork)


def _is_large(program: Program) -> bool:
    return program.kind in ("", "-ISc") or program.target in _LARGE or program.target.startswith(_IMPORT_MUCH)


def _fork_of_subprocess(fork: Callable[[Options, int], int]) -> None:
    original: Callable[..., None] = subprocess.Popen._execute_child
    bound = inspect.signature(original).bind

    def execute(self: subprocess.Popen[Any], *values: Any) -> None:
        options = bound(self, *values).arguments
        setup = options["preexec_fn"]
        number = 0 if setup is None else inspect.getclosurevars(setup).nonlocals.get("death_signal", -1) or 0
        if number >= 0 and (pid := fork(options, int(number))):
            note_started(self, pid, options)
        else:
            original(self, *values)

    subprocess.Popen._execute_child = execute  # type: ignore[method-assign, assignment]


def _fork_of_multiprocessing(fork: Callable[[Options, int], int]) -> None:
    util: Any = sys.modules["multiprocessing.util"]
    original = util.spawnv_passfds
    inherited = _PLAIN | dict.fromkeys(_PIPES, -1) | {"cwd": None, "env": None, "start_new_session": False}

    def spawn(path: str, args: Sequence[str], passfds: Sequence[int]) -> int:
        options = {"args": [os.fsdecode(each) for each in args], "pass_fds": sorted(passfds), **inherited}
        return fork(options, 0) or original(path, args, passfds)

    util.spawnv_passfds = spawn
