"""Use of limited resources: open files, CPU time, shared memory, disk, processes, memory, CPU quota."""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

from traceml.database.row_arrays import join_rows
from traceml.database.schema import Resource

__all__ = ["SOON_S", "ResourceUse", "UseHistory"]

FULL_SHARE = 0.90
"""A resource is near its limit from this share on. A disk is often that full: it must be growing too."""
GROWN_SHARE = 0.05
"""Growth during the run that counts: this share of the limit, in three thirds of the time."""
LATE_SHARE = 1 / 6
"""Share of the growth that the last third of the time must have: less is growth that has ended."""
SOON_S = 3600.0
"""A growing resource is reported if it ends within this time."""
THROTTLED_SHARE = 0.25
"""Share of scheduling periods in which the cgroup was stopped because its CPU quota was used up."""
_KNOWN = frozenset(int(each) for each in Resource)
_MIN_ROWS = 6
_KEPT_ROWS = 60
_PER_THIRD = 20  # points, evenly spread over the time: level use has few rows
_MIN_PERIODS = 50
_WARM_UP = 10  # steps: until then libraries open files, models are loaded, and optimizers make their state
_OF_WARM_UP = (Resource.OPEN_FILES, Resource.PROCESSES, Resource.MEMORY)


class ResourceUse(msgspec.Struct, frozen=True):
    """Use of a resource by one rank or its host."""

    rank: int
    resource: Resource
    used: int  # units now
    limit: int
    left_s: float | None = None  # time until the limit at the present growth; None if it does not grow
    left_steps: float | None = None

    @property
    def share(self) -> float:
        """Used share of the limit."""
        return self.used / max(self.limit, 1)

    @property
    def ends_in_s(self) -> float | None:
        """Time until the limit, if the use grows and reaches that soon; else None."""
        return self.left_s if self.left_s is not None and self.left_s <= SOON_S else None

    @property
    def is_near(self) -> bool:
        """Whether it runs out."""
        if self.resource is Resource.CPU_QUOTA:
            return self.limit >= _MIN_PERIODS and self.share >= THROTTLED_SHARE

        return self.ends_in_s is not None or (
            self.share >= FULL_SHARE and self.resource not in (Resource.DISK, Resource.CHECKPOINT_DISK)
        )


class UseHistory:
    """Samples of limits by rank and resource, of the first and the last minutes."""

    def __init__(self) -> None:
        self._rows: dict[tuple[int, int], NDArray[np.void]] = {}
        self._uses: dict[tuple[int, int], ResourceUse] = {}

    def add(self, rank: int, rows: NDArray[np.void]) -> None:
        """Take rows of `schema.LIMITS`, in order."""
        for number in set(rows["resource"].tolist()) & _KNOWN:
            new, key = rows[rows["resource"] == number], (rank, number)
            joined = join_rows([self._rows[key], new]) if key in self._rows else new
            self._rows[key] = kept = joined[-_KEPT_ROWS:]
            self._uses[key] = _use(rank, Resource(number), kept)

    def uses(self) -> tuple[ResourceUse, ...]:
        """Return the newest use of each resource."""
        return tuple(use for _, use in sorted(self._uses.items()))


def _use(rank: int, resource: Resource, rows: NDArray[np.void]) -> ResourceUse:
    used, limit = int(rows["used"][-1]), int(rows["limit"][-1])
    training = rows[rows["step"] >= _WARM_UP] if resource in _OF_WARM_UP else rows
    left = _left(training) if resource is not Resource.CPU_QUOTA else None
    return ResourceUse(rank, resource, used, limit, *(left or (None, None)))


def _left(rows: NDArray[np.void]) -> tuple[float, float | None] | None:
    """Return (seconds, steps) until the limit; None if the use does not grow steadily."""
    if len(rows) < _MIN_ROWS:
        return None

    times, limit = rows["t_ns"].astype(float), float(rows["limit"][-1])
    even = np.linspace(times[0], times[-1], 3 * _PER_THIRD + 1)
    used, steps = (np.interp(even, times, rows[name]) for name in ("used", "step"))
    thirds = [float(part.mean()) for part in np.array_split(used, 3)]
    grown, lately = (float(used[-1] - used[since]) for since in (0, -1 - _PER_THIRD))
    if not thirds[0] < thirds[1] < thirds[2] or grown < GROWN_SHARE * limit or lately < LATE_SHARE * grown:
        return None

    share, made = (limit - float(used[-1])) / lately, float(steps[-1] - steps[-1 - _PER_THIRD])
    return share * float(times[-1] - times[0]) / 3e9, share * made if made > 0 else None
