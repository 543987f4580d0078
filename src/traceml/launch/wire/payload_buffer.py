"""Memory that parcels arrive in: a process's own, or a file in memory that all processes of a host can map."""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING

from traceml.errors import PayloadError

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["LARGE_BYTES", "PayloadBuffer", "can_reach", "map_private", "path_of"]

# From this size on, processes of one host hand each other a file in memory, and not its bytes.
LARGE_BYTES = 1024 * 1024
_HUGE_PAGES_BYTES = 4 * 1024 * 1024


class PayloadBuffer:
    """Memory that a parcel is received into.

    Args:
        size_bytes: the parcel's size.
        shared: keep it in a file in memory, `fd`, which other processes can map (`map_private`); else in this
            process's own memory, for `load(receiver.memory())`.
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
    def of(cls, path: str) -> PayloadBuffer:
        """Return a complete one over a shared parcel of another process of this host, see `path`.

        Raises:
            OSError: it cannot be opened.
        """
        found = cls.__new__(cls)
        found._memory, found.fd = None, os.open(path, os.O_RDWR | os.O_CLOEXEC)
        found.size_bytes = found.received_bytes = os.fstat(found.fd).st_size
        return found

    @property
    def path(self) -> str:
        """Where other processes of this host find a shared parcel, while it is open here."""
        return path_of(self.fd)

    @property
    def complete(self) -> bool:
        """Whether all has come."""
        return self.received_bytes == self.size_bytes

    def feed(self, view: Buffer) -> None:
        """Take the next bytes.

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
        """Return the received bytes, for `load`; values loaded from them keep them alive.

        Raises:
            PayloadError: something is missing.
        """
        if not self.complete:
            raise PayloadError(f"only {self.received_bytes} of {self.size_bytes} bytes of a payload came")

        if self._memory is None:
            assert self.fd is not None
            self._memory = mmap.mmap(self.fd, self.size_bytes)

        return self._memory

    def close(self) -> None:
        """Let go of the memory; values that were loaded from it live on."""
        self._memory = None
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    def __del__(self) -> None:
        # an open file in memory keeps all of it, and a launch may end in many ways
        if getattr(self, "fd", None) is not None:
            self.close()


def path_of(fd: int | None) -> str:
    """Return the path by which other processes of this host reach an open file in memory."""
    return f"/proc/{os.getpid()}/fd/{fd}"


def can_reach(pid: int) -> bool:
    """Return whether files in memory of the process `pid` can be opened here."""
    try:
        os.readlink(f"/proc/{pid}/exe")  # noqa: PTH115 - asks the kernel what opening would ask
    except OSError:
        return False

    return True


def map_private(fd: int) -> mmap.mmap:
    """Map a shared parcel: its pages are those of all other processes that map it, until this one writes to them."""
    size = os.fstat(fd).st_size
    return mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
