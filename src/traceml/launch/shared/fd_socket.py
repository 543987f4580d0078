"""Messages with file descriptors between the processes of one host: agent, zygote and workers.

Process: agent, zygote and workers.
"""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Sequence

import msgpack

from traceml.errors import ProtocolError
from traceml.launch.shared.launch_messages import M, Message, decode
from traceml.trusted_files import GuardedDescriptor

__all__ = ["FdSocket"]

_MAX_FDS = 64
_INLINE_BYTES = 32 * 1024  # larger messages are sent as a memory file
_BIG = b"\xc1"  # no msgpack value begins with this byte


class FdSocket:
    """One end of a private unix socket that preserves message boundaries.

    A worker's function may close its descriptor, and open one of its own with the same number.
    """

    __slots__ = ("_own", "_socket")

    def __init__(self, sock: socket.socket) -> None:
        self._socket, self._own = sock, GuardedDescriptor(sock.fileno())

    @classmethod
    def pair(cls) -> tuple[FdSocket, FdSocket]:
        """Return two connected ends; started programs inherit neither."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(ours), cls(theirs)

    @classmethod
    def from_fd(cls, fd: int) -> FdSocket:
        """Return the end with the descriptor `fd`."""
        return cls(socket.socket(fileno=fd))

    def fileno(self) -> int:
        """Return the descriptor to wait on."""
        return self._socket.fileno()

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send a message, and copies of descriptors.

        Raises:
            OSError: the other end is closed, or this one (EBADF).
        """
        body = msgpack.packb(message.to_map(), unicode_errors="surrogateescape")
        if len(body) <= _INLINE_BYTES:
            self._send(body, fds)
            return

        memory = os.memfd_create("traceml-message")
        try:
            with open(memory, "wb", closefd=False) as file:
                file.write(body)

            self._send(_BIG, [memory, *fds])
        finally:
            os.close(memory)

    def receive(self, *kinds: type[M], wait: bool = True) -> tuple[M, list[int]] | None:
        """Return the next message and its descriptors; None when there is none and `wait` is False.

        Args:
            kinds: the messages that the other end sends.

        Raises:
            EOFError: the other end is closed.
            OSError: this end is closed (EBADF).
            ProtocolError: the message is none of these.
        """
        try:
            body, fds = self._receive(0 if wait else socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except ConnectionError as error:
            raise EOFError(str(error)) from error

        if not body:
            raise EOFError("the other end is closed")

        if body == _BIG:
            with os.fdopen(fds.pop(0), "rb") as file:
                file.seek(0)
                body = file.read()

        fields = msgpack.unpackb(body, strict_map_key=False, unicode_errors="surrogateescape")
        if (message := decode(fields, kinds)) is None:
            raise ProtocolError(f"an unexpected message {fields.get('t')!r}")

        return message, fds

    def close(self) -> None:
        """Close this end."""
        self._socket.detach()
        self._own.close()

    def _send(self, body: bytes, fds: Sequence[int]) -> None:
        self._own.check()
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self._socket.sendmsg([body], ancillary, socket.MSG_NOSIGNAL)

    def _receive(self, flags: int) -> tuple[bytes, list[int]]:
        self._own.check()
        fds = array.array("i")
        room = socket.CMSG_SPACE(_MAX_FDS * fds.itemsize)
        body, ancillary, _, _ = self._socket.recvmsg(_INLINE_BYTES, room, flags | socket.MSG_CMSG_CLOEXEC)
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])

        return body, fds.tolist()
