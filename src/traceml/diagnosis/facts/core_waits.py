"""Waiting of the ranks' main threads for a CPU core while they train, and who else uses the cores.

Ranks that start at the same time import torch on the same cores, so the time before the first step says nothing about
training. The kernel's counters are exact, and are read once or twice a second: the time between two readings is
training if a step was open at both. A step counts when it has ended: the one in which a job hangs may last for hours.
Of the last one of a training, what follows its first reading may be what the script does after its loop.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

import msgspec
import numpy as np
from numpy.typing import NDArray

from traceml.inspection.busy_processes import MIN_CORES

__all__ = [
    "COMPETING_PROCESSES", "CompetingProcessHistory", "CoreWaits", "TimeSums", "added_up", "medians_of_others",
    "ranks_without_core",
]  # fmt: skip

COMPETING_PROCESSES = "competing_processes"
"""Kind of the event with cores by name of process: `{"cores": {"ffmpeg": 0.8}, "started": {"python augment.py": 0.9}}`.

`started` are processes that the ranks have started, `cores` all others but the ranks, those of other users as ''.
"""

MIN_OBSERVED_NS = 2e8
"""With less time than this, nothing is known."""
MIN_READY_NS = 5e7
"""Of a main thread that ran and waited for less than this in training, the share in which it waited is not known."""
WITHOUT_CORE_SHARE = 0.15
"""A rank whose main thread waited for a core for this share of its ready time, twice the others', lacks a core."""

TimeSums = tuple[float, float, float]
"""Wall time, that in which threads ran, and that in which they waited for a core."""
_NOTHING: TimeSums = (0, 0, 0)
_READ = ("t_ns", "main_run_ns", "main_wait_ns", "step")


class _MainThread(msgspec.Struct):
    """Readings of the main thread of a rank."""

    first: tuple[int, ...] = ()
    last: tuple[int, ...] = ()
    training: TimeSums = _NOTHING  # wall time, run and waited, in steps that have ended
    of_open: list[TimeSums] = []  # the same between readings, from that before the step open last
    before: tuple[int, int] | None = None  # run and waited before the first step
    has_begun: bool = False  # whether it had a step

    def add(self, readings: Iterable[tuple[int, ...]]) -> None:
        """Take readings, in order: the columns `_READ`."""
        last, of_open = self.last, self.of_open
        for row in readings:
            t_ns, run_ns, wait_ns, step = row
            if step >= 0:
                self.has_begun = True
            elif not self.has_begun:  # a restarted rank counts from 0 again
                self.before = run_ns, wait_ns

            if not last:
                self.first = row
            elif last[3] >= 0:
                if step != last[3]:
                    self.training = added_up(self.training, *(of_open if step >= 0 else of_open[:1]))
                    of_open.clear()

                if step >= 0:
                    of_open.append((t_ns - last[0], run_ns - last[1], wait_ns - last[2]))

            last = row

        self.last = last

    @property
    def trained(self) -> TimeSums:
        """Wall time, run and waited in training; the last step, where only one reading saw it open."""
        return added_up(self.training, *(self.of_open if len(self.of_open) == 1 else ()))

    @property
    def wait_of_ready_time(self) -> float | None:
        """Share of the time in which it could have run that it waited; None if unknown.

        It is that of training; where that was too short, of the whole run, most of which may be imports.
        """
        wall, run, wait = self.trained
        least = MIN_READY_NS
        if wall < MIN_OBSERVED_NS:
            run, wait, least = self.last[1] - self.first[1], self.last[2] - self.first[2], MIN_OBSERVED_NS

        return wait / (run + wait) if run + wait >= least else None


class CoreWaits:
    """Sums the readings of each rank."""

    def __init__(self) -> None:
        self._ranks: defaultdict[int, _MainThread] = defaultdict(_MainThread)

    def add(self, rank: int, rows: NDArray[np.void]) -> None:
        """Take rows of `schema.PROCESS`, in order."""
        if len(rows):
            self._ranks[rank].add(zip(*(rows[name].tolist() for name in _READ), strict=True))

    @property
    def open_step(self) -> int:
        """The newest step that is open at the last reading of a rank; -1 without one."""
        return max((each.last[-1] for each in self._ranks.values()), default=-1)

    def of_start_up_s(self) -> tuple[float, float]:
        """Return the seconds that main threads ran and waited for a core before the first step: medians over ranks."""
        before = [each.before for each in self._ranks.values() if each.before is not None and min(each.before) >= 0]
        run, wait = np.median(before, axis=0) / 1e9 if before else (0.0, 0.0)
        return float(run), float(wait)

    def of_ready_time(self) -> dict[int, float]:
        """Return the share of the time in which a main thread could have run that it waited for a core.

        Of a rank without steps, as a parameter server, nothing is known once others train.
        """
        begun = {rank: each for rank, each in self._ranks.items() if each.has_begun}
        shares = {rank: each.wait_of_ready_time for rank, each in (begun or self._ranks).items()}
        return {rank: share for rank, share in shares.items() if share is not None}

    def observed_s(self) -> dict[int, float]:
        """Return the seconds of training between the readings of each rank."""
        return {rank: each.trained[0] / 1e9 for rank, each in self._ranks.items()}

    def of_wall_time(self) -> dict[int, float]:
        """Return the share of wall time in training that a main thread waited for a core, where that is known."""
        trained = {rank: each.trained for rank, each in self._ranks.items()}
        return {rank: wait / wall for rank, (wall, _, wait) in trained.items() if wall >= MIN_OBSERVED_NS}


def added_up(*sums: TimeSums) -> TimeSums:
    """Return the sum of each of them."""
    wall, run, wait = zip(*sums, strict=True)
    return sum(wall), sum(run), sum(wait)


class CompetingProcessHistory:
    """Processes that used cores while ranks waited for one: sums of readings on the host of rank 0."""

    def __init__(self) -> None:
        self._readings: Counter[str] = Counter()
        self._cores: dict[str, Counter[str]] = {"cores": Counter(), "started": Counter()}

    def add(self, reading: Mapping[str, object]) -> None:
        """Take a reading: the data of an event `COMPETING_PROCESSES`; what is not cores by name is left out."""
        for kind, sums in self._cores.items():
            cores = reading.get(kind)
            if isinstance(cores, Mapping):
                self._readings[kind] += 1
                for name, used in cores.items():
                    if isinstance(name, str) and isinstance(used, int | float):
                        sums[name] += used  # type: ignore[assignment]

    @property
    def others(self) -> dict[str, float]:
        """Mean cores by name, the most first, of processes that the ranks have not started; '' are of other users."""
        return self._means("cores")

    @property
    def started(self) -> dict[str, float] | None:
        """Those of processes that the ranks have started, loader workers among them; None if there was no reading."""
        return self._means("started") if self._readings["started"] else None

    def _means(self, kind: str) -> dict[str, float]:
        """Return the mean cores by name, of those that used some, the most first."""
        means = {name: cores / self._readings[kind] for name, cores in self._cores[kind].most_common()}
        return {name: cores for name, cores in means.items() if cores >= MIN_CORES}


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
