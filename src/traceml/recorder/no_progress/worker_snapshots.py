"""Snapshots of the data loader's workers: state, CPU time, and the stack of the one that the rank waits for."""

from __future__ import annotations

import os

from traceml.clock import own_time as time
from traceml.database.snapshots.blocker_snapshot import blocker_of
from traceml.database.snapshots.rank_snapshot import MAX_FRAMES, FrameSnapshot, WorkerSnapshot
from traceml.inspection.kernel_state import Rate, process_info, wait_state
from traceml.inspection.stack_signal import SignaledStacks, find_stack_file, signal_target
from traceml.inspection.stack_text import main_frames
from traceml.inspection.user_files import display_path, is_user_file
from traceml.instrument.workers.loader_workers import LoaderWorker, workers_of_loaders

__all__ = ["WorkerSnapshots"]


class WorkerSnapshots:
    """Takes snapshots of loader workers. Stacks come by the signal, once in a quiet period, written by faulthandler.

    Forked workers have the rank's handler, and write into its file: one is asked at a time. Others have their own.

    Args:
        file: the rank's file of stacks; None without one.
        disturb_after_s: after this time without progress a worker is asked even if that may end a sleep in its C code.
    """

    def __init__(self, file: int | None, disturb_after_s: float) -> None:
        self._file, self._disturb_after_s = file, disturb_after_s
        self._asked: dict[tuple[int, bool], tuple[FrameSnapshot, ...]] = {}
        self._batch: int | None = None
        self._rates: dict[int, Rate] = {}

    def make(self, quiet_s: float, awaited: int | None) -> tuple[WorkerSnapshot, ...]:
        """Return snapshots of all workers.

        Args:
            awaited: the iterator that the rank waits for, see `awaited_loader`; None asks no worker for its stack.
        """
        workers = workers_of_loaders(awaited)
        batch = next((each.waits_for_batch for each in workers if each.waits_for_batch is not None), None)
        if batch != self._batch:
            self._batch = batch
            self._asked.clear()

        return tuple(self._snapshot(each, quiet_s) for each in workers)

    def _snapshot(self, worker: LoaderWorker, quiet_s: float) -> WorkerSnapshot:
        seen = wait_state(worker.pid)
        frames = self._frames(worker.pid, quiet_s) if worker.waits_for_batch is not None else ()
        return WorkerSnapshot(
            index=worker.number,
            pid=worker.pid,
            state=seen.state,
            wchan=seen.wchan,
            waits_on=seen.waits_on,
            cpu_share=self._cpu_share(worker.pid),
            frames=frames,
            waits_for_batch=worker.waits_for_batch,
            start_method=worker.start_method,
            blocker=blocker_of(worker.pid, worker.pid) if worker.waits_for_batch is not None else None,
        )

    def _frames(self, pid: int, quiet_s: float) -> tuple[FrameSnapshot, ...]:
        undisturbed = quiet_s < self._disturb_after_s
        if (pid, True) in self._asked and (undisturbed or self._asked[pid, True]):
            return self._asked[pid, True]

        if (pid, undisturbed) not in self._asked:
            target = signal_target(pid, even_if_disturbed=not undisturbed)
            text = self._stacks(pid, target) if target is not None else ""
            self._asked[pid, undisturbed] = tuple(_frames_of_worker(text)[:MAX_FRAMES])

        return self._asked[pid, undisturbed]

    def _stacks(self, pid: int, target: int) -> str:
        own = find_stack_file(pid)
        file = own if own is not None else self._file
        if file is None:
            return ""

        try:
            return SignaledStacks(pid, file, target=target).wait()
        finally:
            if own is not None:
                os.close(own)

    def _cpu_share(self, pid: int) -> float | None:
        info = process_info(pid)
        share = self._rates.setdefault(pid, Rate()).read(info.cpu_s if info is not None else None, time.monotonic())
        return share and round(share, 3)


def _frames_of_worker(text: str) -> list[FrameSnapshot]:
    """Return a worker's frames down to its loop; those below are of the process that it was forked from."""
    frames: list[FrameSnapshot] = []
    for file, line, function in main_frames(text):
        frames.append(FrameSnapshot(file=display_path(file), line=line, function=function, is_user=is_user_file(file)))
        if function == "_worker_loop":
            break

    return frames
