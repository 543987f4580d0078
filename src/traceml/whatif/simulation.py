"""Simulate the steps of a job with other durations than the recorded ones.

An operation starts when all it waits for has ended; a collective starts when its last member arrives. All steps, all
data-parallel ranks and several scenarios are simulated at once, as axes of arrays.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from traceml.whatif.dependencies import Dependencies, dependencies_of
from traceml.whatif.operations import MEDIAN_KINDS, JobTrace, Times

__all__ = ["Choice", "Simulator"]

_BATCH_BYTES = 64 << 20

Choice = NDArray[np.bool_]


class Simulator:
    """Step times of a job in which chosen operations keep their recorded duration and all others take the ideal one.

    Raises:
        TraceInvalidError: the trace's operations do not form a consistent step.

    Attributes:
        job: the operations.
        own_s: recorded durations; of a communication, the time of its transfer: its end minus the latest start in its
            group. Shape (operations, dp_ranks, steps).
        ideal_s: ideal duration of each operation: the mean (of communication: the median) over all of its kind.
    """

    def __init__(self, job: JobTrace) -> None:
        self.job = job
        self._dependencies = dependencies_of(job)
        self.own_s = _own_times(job, self._dependencies)
        self.ideal_s = _ideal_times(job, self.own_s)

    def mean_step_s(self, recorded: Choice) -> Times:
        """Return the mean step time of each scenario in seconds.

        Args:
            recorded: which operations keep their recorded duration, shape (scenarios, operations, dp_ranks).
        """
        size = max(1, _BATCH_BYTES // self.own_s.nbytes)
        batches = (recorded[first : first + size] for first in range(0, len(recorded), size))
        return np.concatenate([self._step_ends(self.ends_s(batch)).mean(axis=1) for batch in batches])

    def ends_s(self, recorded: Choice) -> Times:
        """Return when operations end after their step's start, shape (operations, scenarios, dp_ranks, steps)."""
        ends = np.zeros((len(self.own_s), len(recorded), *self.own_s.shape[1:]))
        for unit in self._dependencies.units:
            starts = [self._start(ends, member) for member in unit.members]
            start = np.maximum.reduce(starts)
            if unit.joins_dp_ranks:
                start = start.max(axis=1, keepdims=True)

            for member in unit.members:
                ends[member] = start + self._time(member, recorded)

        return ends

    def _start(self, ends: Times, operation: int) -> Times:
        before = self._dependencies.before[operation]
        return np.asarray(ends[list(before)].max(axis=0) if before else np.zeros(ends.shape[1:]))

    def _time(self, operation: int, recorded: Choice) -> Times:
        kept = recorded[:, operation, :, None]
        return np.asarray(np.where(kept, self.own_s[operation], self.ideal_s[operation]))

    def _step_ends(self, ends: Times) -> Times:
        """Return each step's end by scenario: when the last optimizer has ended."""
        last = [i for i, operation in enumerate(self.job.operations) if operation.kind == "optimizer"]
        return np.asarray(ends[last or slice(None)].max(axis=(0, 2)))


def _own_times(job: JobTrace, dependencies: Dependencies) -> Times:
    own = job.duration_s.copy()
    for unit in dependencies.units:
        if not unit.communicates:
            continue

        members = list(unit.members)
        start = job.start_s[members].max(axis=0)
        if unit.joins_dp_ranks:
            start = start.max(axis=0, keepdims=True)

        own[members] = np.maximum(job.end_s[members] - start, 0)

    return own


def _ideal_times(job: JobTrace, own_s: Times) -> Times:
    ideal = np.empty(len(own_s))
    kinds = np.array([operation.kind for operation in job.operations])
    for kind in np.unique(kinds):
        times = own_s[kinds == kind]
        ideal[kinds == kind] = np.median(times) if kind in MEDIAN_KINDS else times.mean()

    return ideal
