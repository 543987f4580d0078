"""Loader workers over the run: their use of cores, and copies of memory that they share with the training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from traceml.database.row_arrays import join_rows, rows_by
from traceml.diagnosis.facts.core_waits import TimeSums, added_up
from traceml.diagnosis.facts.machine_use import ThinnedRows
from traceml.diagnosis.facts.sampled_lines import MAX_LOADERS

__all__ = ["WorkerHistory", "WorkerUse"]

MIN_NS = 1e9
"""Workers that were watched for less time are not known; the kernel counts CPU time in ticks of 10 ms."""
COPIED_SHARE = 0.5
"""Private memory that grows is copies of shared memory if new memory explains at most this share of it."""
_ONE_GENERATION = ("loader", "pid", "workers")


class WorkerUse(msgspec.Struct, frozen=True, kw_only=True):
    """The workers of a loader of a rank."""

    busy: float  # share of the time in which a worker computed
    waited: float  # share of the time in which it waited for a core
    workers: int  # number of them
    cores: int  # cores that at least one of them may use

    @property
    def ready(self) -> float:
        """Share of the time in which a worker computed or waited for a core."""
        return min(self.busy + self.waited, 1.0)


class _Watched(msgspec.Struct):
    """Sums over one loader of a rank."""

    last: NDArray[np.void]
    kept: ThinnedRows = msgspec.field(default_factory=ThinnedRows)  # some of the rows, over the run
    memory: NDArray[np.void] | None = None  # first and newest rows with private memory of the same processes
    passed: TimeSums = (0.0, 0.0, 0.0)  # of all workers together, until the newest step began
    opened: TimeSums = (0.0, 0.0, 0.0)  # in that step: a job that hangs in it makes no batches meanwhile


def _use(parts: Sequence[_Watched]) -> WorkerUse | None:
    """Return the use of workers of some loaders together; None if they were not watched long enough."""
    last = max((each.last for each in parts), key=lambda last: int(last["t_ns"][0]))
    (worker_ns, cpu_ns, wait_ns), workers = added_up(*(each.passed for each in parts)), int(last["workers"][0])
    if worker_ns < MIN_NS * workers:
        return None

    busy, waited = min(cpu_ns / worker_ns, 1.0), min(wait_ns / worker_ns, 1.0)
    return WorkerUse(busy=busy, waited=waited, workers=workers, cores=int(last["cores"][0]))


def _passed(rows: NDArray[np.void]) -> TimeSums:
    """Return what passed from row to row of the same workers, after the first step."""
    before, after = rows[:-1], rows[1:]
    same = np.all([before[name] == after[name] for name in _ONE_GENERATION], axis=0) & (before["step"] > 0)
    worker_ns = (after["t_ns"] - before["t_ns"]) * after["workers"]
    cpu_ns, wait_ns = (after[name] - before[name] for name in ("cpu_ns", "wait_ns"))
    return float(worker_ns[same].sum()), float(cpu_ns[same].sum()), float(wait_ns[same].sum())


class WorkerHistory(msgspec.Struct):
    """Rows of `schema.LOADER_WORKERS`, summed by rank and loader; in the first step workers start."""

    _watched: dict[tuple[int, int], _Watched] = {}

    def add(self, rank: int, rows: NDArray[np.void]) -> None:
        """Take rows of a rank, in order."""
        for loader, own in rows_by(rows, "loader"):
            self._add(rank, loader, own)

    def _add(self, rank: int, loader: int, rows: NDArray[np.void]) -> None:
        known = self._watched.get((rank, loader))
        if known is None and len(mine := [key for key in self._watched if key[0] == rank]) >= MAX_LOADERS:
            del self._watched[mine[0]]

        joined = rows if known is None else join_rows([known.last, rows])
        watched = self._watched.setdefault((rank, loader), _Watched(joined[:1]))
        is_before = joined["step"] < joined["step"][-1]
        if is_before.any():
            count = int(np.flatnonzero(is_before)[-1]) + 2  # with the row that ends the last of these steps
            watched.passed = added_up(watched.passed, watched.opened, _passed(joined[:count]))
            watched.opened, joined = (0.0, 0.0, 0.0), joined[count - 1 :]

        watched.opened = added_up(watched.opened, _passed(joined))
        watched.last = joined[-1:].copy()
        watched.kept.add(rows)
        measured = rows[rows["private_bytes"] >= 0]
        if watched.memory is not None:
            measured = np.concatenate([watched.memory, measured])

        if len(measured):
            watched.memory = measured[measured["pid"] == measured["pid"][-1]][[0, -1]]

    def use(self, counts: Callable[[int, int], bool] | None = None) -> WorkerUse | None:
        """Return the use of the loader whose workers are busiest, on any rank; None if nothing is known.

        Args:
            counts: tells whether that of a rank, by its number, is one of those that count, and count as one: a script
                may make one for each epoch, which lives for a second. None for each of all. While an evaluation waits
                for its own workers, the others are idle.
        """
        watched: dict[tuple[int, int], list[_Watched]] = {}
        for (rank, loader), each in self._watched.items():
            if counts is None or counts(rank, loader):
                watched.setdefault((rank, loader if counts is None else -1), []).append(each)

        found = [use for parts in watched.values() if (use := _use(parts)) is not None]
        return max(found, key=lambda use: use.busy + use.waited, default=None)

    def waited(self, first: int, last: int, counts: Callable[[int, int], bool]) -> float | None:
        """Return the share of the time in some steps that workers waited for a core; None if hardly watched then.

        Args:
            first, last: the first of the steps, and the one after them.
            counts: as of `use`.
        """
        watched = [each for key, each in self._watched.items() if counts(*key)]
        within = (
            rows[(rows["step"] >= first) & (rows["step"] < last)] for rows in (each.kept.rows for each in watched)
        )
        worker_ns, _, waited_ns = added_up((0.0, 0.0, 0.0), *map(_passed, within))
        least_ns = MIN_NS * max((float(each.last["workers"][0]) for each in watched), default=0.0)
        return min(waited_ns / worker_ns, 1.0) if worker_ns >= least_ns > 0 else None

    def workers(self, rank: int, loader: int) -> int:
        """Return the number of workers of a loader in the newest row; 0 without one."""
        watched = self._watched.get((rank, loader))
        return 0 if watched is None else int(watched.last["workers"][0])

    def copies(self, rank: int, loader: int) -> bool:
        """Return whether the private memory of the workers grows by copies of what they share since the fork."""
        memory = self._memory(rank, loader)
        if memory is None:
            return False

        grown, new = (int(np.diff(memory[name])[0]) for name in ("private_bytes", "anonymous_bytes"))
        return grown > 0 and new <= COPIED_SHARE * grown

    def uncopied_bytes(self, rank: int, loader: int) -> int:
        """Return the memory that the workers share since the fork, and may still copy; 0 if unknown."""
        memory = self._memory(rank, loader)
        return 0 if memory is None else max(int(memory["anonymous_bytes"][-1]) - int(memory["private_bytes"][-1]), 0)

    def _memory(self, rank: int, loader: int) -> NDArray[np.void] | None:
        """Return the first and newest rows with private memory of the same workers; None without them."""
        watched = self._watched.get((rank, loader))
        return None if watched is None else watched.memory
