"""Fork of a process for its parent: the new process is the parent's child, as if the parent had started it."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import socket
from pathlib import Path

__all__ = ["end_with_parent", "fork_sibling", "is_possible", "rename", "start_helper"]

_CLONE = {"x86_64": 56}  # number of the system call, whose arguments differ by machine
_CLONE_PARENT, _CLONE_CHILD_SETTID = 0x8000, 0x01000000
_PR_SET_PDEATHSIG, _PR_SET_MM = 1, 35
_MAP, _MAP_SIZE = 14, 15  # parts of PR_SET_MM
# Numbers of fields in /proc/self/stat.
_PLACES = {
    "start_code": 26, "end_code": 27, "start_stack": 28, "start_data": 45, "end_data": 46, "start_brk": 47,
    "arg_start": 48, "arg_end": 49, "env_start": 50, "env_end": 51,
}  # fmt: skip
_THREAD_BYTES = 2048  # of glibc's description of a thread, which holds its id
_HIGH_FD = 500

_kept: list[object] = []


def is_possible() -> bool:
    """Whether this machine and its kernel can."""
    size = ctypes.c_uint()
    known = ctypes.CDLL(None).prctl(_PR_SET_MM, _MAP_SIZE, ctypes.byref(size), 0, 0) == 0
    return platform.machine() in _CLONE and known and size.value == ctypes.sizeof(_MemoryMap)


def start_helper() -> socket.socket | None:
    """Fork a process that can fork siblings of this one's children; return its socket here, None there.

    It holds nothing open but its socket, at file descriptor 3, and ends with this process.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    parent = os.getpid()
    if os.fork():
        theirs.close()
        high = os.dup2(ours.fileno(), _HIGH_FD, inheritable=False)  # a program may expect the lowest numbers
        ours.close()
        return socket.socket(fileno=high)

    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # a terminal's are for the others
    end_with_parent(parent, signal.SIGKILL)
    rename([f"fork helper of {parent}"], {})
    ours.detach()
    null = os.open(os.devnull, os.O_RDWR)
    for fd, number in ((null, 0), (null, 1), (null, 2), (theirs.detach(), 3)):
        os.dup2(fd, number)

    os.closerange(4, os.sysconf("SC_OPEN_MAX"))
    return None


def fork_sibling() -> int:
    """Fork; the new process is a child of this one's parent. Return its id, 0 in itself. This one has no threads."""
    libc, python = ctypes.PyDLL(None), ctypes.pythonapi
    libc.syscall.restype = ctypes.c_long
    where = ctypes.c_void_p(_address_of_thread_id(libc))
    flags = ctypes.c_long(_CLONE_PARENT | _CLONE_CHILD_SETTID | signal.SIGCHLD)
    python.PyOS_BeforeFork()
    pid = libc.syscall(ctypes.c_long(_CLONE[platform.machine()]), flags, None, None, where, None)
    if pid:
        python.PyOS_AfterFork_Parent()
        assert pid > 0, "clone failed"
        return int(pid)

    python.PyOS_AfterFork_Child()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())
    return 0


def end_with_parent(parent: int, number: int) -> None:
    """Let the kernel signal this process when its parent, of that id, ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(128 + number)


def rename(words: list[str], environ: dict[str, str]) -> None:
    """Set what /proc, and so `ps` and psutil, show of this process."""
    stat = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    places = {name: int(stat[number - 3]) for name, number in _PLACES.items()}
    for name, parts in (("arg", words), ("env", [f"{name}={value}" for name, value in environ.items()])):
        block = ctypes.create_string_buffer(b"".join(os.fsencode(part) + b"\0" for part in parts))
        _kept.append(block)
        places[f"{name}_start"] = ctypes.addressof(block)
        places[f"{name}_end"] = ctypes.addressof(block) + len(block) - 1

    libc = ctypes.CDLL(None, use_errno=True)
    libc.sbrk.restype = ctypes.c_void_p
    memory = _MemoryMap(brk=libc.sbrk(0), exe_fd=-1, **places)
    size = ctypes.c_size_t(ctypes.sizeof(memory))
    assert libc.prctl(_PR_SET_MM, _MAP, ctypes.byref(memory), size, 0) == 0, os.strerror(ctypes.get_errno())


class _MemoryMap(ctypes.Structure):
    """`struct prctl_mm_map` of Linux."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in (
            "start_code", "end_code", "start_data", "end_data", "start_brk", "brk", "start_stack",
            "arg_start", "arg_end", "env_start", "env_end", "auxv",
        )),
        ("auxv_size", ctypes.c_uint32),
        ("exe_fd", ctypes.c_int32),
    )  # fmt: skip


def _address_of_thread_id(libc: ctypes.CDLL) -> int:
    """Return where glibc keeps the main thread's id: the kernel writes that of the new process there.

    It begins eight bytes, of which an address may have the id as its upper half: 32522 is 0x7f0a.
    """
    libc.pthread_self.restype = ctypes.c_void_p
    thread = libc.pthread_self()
    numbers = (ctypes.c_int * (_THREAD_BYTES // 4)).from_address(thread)
    [index] = [i for i in range(0, len(numbers), 2) if numbers[i] == os.getpid()]
    return int(thread) + 4 * index
