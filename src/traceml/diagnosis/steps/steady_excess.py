"""Steady excess: one part of the step takes one rank longer than the others, throughout the window.

The sum of a rank's own work hides a weak fault in the noise of its heaviest part. Each part by itself does not: the
difference between a rank and the others is taken step by step, and compared with its own noise. Noise that lasts many
steps, as from another program, is recognized by the means of batches and of quarters.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import msgspec
import numpy as np
from numpy.typing import NDArray

from traceml.diagnosis.steps.own_work import OwnWork
from traceml.diagnosis.steps.step_split import Floats

__all__ = ["SteadyExcess", "mean_and_error", "steady_excesses"]

MIN_Z_SCORE = 5.0
"""The excess is this many standard errors above 0: by chance less often than once in a million parts and ranks."""
MIN_QUARTER = 0.25
"""In each quarter of the window the excess is at least this share of its mean."""
DISTINCT_RATIO = 1.5
"""The excess is this many times that of any other rank in the same part."""
SIDE_Z_SCORE = 2.0
"""From this on, the excess of another part counts too."""

_MIN_STEPS = 10
_BATCHES = 8


class SteadyExcess(msgspec.Struct, frozen=True):
    """A rank's excess in a part of the step."""

    row: int
    part: str
    mean_ns: float  # mean excess over the other ranks
    dominance: float  # its share of the excesses of all parts that are not noise


def steady_excesses(work: OwnWork, min_ns: float) -> list[SteadyExcess]:
    """Return the steady excess of a rank in each part that has one, the largest first."""
    found = [each for part in work.parts for each in _of_part(work, part, min_ns)]
    return sorted(found, key=lambda each: -each.mean_ns)


def _of_part(work: OwnWork, part: str, min_ns: float) -> Iterator[SteadyExcess]:
    excess = _excess(work, part)
    if excess.shape[1] < _MIN_STEPS:
        return

    means = excess.mean(axis=1)
    row = int(means.argmax())
    second = float(np.delete(means, row).max())
    if means[row] < max(min_ns, DISTINCT_RATIO * second) or not _is_steady(excess[row]):
        return

    mean = float(means[row])
    beside = sum(_side_excess(work, name, row) for name in work.parts if name != part)
    yield SteadyExcess(row, part, mean, mean / (mean + beside))


def _excess(work: OwnWork, part: str) -> Floats:
    """Return each rank's work in a part beyond the mean of the others, in the steps that measured it."""
    values = work.in_measured(part, work.parts[part])
    others = (values.sum(axis=0) - values) / max(len(values) - 1, 1)
    return np.asarray(values - others)


def _side_excess(work: OwnWork, part: str, row: int) -> float:
    excess = _excess(work, part)[row]
    if not excess.size:
        return 0.0

    mean, error = mean_and_error(excess)
    return mean if mean >= SIDE_Z_SCORE * error else 0.0


def _is_steady(excess: Floats) -> bool:
    mean, error = mean_and_error(excess)
    quarters: list[Floats] = np.array_split(excess, 4)
    return mean >= MIN_Z_SCORE * error and all(float(each.mean()) >= MIN_QUARTER * mean for each in quarters)


def mean_and_error(values: Floats) -> tuple[float, float]:
    """Return the mean and its standard error, from the means of batches of steps, as noise may last some steps."""
    number = min(max(len(values) // 10, _BATCHES), 2 * _BATCHES, len(values))
    begins, sizes = _batches(len(values), number)
    means = np.add.reduceat(values, begins, dtype=np.float64) / sizes
    mean = float(means.sum()) / number
    spread = means - mean
    error = (float(spread @ spread) / (number * (number - 1))) ** 0.5 if number > 1 else 0.0
    return mean, max(error, 1.0)


@lru_cache(maxsize=16)
def _batches(steps: int, number: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the beginning and the size of each of several batches of steps, as equal as can be."""
    ends = np.arange(number + 1) * steps // number
    return ends[:-1], np.diff(ends)
