"""Memory for received values: private to the process, or a memory file that processes of one host share.

Process: launcher, agent and workers.
"""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING

from traceml.errors import PayloadError

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["LARGE_BYTES", "PayloadBuffer", "can_reach", "map_private", "path_of"]

# From this size on, processes of one host share a memory file instead of sending the bytes.
LARGE_BYTES = 1024 * 1024
_HUGE_PAGES_BYTES = 4 * 1024 * 1024


class PayloadBuffer:
    """Memory that a serialized value is received into.

    Args:
        shared: use a memory file, `fd`, which other processes can map (`map_private`); else private memory, for
            `load(buffer.memory())`.
    """

    def __init__(self, size_bytes: int, *, shared: bool = False) -> None:
        self.size_bytes = size_bytes
        self.received_bytes = 0
        self.fd: int | None = None
        self._memory: mmap.mmap | None = None
        if shared:
            self.fd = os.memfd_create("traceml-payload", os.MFD_CLOEXEC)
            os.ftruncate(self.fd, size_bytes)
            return

        self._memory = mmap.mmap(-1, max(1, size_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if size_bytes >= _HUGE_PAGES_BYTES:
            self._memory.madvise(mmap.MADV_HUGEPAGE)  # 500 MB in 4 KiB pages are 122,000 faults

    @classmethod
    def open_path(cls, path: str) -> PayloadBuffer:
        """Open the shared buffer of another process of this host, see `path`; it is complete.

        Raises:
            OSError: it cannot be opened.
        """
        found = cls.__new__(cls)
        found._memory, found.fd = None, os.open(path, os.O_RDWR | os.O_CLOEXEC)
        found.size_bytes = found.received_bytes = os.fstat(found.fd).st_size
        return found

    @property
    def path(self) -> str:
        """The path by which other processes of this host open a shared buffer, while it is open here."""
        return path_of(self.fd)

    @property
    def complete(self) -> bool:
        """Whether all bytes were received."""
        return self.received_bytes == self.size_bytes

    def feed(self, view: Buffer) -> None:
        """Add the next bytes.

        Raises:
            PayloadError: there are more than were announced.
        """
        view = memoryview(view)
        end = self.received_bytes + len(view)
        if end > self.size_bytes:
            raise PayloadError(f"a payload of {self.size_bytes} bytes has {end - self.size_bytes} bytes too many")

        if self._memory is not None:
            self._memory[self.received_bytes : end] = view
            self.received_bytes = end
            return

        assert self.fd is not None
        while self.received_bytes < end:
            n = os.pwrite(self.fd, view, self.received_bytes)
            self.received_bytes += n
            view = view[n:]

    def memory(self) -> mmap.mmap:
        """Return the received bytes, for `load`. Values loaded from them keep them alive.

        Raises:
            PayloadError: bytes are missing.
        """
        if not self.complete:
            raise PayloadError(f"only {self.received_bytes} of {self.size_bytes} bytes of a payload were received")

        if self._memory is None:
            assert self.fd is not None
            self._memory = mmap.mmap(self.fd, self.size_bytes)

        return self._memory

    def close(self) -> None:
        """Release the memory; values that were loaded from it remain valid."""
        self._memory = None
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    def __del__(self) -> None:
        # an open memory file keeps its memory, and a launch may end in many ways
        if getattr(self, "fd", None) is not None:
            self.close()


def path_of(fd: int | None) -> str:
    """Return the path by which other processes of this host open a memory file of this process."""
    return f"/proc/{os.getpid()}/fd/{fd}"


def can_reach(pid: int) -> bool:
    """Return whether memory files of the process `pid` can be opened here."""
    try:
        os.readlink(f"/proc/{pid}/exe")  # noqa: PTH115 - the kernel checks the same permission as for opening
    except OSError:
        return False

    return True


def map_private(fd: int) -> mmap.mmap:
    """Map a shared buffer copy-on-write: processes that map it share its pages until they write to them."""
    size = os.fstat(fd).st_size
    return mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
