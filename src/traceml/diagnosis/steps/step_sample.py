"""Sample of a long run's steps: blocks of consecutive steps, spread over the run, the same on all ranks."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from traceml.diagnosis.steps.aligned_steps import Ints
from traceml.diagnosis.steps.kept_steps import KeptSteps, Rows

__all__ = ["SampledSteps"]


class SampledSteps(KeptSteps):
    """The rows of chosen steps of every rank; other rows are left out.

    Args:
        steps: the chosen steps, ascending; at least one.
    """

    def __init__(self, steps: Ints, ranks: int = 0) -> None:
        self._chosen = steps
        super().__init__(len(steps), ranks)

    def scatter(self, rank_indices: Ints, rows: Rows) -> None:
        """Take the chosen ones of step rows of many ranks; all of them count for a rank's latest step."""
        chosen = self._has(rows["step"])
        super().scatter(rank_indices[chosen], rows[chosen])
        if len(rows):
            self.advance(rank_indices, rows["step"], rows["t_end_ns"])

    def advance(self, rank_indices: Ints, steps: Ints, ends_ns: Ints) -> None:
        """Record the latest steps of ranks, and the monotonic timestamps of their ends."""
        self._grow(int(rank_indices.max()) + 1)
        self._latest[rank_indices], self._end_ns[rank_indices] = steps, ends_ns

    def scatter_user(self, rank_index: int, rows: Rows, names: Mapping[int, str]) -> None:
        """Take the chosen ones of a rank's user phases."""
        super().scatter_user(rank_index, rows[self._has(rows["step"])], names)

    def scatter_device(self, rank_indices: Ints, rows: Rows) -> None:
        """Take the chosen ones of device rows."""
        chosen = self._has(rows["step"])
        super().scatter_device(rank_indices[chosen], rows[chosen])

    def scatter_evaluation(self, rank_index: int, rows: Rows) -> None:
        """Take a rank's evaluation before the chosen steps."""
        super().scatter_evaluation(rank_index, rows[self._has(rows["step"])])

    def _has(self, steps: Ints) -> NDArray[np.bool_]:
        at = np.minimum(np.searchsorted(self._chosen, steps), self.slots - 1)
        return np.asarray(self._chosen[at] == steps)

    @property
    def _reach(self) -> int:
        return int(self._latest.max()) + 1

    def _cells(self, ranks: Ints | int, steps: Ints) -> Ints:
        return np.asarray(ranks * self.slots + np.searchsorted(self._chosen, steps))

    def _steps_until(self, newest: int, last: int) -> Ints:
        return self._chosen[self._chosen <= newest][-last:]
