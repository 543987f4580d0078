"""A snapshot of this process: stacks, phase, process groups, loader workers, and what the kernel says."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

from traceml.clock import monotonic_ns
from traceml.clock import own_time as time
from traceml.database.snapshots.blocker_snapshot import blocker_of
from traceml.database.snapshots.external_snapshots import LiveSlots
from traceml.database.snapshots.rank_snapshot import (
    MAX_FRAMES,
    MAX_THREADS,
    FrameSnapshot,
    GroupSnapshot,
    ProcessSnapshot,
    RankSnapshot,
    ThreadSnapshot,
    WorkerSnapshot,
)
from traceml.fail_open import fail_open
from traceml.inspection.kernel_state import (
    AwaitedKind,
    Rate,
    UsageRates,
    io_bytes,
    process_info,
    thread_cpu_ns,
    wait_state,
)
from traceml.inspection.thread_frames import (
    awaiting_frames,
    running_line,
    stack_frames,
    thread_frame,
    thread_frames,
    thread_number,
)
from traceml.inspection.user_files import display_path, is_debugger, is_import_machinery, is_package_file
from traceml.instrument.workers.loader_workers import awaited_loader
from traceml.recorder.no_progress.failed_threads import handled_exception
from traceml.recorder.no_progress.library_waits import (
    awaited_child,
    awaited_lock,
    called_collective,
    dead_sender,
    open_transfer,
    with_root,
)
from traceml.recorder.no_progress.thread_output import StoreThreads
from traceml.recorder.user_code import UserCode, user_line
from traceml.samplers.torch_memory import initialized_cuda

if TYPE_CHECKING:
    from traceml.database.flight.flight import FlightFile
    from traceml.instrument.loader import DataProgress

__all__ = ["SnapshotMaker", "other_threads"]

T = TypeVar("T")

_log = logging.getLogger("traceml")


class SnapshotMaker:
    """Takes snapshots of this process.

    Args:
        thread: returns the id of the training thread.
        user: recognizes the user's code.
        data: returns how far the data of the training loader is read; None if there is none.
        groups: returns the newest operation by process group.
        workers: returns the loader's workers, by the time without progress and the iterator that the rank waits for.
        failed_threads: returns the threads that an exception has ended.
    """

    def __init__(
        self,
        flight: FlightFile,
        *,
        rank: Callable[[], int],
        thread: Callable[[], int],
        user: UserCode,
        is_evaluating: Callable[[], bool],
        data: Callable[[], DataProgress | None],
        groups: Callable[[], tuple[GroupSnapshot, ...]],
        workers: Callable[[float, int | None], tuple[WorkerSnapshot, ...]],
        failed_threads: Callable[[], tuple[ThreadSnapshot, ...]],
    ) -> None:
        self._slots, self._steps = flight.open_slots, flight.ring("steps")
        self._rank, self._training_thread, self._user = rank, thread, user
        self._is_evaluating, self._data, self._groups, self._workers = is_evaluating, data, groups, workers
        self._failed_threads = failed_threads
        self._store_threads = StoreThreads()
        self._rates = UsageRates(os.getpid(), self._bytes_of_idle)
        self._rates.read()
        self._thread_rate = Rate()
        self._thread_share()

    def make(self, quiet_s: float, *, has_output: bool, is_last: bool = False) -> RankSnapshot:
        """Return a snapshot of this moment."""
        frame = thread_frame(self._thread())
        frames, user = self._stack(frame)
        cpu_share, io_bytes_per_s = self._rates.read()
        number = thread_number(self._thread()) or os.getpid()
        seen, info = wait_state(number), process_info(number)
        lock = _of_library(lambda: awaited_lock(frame, self._user.contains), "")
        compiles, debugged = _frame_flags(frames)
        live, data = self._live(), self._data()
        handled, raised_line = handled_exception(self._thread())
        snapshot = RankSnapshot(
            at_ns=monotonic_ns(),
            rank=self._rank(),
            pid=os.getpid(),
            quiet_s=round(quiet_s, 3),
            step=live.step,
            in_step=live.in_step,
            phase=self._phase(live),
            answered="recorder",
            frames=tuple(frames[:MAX_FRAMES]),
            waits_on=f"{AwaitedKind.LOCK} {lock}" if lock else "",
            blocker=_of_library(lambda: self._blocker(frame, number, lock), None),
            cpu_share=cpu_share,
            thread_share=self._thread_share(),
            io_bytes_per_s=io_bytes_per_s,
            has_output=has_output,
            is_debugged=debugged,
            is_idle_notebook="ipykernel" in sys.modules and not user,
            is_compiling=compiles,
            uses_device=initialized_cuda() is not None,
            batches=data.batches if data is not None else -1,
            epoch=data.epoch if data is not None else 0,
            data_ended=data is not None and data.is_over,
            groups=_of_library(lambda: self._operations(frame), ()),
            workers=_of_library(lambda: self._workers(quiet_s, awaited_loader(frame)), ()),
            handled=handled,
            raised_line=raised_line,
            threads=(*self._failed_threads(), *other_threads(self._thread(), self._user)),
            is_last=is_last,
        )
        return snapshot.with_process(seen, info, user)

    def _blocker(self, frame: FrameType | None, number: int, lock: str) -> ProcessSnapshot | None:
        dead = dead_sender(frame, self._user.contains)
        if dead is not None:
            return ProcessSnapshot(pid=dead[0], state="Z", end=dead[1])

        return blocker_of(os.getpid(), number, child=awaited_child(frame, self._user.contains), lock=lock)

    def _operations(self, frame: FrameType | None) -> tuple[GroupSnapshot, ...]:
        transfer = open_transfer(frame, self._user.contains)
        groups = with_root(self._groups(), frame, self._user.contains)
        is_known = any(group.is_p2p and group.in_flight for group in groups)
        return groups if transfer is None or is_known else (*groups, transfer)

    def end(self, quiet_s: float) -> RankSnapshot:
        """Return the snapshot that ends a quiet period of this many seconds."""
        live = self._live()
        return RankSnapshot(
            at_ns=monotonic_ns(), rank=self._rank(), quiet_s=round(quiet_s, 3), step=live.step, in_step=live.in_step,
            phase=self._phase(live), answered="recorder", ended=True,
        )  # fmt: skip

    def _thread(self) -> int:
        """Return the training thread; the main thread once that has ended, as by an exception."""
        training, main = self._training_thread(), threading.main_thread().ident
        return training if main is None or thread_frame(training) is not None else main

    def _stack(self, frame: FrameType | None) -> tuple[list[FrameSnapshot], list[FrameSnapshot]]:
        """Return all frames without ours and the import machinery's, and those of the user's code, the innermost first.

        Those of the coroutine that an event loop waits for are inside of those of the loop.
        """
        frames: list[FrameSnapshot] = []
        user: list[FrameSnapshot] = []
        for each in (*awaiting_frames(frame, self._user.contains), *stack_frames(frame)):
            code = each.f_code
            if not (is_package_file(code.co_filename) or is_import_machinery(code.co_filename)):
                is_user = self._user.contains(each)
                file = display_path(code.co_filename)
                line = FrameSnapshot(file=file, line=running_line(each), function=code.co_qualname, is_user=is_user)
                frames.append(line)
                user += [line] if is_user else []

        return frames, user

    def _live(self) -> LiveSlots:
        return LiveSlots(tuple(self._slots), self._steps.appended)

    def _phase(self, live: LiveSlots) -> str:
        return "evaluation" if self._is_evaluating() and not live.is_ending else live.phase

    def _bytes_of_idle(self) -> int:
        """Return the bytes of this thread, as reading /proc is no sign of life, and of those of torch's store."""
        threads = (threading.get_native_id(), *self._store_threads())
        return sum(sum(io_bytes(f"self/task/{thread}")) for thread in threads)

    def _thread_share(self) -> float | None:
        """Return the cores that the training thread has used since the last call; None if not known, or just now."""
        used_ns = thread_cpu_ns(thread_number(self._thread()) or os.getpid())
        share = self._thread_rate.read(None if used_ns is None else used_ns / 1e9, time.monotonic())
        return share and round(share, 6)


def _of_library(read: Callable[[], T], default: T) -> T:
    """Return what private attributes of a library tell; the default where that version has them otherwise."""
    with fail_open(_log, "recorder", "a part of the snapshots of this rank is missing", once=True):
        return read()

    return default


def _frame_flags(frames: list[FrameSnapshot]) -> tuple[bool, bool]:
    """Return whether torch.compile is in a stack, and whether a debugger is."""
    compiles = any(
        "torch/_dynamo/convert_frame" in each.file or ("torch/_inductor/" in each.file and "compile" in each.function)
        for each in frames
    )
    return compiles, any(is_debugger(each.file) for each in frames)


def other_threads(training: int, user: UserCode) -> tuple[ThreadSnapshot, ...]:
    """Return threads that run the user's code or a collective, first those that the interpreter waits for at its end.

    Once it waits, also those that run a library's.
    """
    frames = thread_frames()
    others = {ident: frame for ident, frame in frames.items() if ident not in (training, threading.get_ident())}
    found = sorted(_snapshots(others, user), key=lambda snapshot: (snapshot.is_daemon, snapshot.line is None))
    return tuple(found[:MAX_THREADS])


def _snapshots(frames: Mapping[int, FrameType], user: UserCode) -> Iterator[ThreadSnapshot]:
    known = {thread.ident: thread for thread in threading.enumerate()}
    has_ended = not threading.main_thread().is_alive()
    for ident, frame in frames.items():
        code, line = user_line(frame, user.contains)
        thread = known.get(ident)  # none of threads that a library has started in C, as those of torch.distributed.rpc
        name, is_daemon = ("", True) if thread is None else (thread.name, thread.daemon)
        collective = called_collective(frame, user.contains)
        innermost = None
        if code is not None:
            file = display_path(code.co_filename)
            innermost = FrameSnapshot(file=file, line=line, function=code.co_qualname, is_user=True)

        if innermost is not None or collective or (has_ended and not is_daemon):
            yield ThreadSnapshot(name=name, line=innermost, is_daemon=is_daemon, collective=collective)
