"""Whether ranks work more than the others by chance, always, or in everything."""

from __future__ import annotations

from math import hypot

import numpy as np

from traceml.diagnosis.rules.stragglers.other_ranks import OtherRanks, Rows
from traceml.diagnosis.steps.long_steps import long_steps_blame
from traceml.diagnosis.steps.own_work import COMPUTE, OwnWork
from traceml.diagnosis.steps.steady_excess import mean_and_error
from traceml.diagnosis.steps.step_split import Floats

__all__ = ["EVERYWHERE_SHARE", "is_significant", "is_slower_overall", "persists"]

EVERYWHERE_SHARE = 0.30
"""A rank that is slower in everything is reported if its excess is at least this share of the step."""
MIN_Z_SCORE = 3.5
"""The excess is this many standard errors above 0, plus one for each tenth of a step that it is below a fifth."""
MIN_Z_SCORE_OF_LONG = 1.5
"""With a smaller z-score than that, but not than this, long steps are counted."""
SIMILAR_SLOWDOWN_SHARE = 0.25
"""If a second computing part is slower by this share of the first one's factor, the rank is slower in everything."""
SIMILAR_MIN_Z_SCORE = 2.0
"""The excess of that second part must be this many standard errors above 0."""


def is_slower_overall(work: OwnWork, rows: Rows, usual: OtherRanks, part: str) -> bool:
    """Return whether another computing part is slower by a similar factor: then the ranks are, not that part."""
    if part not in COMPUTE:
        return False

    base = {name: max(float(usual.parts[name].mean()), 1.0) for name in COMPUTE if name in usual.parts}
    excess = {name: work.in_measured(name, work.parts[name][rows].mean(axis=0) - usual.parts[name]) for name in base}
    least = SIMILAR_SLOWDOWN_SHARE * float(excess[part].mean()) / base[part]
    return any(
        float(excess[name].mean()) / base[name] >= least
        and np.divide(*mean_and_error(excess[name])) >= SIMILAR_MIN_Z_SCORE
        for name in base
        if name != part and base[name] >= 0.01 * sum(base.values())
    )


def is_significant(work: OwnWork, rows: Rows, usual: OtherRanks) -> bool:
    """Return whether the excess is not chance: it is steady, or nearly all long steps are of these ranks."""
    excess = {part: values[rows].mean(axis=0) - usual.parts[part] for part, values in work.parts.items()}
    backward = excess.pop("backward", np.zeros(1, np.float32))
    steady = [np.sum(list(excess.values()), axis=0), work.in_measured("backward", backward)]
    (mean, error), (mean_backward, error_backward) = (mean_and_error(values) for values in steady)
    share = (mean + mean_backward) / work.step_ns
    errors = (mean + mean_backward) / hypot(error, error_backward)
    return errors >= MIN_Z_SCORE + 10 * max(0.0, 0.2 - share) or (
        errors >= MIN_Z_SCORE_OF_LONG and long_steps_blame(usual.long_steps, rows, usual.rows)
    )


def persists(excess: Floats, work: OwnWork) -> bool:
    """Return whether ranks are slower in everything in both halves of the window."""
    halves = zip(np.array_split(excess, 2), np.array_split(work.step, 2), strict=True)
    return all(float(half.mean()) >= EVERYWHERE_SHARE * float(step.mean()) for half, step in halves)
