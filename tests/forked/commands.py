"""Folder of commands for shells, as bash scripts call them: each asks this process to fork what it stands for."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from contextlib import suppress
from itertools import count
from pathlib import Path

from tests.forked.client import Popen

__all__ = ["Commands"]

_COMMAND = """#!{python} -SI
import json, os, socket, sys
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
    sock.connect({address!r})
    request = [{words!r} + sys.argv[1:], os.getcwd(), dict(os.environ)]
    socket.send_fds(sock, [json.dumps(request).encode()], [0, 1, 2])
    status = int(sock.recv(32))
os.kill(os.getpid(), -status) if status < 0 else sys.exit(status)
"""
_numbers = count()


class Commands:
    """`python` and `traceml` in a folder that a test puts first in `PATH`.

    Args:
        folder: where they are written.
        new_session: start each process in a session of its own.
    """

    def __init__(self, folder: Path, *, new_session: bool = False) -> None:
        self.folder = folder
        self._new_session = new_session
        address = f"\0{__name__}-{os.getpid()}-{next(_numbers)}"
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sock.bind(address)
        self._sock.listen()
        folder.mkdir(exist_ok=True)
        for name, script in (("python", []), ("traceml", [str(Path(sys.executable).with_name("traceml"))])):
            text = _COMMAND.format(python=sys.executable, address=address, words=[sys.executable, *script])
            (folder / name).write_text(text)
            (folder / name).chmod(0o700)

        threading.Thread(target=self._serve, daemon=True).start()

    def path(self) -> str:
        """Return a value for `PATH`."""
        return f"{self.folder}{os.pathsep}{os.environ['PATH']}"

    def close(self) -> None:
        """Take no more requests."""
        self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self._sock.accept()
            except OSError:  # closed
                return

            threading.Thread(target=self._run, args=(sock,), daemon=True).start()

    def _run(self, sock: socket.socket) -> None:
        """Run what one command asks for; return its status to it."""
        with sock:
            data, fds, _, _ = socket.recv_fds(sock, 1 << 20, 3)
            words, folder, environ = json.loads(data)
            try:
                process = Popen(
                    words, cwd=folder, env=environ, stdin=fds[0], stdout=fds[1], stderr=fds[2],
                    start_new_session=self._new_session, forks=True,
                )  # fmt: skip
            finally:
                for fd in fds:
                    os.close(fd)

            status = process.wait()
            with suppress(BrokenPipeError):  # who gave the command was ended before
                sock.send(b"%d" % status)
