"""Estimated speedup: recompute step times without the work that a finding is about.

A step takes as long as the own work of the slowest rank, plus time that no rank's work explains. Replacing own work
therefore shortens a step by the gain of the slowest rank, not by the gain of one rank. Where the ranks meet only every
few steps, that holds for these steps together.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from traceml.diagnosis.steps.aligned_steps import AlignedSteps
from traceml.diagnosis.steps.own_work import COMPUTE, OwnWork
from traceml.diagnosis.steps.step_split import Floats

__all__ = [
    "RARE", "new_step_times", "replayed", "saved_ns", "speedup", "speedup_of_share", "with_typical_work",
    "without_more_passes", "without_rare",
]  # fmt: skip

RARE = 0.25
"""If more steps than this share are long, that is a property of the run."""
_MAX_SHARE = 0.99
"""A larger share counts as this one, so that the ratio stays finite."""

_FAR_MORE = 2.0
"""Steps in which all ranks have so many times the usual work of a part have it by no chance."""

# Steps whose optimizer calls its closure several times, as L-BFGS does: more passes over the model are more work.
_PASSES = ("forward", "backward")
_REPEATED = (*COMPUTE, "other")  # a closure has code of its own, as the loss
_MORE = 1.5
"""Forward and backward both take this many times longer than usual where there are more passes."""


def replayed(work: OwnWork, changed: Mapping[str, Floats]) -> OwnWork:
    """Return the window with the own work of some parts replaced, if any, and the step times that follow."""
    return work.changed(changed, new_step_times(work, changed)) if changed else work


def new_step_times(work: OwnWork, changed: Mapping[str, Floats]) -> Floats:
    """Return the time of each step with the own work of some parts replaced.

    Args:
        changed: part -> its new own work in nanoseconds, rank x step.
    """
    own = work.own + sum(values - work.parts[part] for part, values in changed.items())
    if not work.grouped:
        return np.asarray(np.maximum(work.step - (work.own - own).mean(axis=0), 0))

    step, longest = work.by_sync_interval(work.step), work.longest_intervals(own)
    left = step - (work.longest_as_is - longest)
    least, begins = np.minimum(step, longest), work.begins[work.sync_intervals]
    times = _shared_out(np.maximum(left, least), np.maximum(least - left, 0), least, begins)
    return _within_intervals(work, np.maximum(work.step - (work.own - own).mean(axis=0), 0), times)


def _within_intervals(work: OwnWork, steps: Floats, times: Floats) -> Floats:
    """Return the times of steps that add up to those of their intervals: the ranks wait in the last step of each.

    Args:
        steps: times without the work that is left out, where the ranks wait as before.
        times: of the intervals.
    """
    last = np.append(work.sync_intervals[1:], len(steps)) - 1
    sums, lengths = np.maximum(work.by_sync_interval(steps), 1), np.diff(work.sync_intervals, append=len(steps))
    waited = steps.copy()
    waited[last] += times - sums
    # Where the wait is too short for that, all steps of the interval become shorter.
    return np.where(np.repeat(waited[last] < 0, lengths), steps * np.repeat(times / sums, lengths), waited)


def _shared_out(times: Floats, rest: Floats, least: Floats, begins: NDArray[np.bool_]) -> Floats:
    """Return times of intervals in which none gains more than its own length; the next one gets the rest.

    A rank may be late after the last sync point of a step. Then the others wait for it in their next step, and half of
    the wait is in the mean step of the ranks, half in the mean of the next one.
    """
    first, last = begins.copy(), np.roll(begins, -1)
    first[0] = last[-1] = True
    for away, is_edge in ((1, first), (-1, last)):
        moved = np.where(is_edge, 0, np.minimum(np.roll(rest, away), times - least))
        times, rest = times - moved, rest - np.roll(moved, -away)

    return np.asarray(times)


def saved_ns(work: OwnWork, changed: Mapping[str, Floats]) -> float:
    """Return the nanoseconds by which the mean step would be shorter."""
    return work.step_ns - float(new_step_times(work, changed).mean())


def speedup(step_ns: float, saved: float) -> float:
    """Return old / new step time if a step saves this many nanoseconds.

    Args:
        step_ns: mean step of the run, not of what is left of it without other causes: one cause is fixed.
    """
    return step_ns / max(step_ns - max(saved, 0.0), 1.0)


def speedup_of_share(share: float) -> float:
    """Return old / new time if this share of the time is saved."""
    return 1 / (1 - min(max(share, 0.0), _MAX_SHARE))


def with_typical_work(values: Floats, late: NDArray[np.intp], others: NDArray[np.intp]) -> Floats:
    """Return a part's own work with that of the late ranks replaced by that of a typical other rank.

    Use a typical rank's work, shifted by one step: a median over ranks would be less noisy than a real rank. Steps in
    which all others have far more of it, as those that evaluate or save, are the same ones for the late ranks.
    """
    of_others = values[others]
    typical = of_others[int(np.argsort(of_others.mean(axis=1))[len(others) // 2])]
    is_long = of_others.min(axis=0) > _FAR_MORE * np.median(typical)
    changed = values.copy()
    changed[late] = np.where(is_long | np.roll(is_long, 1), typical, np.roll(typical, 1))
    return changed


def without_rare(values: Floats, share: float = 0.05) -> Floats:
    """Return the values with a `share` of the steps, the longest on any rank, cut to each rank's next largest.

    What ranks do by chance, each in other steps, is in most steps of some rank, and stays.
    """
    steps = values.shape[1]
    keep = steps - max(2, int(np.ceil(share * steps)))
    order = np.argpartition(values.max(axis=0), keep - 1)
    ceiling = values[:, order[:keep]].max(axis=1, keepdims=True)
    cut = values.copy()
    cut[:, order[keep:]] = np.minimum(values[:, order[keep:]], ceiling)
    return cut


def without_more_passes(window: AlignedSteps, work: OwnWork) -> dict[str, Floats]:
    """Return parts as they would be if no optimizer called its closure more often than usual; empty if none does.

    What takes longer than the number of passes explains stays.
    """
    if not window.closures.any() or not all(part in work.parts for part in _PASSES):
        return {}

    usual = {part: np.median(work.parts[part], axis=1, keepdims=True) for part in _REPEATED if part in work.parts}
    passes = np.minimum(*(work.parts[part] / np.maximum(usual[part], 1) for part in _PASSES))
    has_more = window.closures & (passes >= _MORE)
    if not has_more.any():
        return {}

    if "optimizer" in usual:  # between the calls it searches along a line, for which a step with one call has no time
        searched = float(np.median((work.parts["optimizer"] / passes)[has_more]))
        usual["optimizer"] = np.maximum(usual["optimizer"], searched)

    return {part: _without(work.parts[part], usual[part], passes, has_more) for part in usual}


def _without(values: Floats, usual_ns: Floats, passes: Floats, has_more: NDArray[np.bool_]) -> Floats:
    """Return a part without more passes; each may take half as long again as usual, on larger batches."""
    left = np.maximum(values - (_MORE * passes - 1) * usual_ns, np.minimum(values, usual_ns))
    return np.where(has_more, left, values)
