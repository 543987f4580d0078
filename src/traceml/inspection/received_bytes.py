"""Bytes that arrive on a connection: a thread that waits for a slow server makes progress, though no line changes."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import socket
import struct
import sys

from traceml.inspection.kernel_state import current_syscall

__all__ = ["received_bytes"]

# System calls that wait for one socket, by its descriptor, and those that wait for a list of descriptors.
_RECEIVES = {"x86_64": (0, 45, 47), "aarch64": (63, 207, 212)}  # read, recvfrom, recvmsg
_POLLS = {"x86_64": (7, 271), "aarch64": (73,)}  # poll, ppoll
_RECEIVED_AT, _INFO_BYTES = 128, 136  # `tcpi_bytes_received` of struct tcp_info
_POLLED = struct.Struct("@i")


def received_bytes(thread: int) -> int:
    """Return the bytes that have arrived on the TCP connection that a thread of this process waits for; 0 without one.

    Args:
        thread: the kernel's id of the thread.
    """
    descriptor = _awaited(thread) if sys.platform == "linux" else -1
    if descriptor < 0:
        return 0

    info, size = ctypes.create_string_buffer(_INFO_BYTES), ctypes.c_uint32(_INFO_BYTES)
    # By the C function: a socket object of Python may change the socket's mode.
    failed = _libc().getsockopt(descriptor, socket.IPPROTO_TCP, socket.TCP_INFO, info, ctypes.byref(size))
    return 0 if failed or size.value < _INFO_BYTES else int.from_bytes(info.raw[_RECEIVED_AT:], sys.byteorder)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _awaited(thread: int) -> int:
    """Return the only descriptor that a thread waits for; -1 without one."""
    call, first, count, *_ = *current_syscall(thread), -1, -1, -1
    machine = platform.machine()
    if call in _RECEIVES.get(machine, ()):
        return first

    return _polled(first) if call in _POLLS.get(machine, ()) and count == 1 else -1


def _polled(address: int) -> int:
    """Return the descriptor of a `struct pollfd`; -1 if its thread has gone on and it is not there."""
    try:
        with open("/proc/self/mem", "rb", buffering=0) as memory:
            return int(_POLLED.unpack(os.pread(memory.fileno(), _POLLED.size, address))[0])
    except (OSError, OverflowError, struct.error):
        return -1
