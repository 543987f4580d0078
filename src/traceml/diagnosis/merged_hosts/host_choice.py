"""Choice of the ranks of a host whose rows are sent on: a typical one, and those that differ from it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from traceml.diagnosis.steps.segments import Segments
from traceml.diagnosis.steps.step_split import Floats

__all__ = ["RankChoice", "choose_ranks"]

MIN_DIFFERENCE = 0.02
"""A rank differs if the mean of its own work, or of a part, is this share of a step away from the host's median."""
MIN_ERRORS = 2.5
"""And if it is this many standard errors away. Both are below the limits from which rules blame a rank."""


@dataclass(frozen=True, slots=True)
class RankChoice:
    """The ranks of a host, divided.

    Attributes:
        typical: the rank that represents the ordinary ones.
        ordinary: ranks that do not differ from it, itself among them.
        outliers: the others.
    """

    typical: int
    ordinary: tuple[int, ...]
    outliers: tuple[int, ...]


def choose_ranks(segments: Segments, kept: int | None = None) -> RankChoice:
    """Return the typical rank of a host and its outliers.

    Args:
        segments: own work of the host's ranks in the newest steps.
        kept: the typical rank so far; it stays typical while it is an ordinary one.
    """
    if not segments.own.size:  # no step that all of them have made: nobody differs yet
        ranks = segments.ranks.tolist()
        return RankChoice(_typical(ranks, kept), tuple(sorted(ranks)), ())

    apart = _differs(segments, segments.own)
    for values in segments.parts.values():
        apart |= _differs(segments, values)

    means = segments.own.mean(axis=1)
    by_work = np.argsort(means, kind="stable")
    ordinary = [row for row in by_work.tolist() if not apart[row]] or [int(by_work[(len(means) - 1) // 2])]
    ranks = segments.ranks[ordinary].tolist()
    outliers = sorted(set(segments.ranks.tolist()).difference(ranks))
    return RankChoice(_typical(ranks, kept), tuple(sorted(ranks)), tuple(outliers))


def _typical(ranks: list[int], kept: int | None) -> int:
    return kept if kept is not None and kept in ranks else ranks[(len(ranks) - 1) // 2]


def _differs(segments: Segments, values: Floats) -> NDArray[np.bool_]:
    means = values.mean(axis=1)
    # The lower median is a real rank's: where half of the ranks are late, the other half are the ordinary ones.
    median = np.sort(means)[(len(means) - 1) // 2]
    error = float(np.median(values.std(axis=1))) / max(values.shape[1], 1) ** 0.5
    least = max(MIN_DIFFERENCE * segments.step_ns, MIN_ERRORS * error)
    return np.asarray(np.abs(means - median) > least)
