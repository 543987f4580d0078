"""Shape of step times over a run: steady growth, or a slow part that they jump into.

Step times in equal bins are described by the simplest shape that explains them: level, levels with one or two jumps,
a straight line (Theil-Sen, H. Theil 1950; P. K. Sen 1968), or a level that a line follows.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from traceml.diagnosis.steps.step_history import Floats

__all__ = ["MIN_BINS", "MIN_FACTOR", "LevelChange", "growth", "level_change"]

MIN_BINS = 12
"""Fewer bins have no shape."""
MIN_FACTOR = 1.2
"""A slow part is slower by this factor."""
MIN_Z_SCORE = 6.0
"""A jump is this many standard errors, by the deviation of bins from their level."""
MIN_TAU = 0.7
"""Growth is steady if the bins' order agrees with time by this much (Kendall's tau)."""
MIN_RISE = 0.5
"""Steps that rise by this share of a jump after it grow, and did not jump."""
_MIN_SEGMENT = 3
_MIN_LEVEL = 0.15  # of a run: growth that begins later has this before it, and slow first steps have it after them
_POWERS = (1.0, 1.5, 2.0, 3.0)  # of growth from the first step on, which may speed up
_SIMPLER = 0.8  # a slow part between two others has to explain the run better than a jump by this factor


_SAME_LEVEL = 0.3  # of a jump: bins that differ from its slow part by less are as slow
_MAX_USUAL_SHARE = 0.25  # of the bins of a slow part that are not slow


class LevelChange(msgspec.Struct, frozen=True):
    """A slow part of the run, and what steps take in it and outside."""

    shape: str  # `growth` of the run or its rest, or a slow part that `stays`, that `recovers`, or at the `first`
    first: int  # its bins, [first, last)
    last: int
    before_ns: float  # usual step outside; of growth, at its beginning
    after_ns: float  # usual step inside; of growth, at its end

    @property
    def factor(self) -> float:
        """Time of a slow step over that of a usual one."""
        return self.after_ns / max(self.before_ns, 1.0)

    @property
    def bins(self) -> slice:
        """The bins of the slow part."""
        return slice(self.first, self.last)


def level_change(values: Floats) -> LevelChange | None:
    """Return how step times grow or jump; None if they keep one level, or are too few for a shape.

    Args:
        values: usual step time of each bin, in ns.
    """
    return growth(values) or _jump(values) if len(values) >= MIN_BINS else None


def growth(values: Floats) -> LevelChange | None:
    """Return a growth over the whole run, or from some bin to its end."""
    return _late_growth(values) or _steady_growth(values)


def _late_growth(values: Floats) -> LevelChange | None:
    """Return a growth that begins after the run, if a level and a line explain it clearly better than other shapes."""
    count = len(values)
    firsts = np.arange(max(_MIN_SEGMENT, int(_MIN_LEVEL * count)), count - 2 * _MIN_SEGMENT + 1)
    fits = _hinges(values, firsts)
    misfits = np.abs(values - fits).sum(axis=1)
    best = int(misfits.argmin())
    fit, first = fits[best], int(firsts[best])
    usual, slow = values[:first], values[first:]
    if fit[-1] <= fit[0] or not _rises_on(usual, slow) or _tau(slow) < MIN_TAU:
        return None

    parts = [(0, end) for end in range(_MIN_SEGMENT, count - _MIN_SEGMENT + 1)]
    others = [_best(values, parts)[0], *(float(np.abs(values - _power(values, power)).sum()) for power in _POWERS)]
    if misfits[best] >= _SIMPLER * min(others):
        return None

    end = max(float(fit[-1]), float(np.median(slow[-_MIN_SEGMENT:])))
    return LevelChange("growth", first, count, float(np.median(usual)), end)


def _tau(values: Floats) -> float:
    """Return Kendall's tau between the values and their order in time."""
    first, second = np.triu_indices(len(values), 1)
    return float(np.sign(values[second] - values[first]).mean())


def _hinges(values: Floats, firsts: NDArray[np.int64]) -> Floats:
    """Return a row for each bin: a level up to it, and a line that rises from it."""
    since = np.arange(len(values)) - firsts[:, None] + 0.5
    order = np.argsort(values)
    levels = _medians(values[order], since[:, order] < 0)
    slopes = np.sort(np.where(since > 0, (values - levels) / since, np.inf), axis=1)
    slope = slopes[np.arange(len(firsts)), (len(values) - firsts - 1) // 2][:, None]
    hinges: Floats = levels + np.maximum(slope, 0) * np.maximum(since, 0)
    return hinges


def _power(values: Floats, power: float) -> Floats:
    at = np.linspace(0.0, 1.0, len(values)) ** power
    slope, level = np.polyfit(at, values, 1)
    return np.asarray(level + slope * at, np.float64)


def _steady_growth(values: Floats) -> LevelChange | None:
    """Return a growth over the whole run, if a line explains it better than a jump, or its slow part grows as well."""
    at = np.arange(len(values), dtype=float)
    first, second = np.triu_indices(len(values), 1)
    slope = float(np.median((values[second] - values[first]) / (at[second] - at[first])))
    level = float(np.median(values - slope * at))
    if slope <= 0 or _tau(values) < MIN_TAU:
        return None

    _, (_, jump) = _best(values, [(0, end) for end in range(_MIN_SEGMENT, len(values) - _MIN_SEGMENT + 1)])
    is_jump = _spread(_around_medians(values[:jump], values[jump:])) < _spread(values - level - slope * at)
    if is_jump and not _rises_on(values[:jump], values[jump:]):
        return None

    # Where growth is not linear, the line leaves the range of the steps at its ends.
    before, end = max(level, float(values.min())), max(level + slope * at[-1], float(np.median(values[-_MIN_SEGMENT:])))
    return LevelChange("growth", 0, len(values), before, end)


def _rises_on(usual: Floats, slow: Floats) -> bool:
    """Return whether the steps after a jump keep rising by much of it: growth that is not linear or began later."""
    third = max(len(slow) // 3, 1)
    rise = float(np.median(slow[-third:]) - np.median(slow[:third]))
    return rise >= MIN_RISE * float(np.median(slow) - np.median(usual))


def _jump(values: Floats) -> LevelChange | None:
    """Return the slow part of a run with two levels: at its end, at its beginning, or between."""
    ordered, count = np.sort(values), len(values)
    if ordered[-2] < MIN_FACTOR * ordered[1]:  # medians of three or more bins are between these
        return None

    simple = [(0, at) for at in range(_MIN_SEGMENT, count)] + [(at, count) for at in range(_MIN_SEGMENT, count - 1)]
    between = [
        (first, last)
        for first in range(_MIN_SEGMENT, count - _MIN_SEGMENT)
        for last in range(first + _MIN_SEGMENT, count - _MIN_SEGMENT + 1)
    ]
    fits = [_best(values, parts) for parts in (simple, between)]
    first, last = fits[1][1] if fits[1][0] < _SIMPLER * fits[0][0] else fits[0][1]
    inside, outside = values[first:last], np.concatenate([values[:first], values[last:]])
    slow, usual = float(np.median(inside)), float(np.median(outside))
    if slow < usual and (first == 0 or last == count):  # the rest is the slow part
        first, last, slow, usual = (last, count, usual, slow) if first == 0 else (0, first, usual, slow)

    if first == 0 and count - last < max(_MIN_SEGMENT, _MIN_LEVEL * count):
        return None  # a run that is faster at its very end was not slow at first

    inside, outside = values[first:last], np.concatenate([values[:first], values[last:]])
    if _alike(outside, usual, slow) >= _alike(inside, usual, slow):  # it comes and goes, as at the begin of each epoch
        return None

    fast_inside = _alike(inside, slow, usual)  # it does so within the part
    if fast_inside > _MAX_USUAL_SHARE * len(inside) or fast_inside >= _alike(outside, slow, usual):
        return None

    spread = max(_spread(_around_medians(inside, outside)), _spread(np.diff(values)) / np.sqrt(2), 1e-3 * usual)
    if slow - usual < MIN_Z_SCORE * spread * np.sqrt(1 / len(inside) + 1 / len(outside)):
        return None

    return LevelChange("stays" if last == count else "first" if first == 0 else "recovers", first, last, usual, slow)


def _alike(values: Floats, usual: float, slow: float) -> int:
    """Return how many bins are about as slow as the slow part; with the levels exchanged, as fast as the others."""
    return int((np.abs(values - slow) < _SAME_LEVEL * abs(slow - usual)).sum())


def _best(values: Floats, parts: Sequence[tuple[int, int]]) -> tuple[float, tuple[int, int]]:
    """Return the part that explains the values best, [first, last), after its misfit.

    It is the sum of absolute deviations from two levels, inside and outside of the part.
    """
    order = np.argsort(values)
    ordered = values[order]
    first, last = np.array(parts).T[..., None]
    inside = (order >= first) & (order < last)
    levels = np.where(inside, _medians(ordered, inside), _medians(ordered, ~inside))
    misfits = np.abs(ordered - levels).sum(axis=1)
    best = int(misfits.argmin())
    return float(misfits[best]), parts[best]


def _medians(ordered: Floats, chosen: NDArray[np.bool_]) -> Floats:
    """Return the lower median of what each row chooses, as a column."""
    numbers = chosen.cumsum(axis=1)
    middle = (numbers >= (numbers[:, -1:] + 1) // 2).argmax(axis=1)
    medians: Floats = ordered[middle][:, None]
    return medians


def _around_medians(*parts: Floats) -> Floats:
    return np.concatenate([part - np.median(part) for part in parts])


def _spread(values: Floats) -> float:
    """Return the standard deviation by the median of absolute deviations."""
    return 1.4826 * float(np.median(np.abs(values - np.median(values))))
