"""State of a process in the kernel: running, waiting (for what) or stopped, CPU time, bytes."""

from __future__ import annotations

import functools
import operator
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from enum import StrEnum
from typing import NamedTuple

__all__ = [
    "DEAD_STATES",
    "HALTED_STATES",
    "AwaitedKind",
    "ProcessInfo",
    "Rate",
    "UsageRates",
    "WaitState",
    "ancestors_of",
    "awaited_descriptor",
    "children_of",
    "core_wait_ns",
    "current_syscall",
    "end_started_processes",
    "io_bytes",
    "is_job_suspended",
    "is_running",
    "process_info",
    "read_status",
    "read_text",
    "thread_cpu_ns",
    "thread_here",
    "threads_of",
    "tree_usage",
    "uncollected_status",
    "wait_state",
    "waits_with",
    "written_bytes",
]

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")  # as in `traceml.clock`: this module also runs alone, without the package
_open = open  # tests of a script replace the built-in one
_STREAMS = {0: "stdin", 1: "stdout", 2: "stderr"}
# System calls whose first argument is the descriptor that they wait for, and those that have a list of descriptors.
_ON_DESCRIPTOR = {
    "x86_64": {0, 1, 16, 17, 18, 19, 20, 42, 43, 44, 45, 46, 47, 72, 73, 74, 75, 288},
    "aarch64": {25, 29, 32, 63, 64, 65, 66, 67, 68, 82, 83, 202, 203, 206, 207, 211, 212, 242},
}
_POLLS = {"x86_64": (7, 271), "aarch64": (73,)}  # poll, ppoll
_SELECTS = {"x86_64": (23, 270), "aarch64": (72,)}  # select, pselect6
_SHORTEST_S = 0.1  # of a rate: the kernel counts CPU time in hundredths
_POLLED = struct.Struct("@i")
_MAX_SELECTED = 1024
# Calls that look a path up, by its argument: open, stat, lstat, access, openat, newfstatat, faccessat, statx.
_LOOKUPS = {
    "x86_64": {2: 0, 4: 0, 6: 0, 21: 0, 257: 1, 262: 1, 269: 1, 332: 1, 439: 1},
    "aarch64": {48: 1, 56: 1, 79: 1, 291: 1, 439: 1},
}
_MAX_PATH, _MEMORY_PAGE = 4096, 4096
_READS = {"x86_64": 0, "aarch64": 63}
_CONNECTING = "02"  # state of a connection in /proc/net/tcp
DEAD_STATES = ("Z", "X")
"""States of a process that has ended, as the kernel names them."""
HALTED_STATES = (*DEAD_STATES, "T", "t")
"""And of one that is stopped: neither runs until somebody lets it."""
_STOP_S, _STOP_POLL_S = 0.2, 0.001
_MAX_CHILDREN = 512
_CONDITION_BYTES = 32  # two threads that wait for one condition may do so at two words of it
_LOOKS, _LOOK_S = 40, 0.005


class ProcessInfo(NamedTuple):
    """A process or thread as /proc describes it."""

    pid: int
    parent: int
    state: str  # the letter that ps shows
    group: int = 0
    terminal: int = 0  # device number of its controlling terminal, 0 without one
    cpu_s: float = 0.0
    collected_s: float = 0.0  # CPU time of its children that have ended, and of theirs, once it has collected them


class AwaitedKind(StrEnum):
    """First word of `waits_on`, before an address or a path; other values of it are one word."""

    CONNECTION = "tcp"
    CONNECTING = "connect"
    LOCK = "lock"


class WaitState(NamedTuple):
    """State of a process's main thread."""

    state: str = "X"  # the letter that ps shows; X when the process is gone
    wchan: str = ""  # the kernel function in which it sleeps; empty while it runs, or if it may not be read
    # the file, pipe or socket of the descriptor that its system call waits for, or the path that it looks up; `stdin`,
    # `stdout` or `stderr` for these; `tcp ADDRESS:PORT` of the peer for a connection, `connect ADDRESS:PORT` until that
    # has answered; empty without one, or if it may not be read
    waits_on: str = ""
    is_terminal_input: bool = False
    tracer: int = 0  # process id of an attached debugger, 0 without one


def process_info(pid: int | str) -> ProcessInfo | None:
    """Return the facts of a process or thread, or None if there is none."""
    text = read_text(f"/proc/{pid}/stat")
    if not text:
        return None

    # the name, in brackets, may hold anything
    fields = text[text.rindex(")") + 2 :].split(None, 15)
    state, parent, group, terminal = fields[0], int(fields[1]), int(fields[2]), int(fields[4])
    cpu_s, collected_s = ((int(fields[at]) + int(fields[at + 1])) / _TICKS_PER_S for at in (11, 13))
    return ProcessInfo(int(pid), parent, state, group, terminal, cpu_s, collected_s)


def ancestors_of(pid: int) -> Iterator[ProcessInfo]:
    """Yield a process, its parent, and so on; those of other pid namespaces are not seen."""
    while (info := process_info(pid)) is not None:
        yield info
        pid = info.parent


def threads_of(pid: int) -> list[ProcessInfo]:
    """Return the threads of a process, the main one first; empty if it is gone."""
    found = (process_info(number) for number in sorted(map(int, _names(f"/proc/{pid}/task"))))
    return [each for each in found if each is not None]


def thread_cpu_ns(thread: int, pid: int | None = None) -> int | None:
    """Return the CPU time of a thread of a process, by default of this one; None if it is not known.

    Of this process it is exact, and cheap enough for every sample.
    """
    if pid is None:
        return _own_thread_cpu_ns(thread)

    fields = read_text(f"/proc/{pid}/task/{thread}/schedstat").split()
    return int(fields[0]) if fields else None


def _own_thread_cpu_ns(thread: int) -> int | None:
    """Read the clock of a thread, whose number Linux makes of the thread's id.

    Unlike `time.pthread_getcpuclockid`, which must not be called for a thread that has ended, it does no harm then.
    """
    if not thread:
        return None

    try:
        return time.clock_gettime_ns(~thread << 3 | 6)
    except OSError:  # the thread has ended
        return None


def core_wait_ns(task: str) -> int:
    """Return how long a thread, `PID` or `PID/task/TID`, has waited for a core; 0 if unknown."""
    fields = read_text(f"/proc/{task}/schedstat").split()
    return int(fields[1]) if len(fields) > 1 else 0


def read_status(pid: int, name: str, thread: int | None = None) -> str:
    """Return a field of a process's or thread's status file; empty without one.

    Args:
        name: the field's name, such as `SigCgt`.
        thread: one of its threads; by default the main one.
    """
    for line in read_text(f"/proc/{pid}/task/{thread or pid}/status").splitlines():
        field, _, value = line.partition(":")
        if field == name:
            return value.strip()

    return ""


def thread_here(pid: int, number: int) -> int | None:
    """Return a thread of a process by its number in the pid namespace of that process; None if there is none.

    That of a container differs from the one of this process.
    """
    numbers = {each: read_status(pid, "NSpid", each).split()[-1:] for each in map(int, _names(f"/proc/{pid}/task"))}
    return next((each for each, inner in numbers.items() if inner == [str(number)]), None)


def wait_state(pid: int) -> WaitState:
    """Return the state of a process's main thread; fields that may not be read have their default."""
    info = process_info(pid)
    if info is None:
        return WaitState()

    call = current_syscall(pid)
    descriptor = awaited_descriptor(pid, call)
    target = _target(pid, descriptor) if descriptor >= 0 else _looked_up(pid, call)
    reads_terminal = _waits_for_input(call) and target.startswith(("/dev/tty", "/dev/pts/"))
    return WaitState(
        info.state,
        read_text(f"/proc/{pid}/wchan").strip("0\n "),
        _STREAMS.get(descriptor, target),
        reads_terminal,
        int(read_status(pid, "TracerPid") or 0),
    )


def tree_usage(pid: int) -> tuple[float, int]:
    """Return the CPU seconds of a process and its descendants, and the bytes that they moved through the kernel.

    Those that have ended do not count.
    """
    cpu_s, moved = 0.0, 0
    for each in (pid, *_descendants(pid)):
        info = process_info(each)
        cpu_s += info.cpu_s if info is not None else 0.0
        moved += sum(io_bytes(each))

    return cpu_s, moved


class Rate:
    """Growth of a count per second, from one reading to the next."""

    def __init__(self) -> None:
        self._before: tuple[float, float] | None = None

    def read(self, count: float | None, now_s: float) -> float | None:
        """Return the growth since the last reading; None without one, where it was just now, or without a count."""
        before, self._before = self._before, (count, now_s) if count is not None else None
        if before is None or count is None or now_s - before[1] < _SHORTEST_S:
            return None

        return max(count - before[0], 0.0) / (now_s - before[1])


class UsageRates:
    """Cores, and bytes per second, that a process and its descendants use from one reading to the next.

    Args:
        idle_bytes: returns the bytes so far that do not count.
    """

    def __init__(self, pid: int, idle_bytes: Callable[[], int] = int) -> None:
        self._pid, self._idle_bytes = pid, idle_bytes
        self._cores, self._bytes = Rate(), Rate()

    def read(self) -> tuple[float | None, float | None]:
        """Return cores and bytes per second since the last reading; None without one, or where it was just now."""
        cpu_s, moved = tree_usage(self._pid)
        now_s = time.monotonic()
        cores, bytes_per_s = self._cores.read(cpu_s, now_s), self._bytes.read(moved - self._idle_bytes(), now_s)
        return cores and round(cores, 3), bytes_per_s and round(bytes_per_s, 1)


def children_of(pid: int) -> list[int]:
    """Return the ids of the processes that a process has started and that it has not collected yet."""
    threads = _names(f"/proc/{pid}/task")
    return [int(each) for thread in threads for each in read_text(f"/proc/{pid}/task/{thread}/children").split()]


def uncollected_status(pid: int) -> int | None:
    """Return how a child of this process has ended, as `subprocess` has it, and leave it to be collected.

    None if it runs, if it was collected, or for another process.
    """
    try:
        end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except OSError:
        return None

    if end is None:
        return None

    return end.si_status if end.si_code == os.CLD_EXITED else -end.si_status


def end_started_processes(pid: int) -> None:
    """Send SIGTERM to what a process has started, and to what these have; not to programs of another process group.

    These are the processes that a Ctrl-C would end, too. Some ignore the signal and end by themselves:
    multiprocessing's resource tracker removes shared memory first.
    """
    group = _group_of(pid)
    found: list[int] = []
    while new := [each for each in _descendants(pid) if each not in found and _group_of(each) == group]:
        _send(new, signal.SIGSTOP)  # so that they start no others that are not found
        _await_stopped(new)
        found += new

    _send(found, signal.SIGTERM)
    _send(found, signal.SIGCONT)


def _group_of(pid: int) -> int | None:
    info = process_info(pid)
    return info.group if info is not None else None


def _await_stopped(pids: Sequence[int]) -> None:
    """Wait for processes to stop: a fork that has begun is finished first. One that reads a dead disk does not stop."""
    until = time.monotonic() + _STOP_S
    while time.monotonic() < until:
        infos = [process_info(pid) for pid in pids]
        if all(info is None or info.state in HALTED_STATES for info in infos):
            break

        time.sleep(_STOP_POLL_S)


def _send(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(OSError):  # it has ended, or belongs to another user
            os.kill(pid, number)


def is_running(pid: int) -> bool:
    """Whether a process exists and has not ended; one that nobody has collected yet has."""
    info = process_info(pid)
    return info is not None and info.state not in DEAD_STATES


def io_bytes(process: int | str) -> tuple[int, int]:
    """Return the bytes that a process has read and written by system calls, without sockets; 0 if not readable.

    Args:
        process: its process id, or `PID/task/TID` for one of its threads.
    """
    words = read_text(f"/proc/{process}/io").split()
    return (int(words[1]), int(words[3])) if len(words) > 3 else (0, 0)  # rchar, wchar


def written_bytes(pid: int) -> int:
    """Return the bytes that a process and its descendants have written; those that have ended do not count."""
    return sum(io_bytes(each)[1] for each in (pid, *_descendants(pid)))


def is_job_suspended(info: ProcessInfo) -> bool:
    """Whether a stopped process was suspended at its terminal, with its whole process group."""
    if info.state != "T" or not info.terminal:
        return False

    numbers = (int(name) for name in os.listdir("/proc") if name.isdigit())  # noqa: PTH208 - names alone
    members = (each for number in numbers if (each := process_info(number)) is not None)
    return all(each.state == "T" for each in members if each.group == info.group and each.state not in "ZX")


def _descendants(pid: int) -> Iterable[int]:
    found: list[int] = []
    todo = [pid]
    while todo and len(found) < _MAX_CHILDREN:
        children = children_of(todo.pop())
        found += children
        todo += children

    return found


def current_syscall(thread: int) -> tuple[int, ...]:
    """Return the number of the system call that a thread is in, and its arguments; empty if it runs.

    Empty too if its calls may not be read.
    """
    words = read_text(f"/proc/{thread}/syscall").split()
    if len(words) < 2 or not words[0].isdigit():
        return ()

    return int(words[0]), *(int(word, 16) for word in words[1:7])


def waits_with(pid: int, thread: int) -> bool:
    """Whether a process's main thread waits for what one of its threads waits for: in one call, at one place in memory.

    Also where both wake now and then to look at it.
    """
    own: tuple[int, ...] = ()
    other: tuple[int, ...] = ()
    for _ in range(_LOOKS):
        own, other = current_syscall(pid) or own, current_syscall(thread) or other
        if own and other:
            return own[0] == other[0] and abs(own[1] - other[1]) < _CONDITION_BYTES

        time.sleep(_LOOK_S)

    return False


def awaited_descriptor(thread: int, call: Sequence[int]) -> int:
    """Return the only descriptor that a thread waits for; -1 without one.

    Args:
        call: its system call, as `current_syscall` returns it.
    """
    number, first, second, third, *_ = *call, -1, -1, -1, -1
    machine = os.uname().machine
    if number in _ON_DESCRIPTOR.get(machine, ()):
        return first

    if number in _SELECTS.get(machine, ()):
        return _selected(thread, min(first, _MAX_SELECTED), (second, third))

    return _polled(thread, first) if number in _POLLS.get(machine, ()) and second == 1 else -1


def _waits_for_input(call: Sequence[int]) -> bool:
    machine = os.uname().machine
    waits = (_READS.get(machine, -1), *_POLLS.get(machine, ()), *_SELECTS.get(machine, ()))
    return bool(call) and call[0] in waits  # readline waits in pselect6


def _polled(thread: int, address: int) -> int:
    """Return the descriptor of a `struct pollfd`; -1 if its thread has gone on and it is not there."""
    found = _memory(thread, address, _POLLED.size)
    return int(_POLLED.unpack(found)[0]) if found else -1


def _selected(thread: int, count: int, sets: Sequence[int]) -> int:
    """Return the only descriptor below `count` of these `fd_set`; -1 where there are several."""
    size = -(-count // 64) * 8
    words = [_memory(thread, address, size) for address in sets if address]
    bits = functools.reduce(operator.or_, (int.from_bytes(word, "little") for word in words), 0) & ((1 << count) - 1)
    return bits.bit_length() - 1 if bits.bit_count() == 1 else -1


def _memory(thread: int, address: int, size: int) -> bytes:
    """Return bytes of a thread's memory; empty if they are not there, or may not be read."""
    try:
        with open(f"/proc/{thread}/mem", "rb", buffering=0) as memory:
            found = os.pread(memory.fileno(), size, address)
    except (OSError, OverflowError):
        return b""

    return found if len(found) == size else b""


def _target(pid: int, descriptor: int) -> str:
    target = _link(f"/proc/{pid}/fd/{descriptor}")
    return (_peer(pid, target[8:-1]) if target.startswith("socket:[") else "") or target


def _looked_up(pid: int, call: Sequence[int]) -> str:
    """Return the path that a system call looks up; empty for another call, or if it may not be read."""
    at = _LOOKUPS.get(os.uname().machine, {}).get(call[0], -1) if call else -1
    if at < 0:
        return ""

    text = _text(pid, call[1 + at])
    return os.path.join(_link(f"/proc/{pid}/cwd"), text) if text else ""  # noqa: PTH118 - of a file that may not answer


def _text(thread: int, address: int) -> str:
    """Return the text in a thread's memory up to its zero byte; empty without one. What follows may be no memory."""
    found = b""
    while len(found) < _MAX_PATH and b"\0" not in found:
        more = _memory(thread, address + len(found), _MEMORY_PAGE - (address + len(found)) % _MEMORY_PAGE)
        if not more:
            return ""

        found += more

    return os.fsdecode(found.partition(b"\0")[0])


def _link(path: str) -> str:
    try:
        return os.readlink(path)  # noqa: PTH115 - a path of the kernel
    except OSError:
        return ""


def _peer(pid: int, inode: str) -> str:
    """Return `tcp ADDRESS:PORT` of the other end of a connection, or `connect ...`; empty for another socket."""
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in read_text(f"/proc/{pid}/net/{table}").splitlines()[1:]:
            words = line.split()
            if words[9:10] == [inode] and (port := int(words[2].rpartition(":")[2], 16)):
                kind = AwaitedKind.CONNECTING if words[3] == _CONNECTING else AwaitedKind.CONNECTION
                return f"{kind} {_address(words[2].rpartition(':')[0], family)}:{port}"

    return ""


def _address(digits: str, family: socket.AddressFamily) -> str:
    """Return an address that the kernel has written as words of four bytes in the order of the machine."""
    words = [int(digits[at : at + 8], 16) for at in range(0, len(digits), 8)]
    text = socket.inet_ntop(family, b"".join(word.to_bytes(4, sys.byteorder) for word in words))
    return f"[{text}]" if family is socket.AF_INET6 else text


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208 - names alone
    except OSError:
        return []


def read_text(path: str) -> str:
    """Return the text of a small file of the kernel; empty if it cannot be read."""
    try:
        with _open(path, "rb", buffering=0) as file:  # half the cost of a text file
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""
