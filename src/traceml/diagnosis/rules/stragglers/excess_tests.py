"""Whether ranks work more than the others by chance, always, in one part of the step, or in everything.

The sum of a rank's own work hides a weak fault in the noise of its heaviest part. Each part by itself does not: the
difference between a rank and the others is taken step by step, and compared with its own noise. Noise that lasts many
steps, as from another program, is recognized by the means of batches and of quarters.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, lru_cache
from math import comb, hypot

import msgspec
import numpy as np
from numpy.typing import NDArray

from traceml.diagnosis.steps.own_work import COMPUTE, OwnWork, Rows
from traceml.diagnosis.steps.step_split import Floats

__all__ = [
    "EVERYWHERE_SHARE", "SIMILAR_SLOWDOWN_SHARE", "OtherRanks", "SteadyExcess", "is_significant", "is_slower_overall",
    "mean_and_error", "only_passes_are_slower", "persists", "steady_excesses",
]  # fmt: skip

EVERYWHERE_SHARE = 0.30
"""A rank that is slower in everything is reported if its excess is at least this share of the step."""
MIN_Z_SCORE = 3.5
"""The excess is this many standard errors above 0, plus one for each tenth of a step that it is below a fifth."""
MIN_Z_SCORE_OF_LONG = 1.5
"""With a smaller z-score than that, but not than this, long steps are counted."""
SIMILAR_SLOWDOWN_SHARE = 0.25
"""If a second computing part is slower by this share of the first one's factor, the rank is slower in everything."""
MORE_WORK_FACTOR = 1.5
"""Forward and backward that are slower by this factor, beside an optimizer that is not, have more work."""
MIN_OPTIMIZER_NS = 1e5
"""A shorter optimizer step does not tell how fast a rank is."""
SIDE_Z_SCORE = 2.0
"""The excess of another part counts from so many standard errors above 0 on."""
STEADY_Z_SCORE = 5.0
"""A steady excess is this many above 0: by chance less often than once in a million parts and ranks."""
MIN_QUARTER = 0.25
"""In each quarter of the window a steady excess is at least this share of its mean."""
DISTINCT_RATIO = 1.5
"""It is this many times that of any other rank in the same part."""
MAX_P_VALUE = 0.001
"""The probability that long steps hit a rank by chance must be below this."""
LONG_STEP_SHARE = 0.25
"""A long step exceeds the others' usual own work by at least this share of a mean step."""
MIN_LONG_NS = 1e6
"""And by at least this long."""
SAME_EVENT_STEPS = 3
"""Long steps at most this far apart are one event, where most are: a program took a core for a while."""
MAX_TRIALS = 1000
"""With more long steps than this, the probability is not computed: twice the expected number is enough."""
_MIN_STEPS = 10
_BATCHES = 8


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
        return np.asarray(self.work.own[self.rows].mean(axis=0))

    @cached_property
    def parts(self) -> dict[str, Floats]:
        """Its parts."""
        return {part: np.asarray(values[self.rows].mean(axis=0)) for part, values in self.work.parts.items()}

    @cached_property
    def long_steps(self) -> NDArray[np.int64]:
        """Long steps of all ranks, compared with theirs."""
        return _count_long_steps(self.work, self.rows)


def is_slower_overall(work: OwnWork, rows: Rows, usual: OtherRanks, part: str) -> bool:
    """Return whether another computing part is slower by a similar factor: then the ranks are, not that part."""
    if part not in COMPUTE:
        return False

    base = {name: max(float(usual.parts[name].mean()), 1.0) for name in COMPUTE if name in usual.parts}
    excess = {name: work.in_measured(name, work.parts[name][rows].mean(axis=0) - usual.parts[name]) for name in base}
    least = SIMILAR_SLOWDOWN_SHARE * float(excess[part].mean()) / base[part]
    return any(
        float(excess[name].mean()) / base[name] >= least and np.divide(*mean_and_error(excess[name])) >= SIDE_Z_SCORE
        for name in base
        if name != part and base[name] >= 0.01 * sum(base.values())
    )


def only_passes_are_slower(work: OwnWork, rows: Rows, others: Rows) -> bool:
    """Return whether forward and backward are far slower and the optimizer is not: a slow host slows all down.

    A device at a lower clock does not: its optimizer waits for memory.
    """
    names = ("forward", "backward", "optimizer")
    if work.device or any(name not in work.parts for name in names):
        return False

    mine, usual = ([float(work.parts[name][some].mean()) for name in names] for some in (rows, others))
    if usual[2] < MIN_OPTIMIZER_NS:
        return False

    *passes, optimizer = (slow / max(base, 1.0) - 1 for slow, base in zip(mine, usual, strict=True))
    return min(passes) >= MORE_WORK_FACTOR - 1 and optimizer < SIMILAR_SLOWDOWN_SHARE * min(passes)


def is_significant(work: OwnWork, rows: Rows, usual: OtherRanks) -> bool:
    """Return whether the excess is not chance: it is steady, or nearly all long steps are of these ranks."""
    excess = {part: values[rows].mean(axis=0) - usual.parts[part] for part, values in work.parts.items()}
    backward = excess.pop("backward", np.zeros(1, np.float32))
    steady = [np.sum(list(excess.values()), axis=0), work.in_measured("backward", backward)]
    (mean, error), (mean_backward, error_backward) = (mean_and_error(values) for values in steady)
    share = (mean + mean_backward) / work.step_ns
    errors = (mean + mean_backward) / hypot(error, error_backward)
    return errors >= MIN_Z_SCORE + 10 * max(0.0, 0.2 - share) or (
        errors >= MIN_Z_SCORE_OF_LONG and _long_steps_blame(usual.long_steps, rows, usual.rows)
    )


def persists(excess: Floats, work: OwnWork, share: float) -> bool:
    """Return whether ranks are slower by this share of the step in both halves of the window."""
    halves = zip(np.array_split(excess, 2), np.array_split(work.step, 2), strict=True)
    return all(float(half.mean()) >= share * float(step.mean()) for half, step in halves)


class SteadyExcess(msgspec.Struct, frozen=True):
    """A rank's excess in a part of the step, throughout the window."""

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
    return mean >= STEADY_Z_SCORE * error and all(float(each.mean()) >= MIN_QUARTER * mean for each in quarters)


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


def _count_long_steps(work: OwnWork, others: Rows) -> NDArray[np.int64]:
    """Return the number of long steps of each rank, compared with the others' work."""
    backward = work.parts.get("backward", np.zeros_like(work.own))
    counts = _counts(work, work.own - backward, others)
    return counts + _counts(work, backward[:, work.measured], others)


def _long_steps_blame(counts: NDArray[np.int64], rows: Rows, others: Rows) -> bool:
    """Return whether nearly all long steps of each rank and the others are of that rank."""
    of_others, share = int(counts[others].sum()), 1 / (len(others) + 1)
    # Of thousands of ranks most have the same number.
    return all(_chance_of(hits, hits + of_others, share) < MAX_P_VALUE for hits in set(counts[rows].tolist()))


def _counts(work: OwnWork, values: Floats, others: Rows) -> NDArray[np.int64]:
    """Return the number of long steps per rank; if most of them are close together, that of the events."""
    if not values.size:
        return np.zeros(len(values), np.int64)

    limit = float(np.median(values[others])) + max(LONG_STEP_SHARE * work.step_ns, MIN_LONG_NS)
    long = values > limit
    began = long.copy()
    for steps in range(1, min(SAME_EVENT_STEPS, long.shape[1] - 1) + 1):
        began[:, steps:] &= ~long[:, :-steps]

    count, events = long.sum(axis=1), began.sum(axis=1)
    return np.asarray(np.where(2 * events >= count, count, events))


def _chance_of(hits: int, trials: int, probability: float) -> float:
    """Return the probability of at least this many hits by chance."""
    terms = (comb(trials, n) * probability**n * (1 - probability) ** (trials - n) for n in range(hits, trials + 1))
    return sum(terms) if trials <= MAX_TRIALS else float(hits < 2 * probability * trials)
