"""Snapshots of ranks that make no progress: the rows that a hang is diagnosed from.

A *snapshot* describes one rank at one moment in which it has made no progress for some seconds. The rank takes it;
where it cannot answer, another process of its host does. It is a row of the log `info` of that rank (`{"kind":
"snapshot", "t_ns": ..., ...}`), or, where another process took it, an event of the run of the kind `snapshot` with the
same map and the number of the rank's stream (`stream`). The live verdict, the report and all other
readers get the same map.

Values that are not known are left out of the row and have their default here. A reader ignores keys that it does not
know and values of another type: rows may come from a newer version, or from a rank that was dying.

Process: the rank makes snapshots; the aggregator and readers read them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, Self

from traceml.database.info_kinds import InfoKind
from traceml.formatting import line_text
from traceml.inspection.kernel_state import ProcessInfo, WaitState, is_job_suspended

__all__ = [
    "ABORT",
    "BUSY_CORES",
    "MAX_FRAMES",
    "MAX_THREADS",
    "SNAPSHOT",
    "FrameSnapshot",
    "GroupSnapshot",
    "ProcessSnapshot",
    "RankSnapshot",
    "ThreadSnapshot",
    "WorkerSnapshot",
    "user_line",
]

SNAPSHOT = InfoKind.SNAPSHOT.value
"""Kind of the row, and of the event."""
ABORT = "abort"
"""Kind of the event of a job that was found to hang, and is ended for that."""
MAX_FRAMES = 40
"""Frames of a stack that are kept, the innermost ones."""
MAX_THREADS = 4
"""Other threads that are kept."""
BUSY_CORES = 0.2
"""A process that uses at least this many cores computes."""


class _Record:
    """A part of a snapshot as a map of plain values."""

    __slots__ = ()

    def to_row(self) -> dict[str, Any]:
        """Return the values that differ from their default."""
        values = ((each.name, getattr(self, each.name), each) for each in fields(self))  # type: ignore[arg-type]
        return {name: _plain(value) for name, value, each in values if value != each.default}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """Return what a map holds; unknown keys and values of another type are ignored."""
        known = ((each, row[each.name]) for each in fields(cls) if each.name in row)  # type: ignore[arg-type]
        read = {each.name: _read(each, value) for each, value in known}
        return cls(**{name: value for name, value in read.items() if value is not _BAD})


_BAD = object()
_BUSY_BYTES_PER_S = 10_000
_POLLING_CORES = 0.01  # a look every 0.1 s takes 0.0005; an evaluation that sleeps after each batch, 0.03


def _of(kind: type, default: Any = None) -> Any:
    """Declare a field: of a type or None; with a tuple as default, a tuple of that type."""
    return field(default=default, metadata={"of": kind})


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameSnapshot(_Record):
    """One frame of a Python stack.

    Attributes:
        file: path of the source file as in the code object.
        line: the line that runs, from 1; 0 if not known.
        function: name of the function, qualified where it is known.
        is_user: whether the user wrote it: not the standard library, an installed package, torch or traceml.
    """

    file: str = ""
    line: int = 0
    function: str = ""
    is_user: bool = False

    @property
    def place(self) -> str:
        """The line in words: `train.py:23 update_metric`."""
        return line_text(self.file, self.line, self.function)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSnapshot(_Record):
    """The newest operation of a rank in one process group; of several collectives in flight at the end, the first one.

    Attributes:
        name: the group's name; empty for the default group.
        members: global ranks of the group, ascending; empty where it has all ranks.
        number: number of that collective in this group, counted by torch's flight recorder (or by us where
            there is none); 0 before the first. Equal numbers of two ranks are the same collective.
        operation: its name without the backend: `all_reduce`, `barrier`, `send`; empty if not known.
        sizes: elements of each input tensor.
        in_flight: whether it is issued and not complete. A collective that nobody waits for can be in flight: the stack
            shows whether the rank waits.
        is_p2p: whether the operation is a send or a receive; then `number` counts those.
        peer: global rank that a send or receive is with, or the root of a collective; None if not known.
    """

    name: str = ""
    members: tuple[int, ...] = _of(int, ())
    number: int = 0
    operation: str = ""
    sizes: tuple[int, ...] = _of(int, ())
    in_flight: bool = False
    is_p2p: bool = False
    peer: int | None = _of(int)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSnapshot(_Record):
    """A process for which one waits: a child, or the holder of a file's lock, which may be the one that waits.

    It may be a child that has ended, from which data are awaited all the same.

    Attributes:
        pid: its process id; 0 for a process of a Pool that has replaced it.
        is_self: whether it is the one that waits.
        rank: the rank that it is, which a reader adds; None for another process.
        name: its program; empty if not known.
        state: letter of the kernel, see `WorkerSnapshot.state`.
        wchan: name of the kernel function in which it sleeps.
        waits_on: file or pipe that its system call waits for.
        end: how it has ended, as `process_ends.exit_text`; empty while it runs.
    """

    pid: int = 0
    is_self: bool = False
    rank: int | None = _of(int)
    name: str = ""
    state: str = ""
    wchan: str = ""
    waits_on: str = ""
    end: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadSnapshot(_Record):
    """Another thread of the rank: one that runs the user's code or a collective, that its end waits for, or has failed.

    Attributes:
        name: its name; empty if a library has started it in C.
        line: innermost frame of the user's code, if it runs that, or where it has failed.
        is_daemon: whether the interpreter ends without waiting for it.
        exception: that has ended it, `Type: message`; empty while it runs.
        collective: function of torch.distributed that it is in; empty if in none.
    """

    name: str = ""
    line: FrameSnapshot | None = field(default=None, metadata={"of": FrameSnapshot})
    is_daemon: bool = False
    exception: str = ""
    collective: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSnapshot(_Record):
    """A worker process of the rank's data loader.

    Attributes:
        index: its number in the loader, from 0.
        pid: its process.
        state: letter of the kernel: R, S, D, T, Z; empty if not known, X when the process is gone.
        wchan: name of the kernel function in which it sleeps.
        waits_on: file or pipe that its system call waits for.
        cpu_share: cores that it has used since the snapshot before; None if not known.
        frames: its Python stack, the innermost frame first.
        waits_for_batch: number of the batch that the rank waits for from this worker; None when it is not that worker.
        start_method: `fork`, `spawn` or `forkserver`; empty if not known.
        blocker: the process that it waits for; None if there is none, or that is not known.
    """

    index: int = 0
    pid: int = 0
    state: str = ""
    wchan: str = ""
    waits_on: str = ""
    cpu_share: float | None = _of(float)
    frames: tuple[FrameSnapshot, ...] = _of(FrameSnapshot, ())
    waits_for_batch: int | None = _of(int)
    start_method: str = ""
    blocker: ProcessSnapshot | None = field(default=None, metadata={"of": ProcessSnapshot})


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSnapshot(_Record):
    """A rank without progress at one moment.

    Attributes:
        at_ns: monotonic timestamp of the snapshot, by the clock of the rank's host.
        rank: the rank.
        pid: its process; 0 if not known.
        quiet_s: seconds since its last progress: a row, batch, forward, collective, moved user stack, output, or byte
            of a checkpoint.
        step: the open training step, else the last one that has ended; -1 before the first.
        in_step: whether that step is open.
        phase: the open phase of the step; else `other` in a step, `outside` between steps, `startup` before the first
            one, `evaluation`, or `exit` when the process has begun to end.
        answered: source of the stack: `recorder` (the rank's own thread), `signal` (faulthandler, as the rank's thread
            was silent), `kernel` (no stack, only the process's state), `none`; `rows` where a reader has made it of a
            rank's last rows.
        frames: Python stack of the training thread, the innermost frame first, at most `MAX_FRAMES`.
        user_line: innermost frame of the user's code, also where `frames` does not reach it.
        line_id: id in `names` of the user's line that was sampled last, if there is no stack; else -1.
        seen_line: that line, which a reader adds.
        outer_line: outermost frame of the user's code, where it differs: libraries that own the loop lie between them.
        process_state: letter of the kernel for the main thread: R, S, D, T (stopped by a signal), t (by a debugger), Z.
        wchan: name of the kernel function in which the main thread sleeps.
        waits_on: what the descriptor of its system call is: a path, `pipe:[...]`, `socket:[...]`, `tcp ADDRESS:PORT` of
            the peer, `connect ADDRESS:PORT` until that has answered, `lock PATH` of a lock file that it looks at
            again and again, `stderr`, `stdin`.
        blocker: the process that the training thread waits for; None if there is none, or that is not known.
        cpu_share: cores that the rank and its children have used since the snapshot before; None if not known.
        thread_share: cores that the training thread has used meanwhile; None if not known.
        io_bytes_per_s: bytes that they have read and written; None if not known.
        has_output: whether threads other than the training thread have written a little since the last progress.
        is_waiting_for_gil: whether the training thread waits for the GIL, which another thread holds in a call into C.
        is_gil_held: whether the rank did not answer as its recorder asks for the GIL, which a call into C holds.
        is_waiting_for_terminal: whether the main thread reads from a terminal.
        is_debugged: whether a debugger is attached or in the stack.
        is_suspended: whether the whole process group was stopped by job control.
        is_idle_notebook: whether it is a notebook in which no cell runs.
        is_compiling: whether torch.compile is in the stack.
        uses_device: whether the script uses CUDA: a thread that waits for the device uses a core, as if it computed.
        batches: batches that the training data loader has given, in all epochs; -1 if not known.
        epoch: number of the iteration over that loader, from 1; 0 before the first, or if not known.
        data_ended: whether it has no batch left in this epoch.
        sequence: number of collectives of the default group as `STEPS.bits` counts them; -1 if not known.
        groups: newest operation by process group.
        workers: workers of the data loader that is being read.
        handled: exception that the training thread is handling, in `except` or `finally`, `Type: message`; else empty.
        raised_line: innermost frame of the user's code where it was raised.
        threads: other threads: those that an exception has ended, and those that run the user's code or a collective,
            the ones without which the interpreter does not end first; at most `MAX_THREADS` of each.
        ended: whether the rank has made progress again: the quiet period of `quiet_s` is over.
        is_last: whether it was made because the job is being ended.
    """

    at_ns: int = 0
    rank: int = 0
    pid: int = 0
    quiet_s: float = 0.0
    step: int = -1
    in_step: bool = False
    phase: str = ""
    answered: str = "none"
    frames: tuple[FrameSnapshot, ...] = _of(FrameSnapshot, ())
    user_line: FrameSnapshot | None = field(default=None, metadata={"of": FrameSnapshot})
    line_id: int = -1
    seen_line: FrameSnapshot | None = field(default=None, metadata={"of": FrameSnapshot})
    outer_line: FrameSnapshot | None = field(default=None, metadata={"of": FrameSnapshot})
    process_state: str = ""
    wchan: str = ""
    waits_on: str = ""
    blocker: ProcessSnapshot | None = field(default=None, metadata={"of": ProcessSnapshot})
    cpu_share: float | None = _of(float)
    thread_share: float | None = _of(float)
    io_bytes_per_s: float | None = _of(float)
    has_output: bool = False
    is_waiting_for_gil: bool = False
    is_gil_held: bool = False
    is_waiting_for_terminal: bool = False
    is_debugged: bool = False
    is_suspended: bool = False
    is_idle_notebook: bool = False
    is_compiling: bool = False
    uses_device: bool = False
    batches: int = -1
    epoch: int = 0
    data_ended: bool = False
    sequence: int = -1
    groups: tuple[GroupSnapshot, ...] = _of(GroupSnapshot, ())
    workers: tuple[WorkerSnapshot, ...] = _of(WorkerSnapshot, ())
    handled: str = ""
    raised_line: FrameSnapshot | None = field(default=None, metadata={"of": FrameSnapshot})
    threads: tuple[ThreadSnapshot, ...] = _of(ThreadSnapshot, ())
    ended: bool = False
    is_last: bool = False

    @property
    def transfers(self) -> bool:
        """Whether the rank reads or writes."""
        return (self.io_bytes_per_s or 0.0) >= _BUSY_BYTES_PER_S

    @property
    def is_busy_itself(self) -> bool:
        """Whether the rank or its children compute, read or write."""
        return (self.cpu_share or 0.0) >= BUSY_CORES or self.transfers

    @property
    def is_polling(self) -> bool:
        """Whether the training thread only wakes now and then, to look whether it can continue.

        On a busy host it then waits for a core for most of the time, so that it seems to be ready to run.
        """
        return self.thread_share is not None and self.thread_share < _POLLING_CORES

    def with_process(self, seen: WaitState, info: ProcessInfo | None, user: Sequence[FrameSnapshot]) -> RankSnapshot:
        """Return it with what the kernel says of the training thread, and the lines of the user's code.

        Args:
            user: frames of the user's code, the innermost first.
        """
        return replace(
            self,
            user_line=user[0] if user else None,
            outer_line=user[-1] if len(user) > 1 else None,
            process_state=seen.state,
            wchan=seen.wchan,
            waits_on=self.waits_on or seen.waits_on,
            is_waiting_for_terminal=seen.is_terminal_input,
            is_debugged=self.is_debugged or bool(seen.tracer),
            is_suspended=info is not None and is_job_suspended(info),
        )

    def to_info(self) -> dict[str, Any]:
        """Return the row of the log `info`."""
        return {"kind": InfoKind.SNAPSHOT, "t_ns": self.at_ns, **self.to_row()}


def user_line(snapshot: RankSnapshot | WorkerSnapshot) -> FrameSnapshot | None:
    """Return the innermost line of the user's code."""
    known = snapshot.user_line if isinstance(snapshot, RankSnapshot) else None
    return known or next((frame for frame in snapshot.frames if frame.is_user), None)


def _plain(value: Any) -> Any:
    if isinstance(value, _Record):
        return value.to_row()

    return [_plain(each) for each in value] if isinstance(value, tuple) else value


def _read(each: Field[Any], value: Any) -> Any:
    kind = each.metadata.get("of")
    if kind is None:
        return _typed(type(each.default), value)

    if each.default is None:
        return None if value is None else _typed(kind, value)

    if not isinstance(value, list | tuple):
        return _BAD

    return tuple(read for read in (_typed(kind, one) for one in value) if read is not _BAD)


def _typed(kind: type, value: Any) -> Any:
    if issubclass(kind, _Record):
        return kind.from_row(value) if isinstance(value, Mapping) else _BAD

    if kind is float and type(value) is int:
        return float(value)

    return value if type(value) is kind else _BAD
