"""The agent's client of the zygote: starts it, requests workers, ends it."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from traceml.launch.shared.descriptor_limit import soft_limit
from traceml.launch.shared.fd_socket import FdSocket
from traceml.launch.shared.launch_messages import (
    ChildEnded,
    FailedToFork,
    Fork,
    Forked,
    Message,
    ZygoteFailed,
    ZygoteReady,
    ZygoteSettings,
    ZygoteUp,
)
from traceml.launch.shared.package_import import import_code
from traceml.launch.shared.process_cleanup import MARK

__all__ = ["ZYGOTE_MESSAGES", "ZygoteClient", "ZygoteSpec"]

# Variables that the loader, Python or libraries read at start-up; a worker can set all others itself.
_STARTUP_PREFIXES = (
    "LD_", "PYTHON", "MALLOC_", "GLIBC_", "OMP_", "KMP_", "GOMP_", "MKL_", "OPENBLAS_", "TORCH", "PYTORCH", "ATEN_",
)  # fmt: skip
# Sourced in the folder of the job, as paths may be relative; a file with a syntax error is not sourced at all.
_SOURCE = """
cd -- "$1" || exit 97; file=$2; shift 2
[ -r "$file" ] || { echo "$file cannot be read"; exit 97; }
"$BASH" -n "$file" || exit 97
source "$file"
exec "$@"
"""
_KEPT_BYTES = 64 * 1024
ZYGOTE_MESSAGES: Sequence[type[Message]] = (ZygoteUp, ZygoteReady, ZygoteFailed, Forked, FailedToFork, ChildEnded)


class ZygoteSpec(NamedTuple):
    """The environment and imports of a zygote."""

    env: Mapping[str, str]  # variables, over the agent's own unless `is_whole`
    env_file: str | None  # a file that bash sources before it starts
    sys_path: tuple[str, ...]  # folders that are searched for modules first
    need_torch: int  # see `Prepare`
    folder: str = "/"  # the working directory for that
    stamp: tuple[int, ...] = ()  # changes when env_file changes
    is_whole: bool = False  # whether `env` is the whole environment

    @property
    def environ(self) -> dict[str, str]:
        """The variables before env_file is sourced."""
        return {**({} if self.is_whole else os.environ), **self.env}

    def serves(self, other: ZygoteSpec) -> bool:
        """Return whether a zygote of this spec can make workers of another."""
        if (self.env_file, self.stamp) != (other.env_file, other.stamp) or other.need_torch > self.need_torch:
            return False

        if self.env_file is not None:  # the effect of other variables on the script is unknown
            return (self.env, self.folder) == (other.env, other.folder)

        return _startup_variables(self.env) == _startup_variables(other.env)


class ZygoteClient:
    """A zygote, as the agent uses it.

    Args:
        mark: marks the processes of its workers.
        descriptors: its soft limit of open files, and so that of its workers.

    Attributes:
        up: whether Python has started there.
        ready: its message that torch is imported, or None.
        output: the beginning of its output.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        spec: ZygoteSpec,
        *,
        mark: str,
        descriptors: int,
        on_message: Callable[[Message], None],
        on_output: Callable[[bytes], None],
    ) -> None:
        self.spec, self.mark = spec, mark
        self.ready: ZygoteReady | None = None
        self.up = self.gone = False
        self.output = b""
        self._selector, self._on_message, self._on_output = selector, on_message, on_output
        self._socket, theirs = FdSocket.pair()
        self._read_fd, write_fd = os.pipe()
        os.set_blocking(self._read_fd, False)
        try:
            with soft_limit(descriptors):
                self.pid = self._spawn(theirs, write_fd)
        finally:
            theirs.close()
            os.close(write_fd)

        with contextlib.suppress(ConnectionError):  # it has ended already, as env_file may do: that is noticed soon
            self._socket.send(
                ZygoteSettings(parent=os.getpid(), mark=mark, sys_path=list(spec.sys_path), need_torch=spec.need_torch)
            )

        selector.register(self._socket.fileno(), selectors.EVENT_READ, self._receive)
        selector.register(self._read_fd, selectors.EVENT_READ, self._read)

    def fork(self, request: Fork, fds: list[int]) -> None:
        """Request a worker, which gets these descriptors.

        Raises:
            OSError: the zygote is gone.
        """
        self._socket.send(request, fds)

    def worker_variables(self, spec: ZygoteSpec) -> tuple[dict[str, str], list[str]]:
        """Return the variables that workers of `spec` must set and remove, as the zygote may have others."""
        if spec.env_file is not None:
            return {}, []

        before, after = self.spec.env, spec.env
        changed = {name: value for name, value in after.items() if before.get(name) != value}
        return changed, [name for name in before if name not in after]

    def close(self) -> None:
        """Kill it; its workers end with it."""
        if not self.gone:
            self._disconnect()

        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)

    def _spawn(self, theirs: FdSocket, write_fd: int) -> int:
        fd = theirs.fileno()
        os.set_inheritable(fd, True)
        code = import_code() + f"from traceml.launch.worker.zygote import main\nmain({fd})\n"
        code_fd = _pipe_with(code.encode())
        read = f"f=open({code_fd});code=f.read();f.close();exec(code)"
        command = [sys.executable, "-c", read, "traceml-workers"]  # as process lists show it
        if self.spec.env_file is not None:
            import shutil  # with compressors of archives

            bash = shutil.which("bash") or "/bin/bash"
            command = [bash, "-c", _SOURCE, "bash", self.spec.folder, self.spec.env_file, *command]

        actions: list[Any] = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, write_fd, 1),
            (os.POSIX_SPAWN_DUP2, write_fd, 2),
        ]
        try:
            return os.posix_spawn(command[0], command, {**self.spec.environ, MARK: self.mark}, file_actions=actions)
        finally:
            os.close(code_fd)

    def _receive(self, _events: int) -> None:
        try:
            while not self.gone and (received := self._socket.receive(*ZYGOTE_MESSAGES, wait=False)) is not None:
                message = received[0]
                if isinstance(message, ZygoteUp):
                    self.up = True
                elif isinstance(message, ZygoteReady):
                    self.ready = message

                self._on_message(message)
        except EOFError:
            self._disconnect()

    def _read(self, _events: int) -> None:
        try:
            data = os.read(self._read_fd, 65536)
        except BlockingIOError:
            return

        if data:
            self.output = (self.output + data)[:_KEPT_BYTES]
            self._on_output(data)
        else:
            self._selector.unregister(self._read_fd)
            os.close(self._read_fd)
            self._read_fd = -1

    def _disconnect(self) -> None:
        self.gone = True
        self._selector.unregister(self._socket.fileno())
        self._socket.close()
        while self._read_fd >= 0:  # read the rest of its output
            before = len(self.output)
            self._read(0)
            if len(self.output) == before:
                break

        if self._read_fd >= 0:
            self._selector.unregister(self._read_fd)
            os.close(self._read_fd)
            self._read_fd = -1


def _pipe_with(data: bytes) -> int:
    """Return the read end of a pipe that holds some kilobytes; a child process inherits it."""
    read_fd, write_fd = os.pipe()
    os.write(write_fd, data)
    os.close(write_fd)
    os.set_inheritable(read_fd, True)
    return read_fd


def _startup_variables(env: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if name.startswith(_STARTUP_PREFIXES)}
