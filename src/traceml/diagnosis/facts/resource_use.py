"""Resources that run out: open files, shared memory, disk, processes, memory, CPU quota."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from traceml.database.schema import Resource
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind, Severity
from traceml.formatting import bytes_text, count_text, duration_text, percent_text, plural, ranks_text

__all__ = ["ResourceUse", "UseHistory", "limits_near"]

FULL_SHARE = 0.90
"""A resource is near its limit from this share on. A disk is often that full: it must be growing too."""
GROWN_SHARE = 0.05
"""Growth during the run that counts: this share of the limit, in three thirds of the samples."""
SOON_S = 3600.0
"""A growing resource is reported if it ends within this time."""
VERY_SOON_S = 600.0
"""From here on the finding is critical."""
THROTTLED_SHARE = 0.25
"""Share of scheduling periods in which the control group was stopped because its CPU quota was used up."""
_KNOWN = frozenset(int(each) for each in Resource)
_MIN_ROWS = 6
_KEPT_ROWS = 60
_MIN_PERIODS = 50

_BYTES = (Resource.SHARED_MEMORY, Resource.DISK, Resource.MEMORY)
_WORDS = {
    Resource.OPEN_FILES: "open files",
    Resource.SHARED_MEMORY: "shared memory (/dev/shm)",
    Resource.DISK: "disk of the working directory",
    Resource.PROCESSES: "processes and threads",
    Resource.MEMORY: "memory of the container",
    Resource.CPU_QUOTA: "CPU quota",
}
_ADVICE = {
    Resource.OPEN_FILES: (
        "Find what is opened and never closed (files in a Dataset, loggers, tensors shared by loader workers); "
        "torch.multiprocessing.set_sharing_strategy('file_system') or `ulimit -n` gives more time."
    ),
    Resource.SHARED_MEMORY: (
        "Loader workers pass batches through /dev/shm: give it more (docker run --shm-size, --ipc=host; an emptyDir "
        "with medium Memory in Kubernetes), or use fewer workers or a smaller prefetch_factor."
    ),
    Resource.DISK: "Keep fewer checkpoints and logs, or write them to another disk.",
    Resource.PROCESSES: "Use fewer loader workers and threads, or raise the container's limit of pids.",
    Resource.MEMORY: "Find what grows (lists of losses that keep graphs, caches in a Dataset), or ask for more memory.",
    Resource.CPU_QUOTA: (
        "Ask for more CPUs, or run fewer threads: OMP_NUM_THREADS and num_workers beyond the quota are only stopped."
    ),
}


@dataclass(frozen=True, slots=True)
class ResourceUse:
    """Use of a resource by one rank or its host.

    Attributes:
        rank: the rank that measured it.
        resource: which.
        used, limit: units now.
        left_s: time until the limit at the present growth; None where it does not grow.
        left_steps: the same in training steps.
    """

    rank: int
    resource: Resource
    used: int
    limit: int
    left_s: float | None = None
    left_steps: float | None = None

    @property
    def share(self) -> float:
        """Used share of the limit."""
        return self.used / max(self.limit, 1)

    @property
    def is_near(self) -> bool:
        """Whether it runs out."""
        if self.resource is Resource.CPU_QUOTA:
            return self.limit >= _MIN_PERIODS and self.share >= THROTTLED_SHARE

        ends = self.left_s is not None and self.left_s <= SOON_S
        return ends or (self.share >= FULL_SHARE and self.resource is not Resource.DISK)


class UseHistory:
    """Samples of limits by rank and resource, of the first and the last minutes."""

    def __init__(self) -> None:
        self._rows: dict[tuple[int, int], NDArray[np.void]] = {}
        self._uses: dict[tuple[int, int], ResourceUse] = {}

    def add(self, rank: int, rows: NDArray[np.void]) -> None:
        """Take rows of `schema.LIMITS`, in order."""
        for number in set(rows["resource"].tolist()) & _KNOWN:
            new, key = rows[rows["resource"] == number], (rank, number)
            joined = np.concatenate([self._rows[key], new]) if key in self._rows else new
            self._rows[key] = kept = joined[-_KEPT_ROWS:]
            self._uses[key] = _use(rank, Resource(number), kept)

    def uses(self) -> tuple[ResourceUse, ...]:
        """Return the newest use of each resource."""
        return tuple(use for _, use in sorted(self._uses.items()))


def _use(rank: int, resource: Resource, rows: NDArray[np.void]) -> ResourceUse:
    used, limit = int(rows["used"][-1]), int(rows["limit"][-1])
    left = _left(rows) if resource is not Resource.CPU_QUOTA else None
    return ResourceUse(rank, resource, used, limit, *(left or (None, None)))


def _left(rows: NDArray[np.void]) -> tuple[float, float | None] | None:
    """Return (seconds, steps) until the limit; None where the use does not grow steadily."""
    if len(rows) < _MIN_ROWS:
        return None

    used = rows["used"].astype(float)
    thirds = [float(part.mean()) for part in np.array_split(used, 3)]
    grown = used[-1] - used[0]
    if not thirds[0] < thirds[1] < thirds[2] or grown < GROWN_SHARE * rows["limit"][-1]:
        return None

    share = (float(rows["limit"][-1]) - float(used[-1])) / float(grown)
    seconds = (int(rows["t_ns"][-1]) - int(rows["t_ns"][0])) / 1e9
    steps = int(rows["step"][-1]) - int(rows["step"][0])
    return share * seconds, share * steps if steps > 0 else None


def limits_near(uses: Iterable[ResourceUse]) -> list[Finding]:
    """Return a finding per resource that runs out, of the rank that is nearest to its limit."""
    near: dict[Resource, ResourceUse] = {}
    for use in uses:
        worst = near.get(use.resource)
        if use.is_near and (worst is None or use.share > worst.share):
            near[use.resource] = use

    return [_finding(use) for use in near.values()]


def _finding(use: ResourceUse) -> Finding:
    soon = use.left_s is not None and use.left_s <= VERY_SOON_S
    words = _WORDS[use.resource]
    if use.resource is Resource.CPU_QUOTA:
        summary = (
            f"The container was stopped in {percent_text(use.share)} of its scheduling periods, because its CPU quota "
            "was used up."
        )
    else:
        where = f" on {ranks_text((use.rank,))}" if use.resource is Resource.OPEN_FILES else ""
        summary = f"{_amounts(use)} {words} in use{where}{_when(use)}."

    return Finding(
        kind=Kind.LIMIT_NEAR,
        severity=Severity.CRITICAL if soon else Severity.WARNING,
        ranks=(use.rank,) if use.resource is Resource.OPEN_FILES else (),
        summary=summary,
        next=_ADVICE[use.resource],
        evidence={
            "resource": use.resource.name.lower(),
            "used": use.used,
            "limit": use.limit,
            **({} if use.left_s is None else {"left_s": use.left_s}),
            **({} if use.left_steps is None else {"left_steps": use.left_steps}),
        },
    )


def _amounts(use: ResourceUse) -> str:
    text = bytes_text if use.resource in _BYTES else count_text
    return f"{text(use.used)} of {text(use.limit)}"


def _when(use: ResourceUse) -> str:
    if use.left_s is None or use.left_s > SOON_S:
        return ""

    steps = "" if use.left_steps is None else f", {plural(int(use.left_steps), 'step')}"
    return f", and it grows: at this rate it is full in {duration_text(use.left_s)}{steps}"
