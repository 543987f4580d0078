"""Paces of ranks: those that wait for each other in their steps have the same.

Process groups may be apart from each other, as pairs of ranks that share a model each, and no pair waits for another.
The rows do not tell the groups, but a rank that waits for another one takes as long for its steps as that one.
"""

from __future__ import annotations

import numpy as np

from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.steps.aligned_steps import AlignedSteps
from traceml.diagnosis.steps.own_work import is_grouped

__all__ = ["by_pace"]

FASTER = 1.2
"""Ranks do not wait for those whose steps take this many times as long."""
_PARTS = 8
_EDGE = 1  # steps at each end of a window, which may have what precedes and follows a training


def by_pace(window: AlignedSteps, facts: JobFacts) -> tuple[AlignedSteps, AlignedSteps | None]:
    """Return the ranks that take as long for their steps as the slowest, and the others, if there are any.

    A rank that is faster is so in all steps together, and in most parts of the window: ranks may meet in every n-th
    step only, and one may pause outside of its steps.
    """
    times = window.total[:, _EDGE:-_EDGE]
    # What some ranks evaluate is in no step of theirs, and may be in those of the ranks that wait for them.
    evaluate_alone = facts.time is not None and facts.time.evaluators
    if evaluate_alone or times.shape[1] < _PARTS or not is_grouped(window, facts):
        return window, None

    parts = np.array([part.mean(axis=1) for part in np.array_split(times, _PARTS, axis=1)])
    paces = times.mean(axis=1), np.median(parts, axis=0)
    slow = np.any([FASTER * pace >= pace.max() for pace in paces], axis=0)
    return (window, None) if slow.all() else (window.of_ranks(slow), window.of_ranks(~slow))
