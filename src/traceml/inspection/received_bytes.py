"""Bytes that arrive on a connection: a thread that waits for a slow server makes progress, though no line changes."""

from __future__ import annotations

import ctypes
import functools
import socket
import sys

from traceml.inspection.kernel_state import awaited_descriptor, current_syscall

__all__ = ["received_bytes"]

_RECEIVED_AT, _INFO_BYTES = 128, 136  # `tcpi_bytes_received` of struct tcp_info


def received_bytes(thread: int) -> int:
    """Return the bytes that have arrived on the TCP connection that a thread of this process waits for; 0 without one.

    Args:
        thread: the kernel's id of the thread.
    """
    descriptor = awaited_descriptor(thread, current_syscall(thread)) if sys.platform == "linux" else -1
    if descriptor < 0:
        return 0

    info, size = ctypes.create_string_buffer(_INFO_BYTES), ctypes.c_uint32(_INFO_BYTES)
    # By the C function: a socket object of Python may change the socket's mode.
    failed = _libc().getsockopt(descriptor, socket.IPPROTO_TCP, socket.TCP_INFO, info, ctypes.byref(size))
    return 0 if failed or size.value < _INFO_BYTES else int.from_bytes(info.raw[_RECEIVED_AT:], sys.byteorder)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
