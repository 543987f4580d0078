"""Waiting of the ranks' main threads for a CPU core while they train, and who else uses the cores.

Ranks that start at the same time import torch on the same cores, so the time before the first step says nothing about
training. The kernel's counters are exact, and are read once or twice a second: the time between two readings is
training if a step was open at both. A step counts when it has ended: the one in which a job hangs may last for hours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from traceml.inspection.busy_processes import MIN_CORES

__all__ = [
    "COMPETING_PROCESSES",
    "CompetingProcessHistory",
    "CoreWaits",
    "medians_of_others",
    "ranks_without_core",
    "share_of_wall_time",
]

COMPETING_PROCESSES = "competing_processes"
"""Kind of the event with cores by name of process, `{"cores": {"ffmpeg": 0.8}}`, those of other users as ''."""

MIN_OBSERVED_NS = 2e8
"""With less time than this, nothing is known."""
WITHOUT_CORE_SHARE = 0.15
"""A rank whose main thread waited for a core for this share of its ready time, twice the others', lacks a core."""

_Sums = tuple[int, int, int]
_NOTHING: _Sums = (0, 0, 0)
_READ = ("t_ns", "main_run_ns", "main_wait_ns", "step")


class CoreWaits:
    """Sums the readings of each rank."""

    def __init__(self) -> None:
        self._first: dict[int, tuple[int, ...]] = {}
        self._last: dict[int, tuple[int, ...]] = {}
        self._training: dict[int, _Sums] = {}  # wall time, run and waited, in steps that have ended
        self._open: dict[int, list[_Sums]] = {}  # the same between readings, from that before the step open last
        self._before: dict[int, tuple[int, int]] = {}  # run and waited before the first step
        self._begun: set[int] = set()  # ranks that had a step

    def add(self, rank: int, rows: NDArray[np.void]) -> None:
        """Take rows of `schema.PROCESS`, in order."""
        last, ended, of_open = self._last.get(rank), self._training.get(rank, _NOTHING), self._open.setdefault(rank, [])
        for row in zip(*(rows[name].tolist() for name in _READ), strict=True):
            self._note_start_up(rank, (row[1], row[2]), step=row[3])
            if last is None:
                self._first[rank] = row
            elif last[3] >= 0:
                if row[3] != last[3]:
                    ended = _sum(ended, *of_open)
                    of_open.clear()

                if row[3] >= 0:
                    of_open.append((row[0] - last[0], row[1] - last[1], row[2] - last[2]))

            last = row

        if last is not None:
            self._last[rank], self._training[rank] = last, ended

    def _trained(self, rank: int) -> _Sums:
        """Return wall time, run and waited in training; the last step, where only one reading saw it open."""
        of_open = self._open[rank]
        return _sum(self._training[rank], *(of_open if len(of_open) == 1 else ()))

    def _note_start_up(self, rank: int, run_and_wait_ns: tuple[int, int], step: int) -> None:
        if step >= 0:
            self._begun.add(rank)
        elif rank not in self._begun:  # a restarted rank counts from 0 again
            self._before[rank] = run_and_wait_ns

    def of_start_up_s(self) -> float:
        """Return the seconds that main threads waited for a core before the first step: the median over ranks."""
        return self._median_before_s(1)

    def run_in_start_up_s(self) -> float:
        """Return the seconds that main threads ran before the first step: the median over ranks."""
        return self._median_before_s(0)

    def _median_before_s(self, field: int) -> float:
        known = [each[field] for each in self._before.values() if min(each) >= 0]
        return float(np.median(known)) / 1e9 if known else 0.0

    def of_ready_time(self) -> dict[int, float]:
        """Return the share of the time in which a main thread could have run that it waited for a core.

        It is that of training; where that was too short, of the whole run. Of a rank without steps, as a parameter
        server, nothing is known once others train.
        """
        observed = {rank: self._run_and_wait(rank) for rank in self._begun or self._training}
        return {rank: wait / (run + wait) for rank, (run, wait) in observed.items() if run + wait >= MIN_OBSERVED_NS}

    def _run_and_wait(self, rank: int) -> tuple[int, int]:
        _, run, wait = self._trained(rank)
        if run + wait >= MIN_OBSERVED_NS:
            return run, wait

        first, last = self._first[rank], self._last[rank]
        return last[1] - first[1], last[2] - first[2]

    def observed_s(self) -> dict[int, float]:
        """Return the seconds of training between the readings of each rank."""
        return {rank: self._trained(rank)[0] / 1e9 for rank in self._training}

    def of_wall_time(self) -> dict[int, float]:
        """Return the share of wall time in training that a main thread waited for a core, where that is known."""
        trained = {rank: self._trained(rank) for rank in self._training}
        return {rank: wait / wall for rank, (wall, _, wait) in trained.items() if wall >= MIN_OBSERVED_NS}


def _sum(*sums: _Sums) -> _Sums:
    wall, run, wait = zip(*sums, strict=True)
    return sum(wall), sum(run), sum(wait)


class CompetingProcessHistory:
    """Other processes that used cores while ranks waited for one: sums of readings on the host of rank 0."""

    def __init__(self) -> None:
        self._readings = 0
        self._cores: Counter[str] = Counter()

    def add(self, cores: object) -> None:
        """Take a reading: cores by name; anything else is ignored."""
        if not isinstance(cores, Mapping):
            return

        self._readings += 1
        for name, used in cores.items():
            if isinstance(name, str) and isinstance(used, int | float):
                self._cores[name] += used  # type: ignore[assignment]

    def most(self, count: int = 3) -> dict[str, float]:
        """Return the mean cores of those that used most, by name; '' are all processes of other users."""
        means = {name: cores / self._readings for name, cores in self._cores.most_common(count)}
        return {name: cores for name, cores in means.items() if cores >= MIN_CORES}


def share_of_wall_time(rows: NDArray[np.void]) -> float | None:
    """Return the share of the time from the first to the last reading that the main thread waited for a core.

    Args:
        rows: rows of `schema.PROCESS` of one rank, at least one; None if the kernel does not count.
    """
    passed = int(rows["t_ns"][-1] - rows["t_ns"][0])
    if passed <= 0 or rows["main_wait_ns"][0] < 0:
        return None

    return float(rows["main_wait_ns"][-1] - rows["main_wait_ns"][0]) / passed


def medians_of_others(shares: Mapping[int, float]) -> dict[int, float]:
    """Return for each rank the median share of all other ranks; nothing for a single rank."""
    count = len(shares)
    if count < 2:
        return {}

    values = np.array(list(shares.values()))
    order = np.argsort(values)
    place = np.empty(count, np.intp)
    place[order] = np.arange(count)
    middle = np.array([(count - 2) // 2, (count - 1) // 2])  # of the others, which follow a rank one place earlier
    medians = values[order][middle + (middle >= place[:, None])].mean(axis=1)
    return dict(zip(shares, medians.tolist(), strict=True))


def ranks_without_core(shares: Mapping[int, float]) -> frozenset[int]:
    """Return the ranks that waited for a core, more than the others.

    Args:
        shares: rank -> share of its main thread's ready time in which it waited.
    """
    others = medians_of_others(shares)
    return frozenset(rank for rank, median in others.items() if shares[rank] >= max(WITHOUT_CORE_SHARE, 2 * median))
