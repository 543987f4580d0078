"""Long steps of a rank: a fault in few steps, distinguished from chance by whose long steps they are."""

from __future__ import annotations

from math import comb

import numpy as np
from numpy.typing import NDArray

from traceml.diagnosis.steps.own_work import OwnWork
from traceml.diagnosis.steps.step_split import Floats

__all__ = ["LINE_SHARE", "RARE", "count_long_steps", "long_steps_blame"]

RARE = 0.25
"""If more steps than this share are long, that is a property of the run."""
LINE_SHARE = 0.6
"""The phase's line is named if the long steps have this share of the phase."""
MAX_P_VALUE = 0.001
"""The probability that the long steps hit that rank by chance must be below this."""
LONG_STEP_SHARE = 0.25
"""A long step exceeds the others' usual own work by at least this share of a mean step."""
MIN_LONG_NS = 1e6
"""And by at least this long."""
SAME_EVENT_STEPS = 3
"""Long steps at most this far apart are one event, where most are: a program took a core for a while."""
MAX_TRIALS = 1000
"""With more long steps than this, the probability is not computed: twice the expected number is enough."""


def count_long_steps(work: OwnWork, others: NDArray[np.intp]) -> NDArray[np.int64]:
    """Return the number of long steps of each rank, compared with the others' work."""
    backward = work.parts.get("backward", np.zeros_like(work.own))
    counts = _counts(work, work.own - backward, others)
    return counts + _counts(work, backward[:, work.measured], others)


def long_steps_blame(counts: NDArray[np.int64], rows: NDArray[np.intp], others: NDArray[np.intp]) -> bool:
    """Return whether nearly all long steps of each rank and the others are of that rank."""
    of_others, share = int(counts[others].sum()), 1 / (len(others) + 1)
    # Of thousands of ranks most have the same number.
    return all(chance_of(hits, hits + of_others, share) < MAX_P_VALUE for hits in set(counts[rows].tolist()))


def _counts(work: OwnWork, values: Floats, others: NDArray[np.intp]) -> NDArray[np.int64]:
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


def chance_of(hits: int, trials: int, probability: float) -> float:
    """Return the probability of at least this many hits by chance."""
    terms = (comb(trials, n) * probability**n * (1 - probability) ** (trials - n) for n in range(hits, trials + 1))
    return sum(terms) if trials <= MAX_TRIALS else float(hits < 2 * probability * trials)
