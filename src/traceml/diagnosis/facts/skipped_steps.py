"""Steps whose update was skipped, by GradScaler or a guard, because a gradient was not finite."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from traceml.database.schema import StepFlag, unpack_bits

__all__ = ["SkippedSteps"]

_MAX_KEPT = 65_536


class SkippedSteps:
    """Skipped steps of one rank, as all ranks of a data-parallel job skip alike: the lowest that has sent rows."""

    def __init__(self) -> None:
        self.rank: int | None = None
        """The rank."""
        self.rows = 0
        """Step rows of the rank; of a long run a sample that is spread over it."""
        self.first = 0
        """Its first step that was taken."""
        self.latest = -1
        """Its last step."""
        self.steps: NDArray[np.int64] = np.empty(0, np.int64)
        """The skipped steps, the newest of very many."""

    @property
    def taken_share(self) -> float:
        """Share of the steps whose rows were taken; less than 1 where rows are a sample."""
        return min(self.rows / max(self.latest + 1 - self.first, 1), 1.0)

    def share_since(self, step: int) -> float:
        """Return the share of the steps from one on that were skipped."""
        seen = self.taken_share * (self.latest + 1 - step)
        return min(float((self.steps >= step).sum()) / seen, 1.0) if seen > 0 else 0.0

    def add(self, ranks: NDArray[np.int64], rows: NDArray[np.void]) -> None:
        """Take rows of `schema.STEPS`."""
        lowest = int(ranks.min())
        if self.rank is None or lowest < self.rank:
            self.rank, self.rows, self.steps = lowest, 0, self.steps[:0]

        mine = rows[ranks == self.rank]
        if not len(mine):
            return

        self.first = int(mine["step"][0]) if self.rows == 0 else self.first
        self.rows += len(mine)
        self.latest = int(mine["step"][-1])
        skipped = mine["step"][unpack_bits(mine["bits"]).flags & StepFlag.SKIPPED > 0]
        if len(skipped):
            self.steps = np.concatenate([self.steps, skipped])[-_MAX_KEPT:]
