"""Ranks that are not late, by whose work late ones are judged."""

from __future__ import annotations

from functools import cached_property

import msgspec
import numpy as np
from numpy.typing import NDArray

from traceml.diagnosis.steps.long_steps import count_long_steps
from traceml.diagnosis.steps.own_work import OwnWork
from traceml.diagnosis.steps.step_split import Floats

__all__ = ["OtherRanks", "Rows", "excess_over_others", "mean_of_others"]

Rows = NDArray[np.intp]
"""Indices of ranks in the window."""


class OtherRanks(msgspec.Struct, frozen=True, dict=True):
    """The ranks that are not late, by whose work late ones are judged, each of thousands."""

    work: OwnWork
    rows: Rows
    late: Rows  # the ranks that are judged, of which some may turn out not to be late

    @cached_property
    def all_ranks(self) -> list[int]:
        """All ranks but the judged ones, also those whose lateness is known."""
        return self.work.ranks_of(np.delete(np.arange(len(self.work.ranks)), self.late))

    @cached_property
    def own(self) -> Floats:
        """Their mean own work, by step."""
        return mean_of_others(self.work.own[self.rows])

    @cached_property
    def parts(self) -> dict[str, Floats]:
        """Its parts."""
        return {part: mean_of_others(values[self.rows]) for part, values in self.work.parts.items()}

    @cached_property
    def long_steps(self) -> NDArray[np.int64]:
        """Long steps of all ranks, compared with theirs."""
        return count_long_steps(self.work, self.rows)


def excess_over_others(values: Floats, late: Rows, others: Rows) -> Floats:
    """Return by how much the work of late ranks is longer than that of the others, the means, by step."""
    return np.asarray(values[late].mean(axis=0) - mean_of_others(values[others]))


def mean_of_others(values: Floats) -> Floats:
    """Return the mean work of the other ranks in each step.

    It is not the median: with skewed noise, the median of several ranks is below the mean of each of them.
    """
    return np.asarray(values.mean(axis=0))
