"""Steps of several trainings in one run, as a sweep and layers that are unfrozen make them, as if of one.

Computation and waiting for other ranks depend on the model, so rules that look for a change over time or for irregular
steps would find the models. Each training has them at its own usual value here, times a factor that keeps their sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from traceml.diagnosis.steps.aligned_steps import AlignedSteps
from traceml.diagnosis.steps.segments import COMPUTE, Segments
from traceml.diagnosis.steps.step_split import Floats

__all__ = ["as_one_training"]

_USUAL = 0.25  # half of a training may be slow


def as_one_training(window: AlignedSteps, segments: Segments, starts: Sequence[int]) -> Segments:
    """Return a window in which all trainings compute equally long.

    Args:
        window: the steps.
        segments: their own work.
        starts: first step of each training but the first.
    """
    edges = np.unique(np.searchsorted(window.steps, starts))
    edges = edges[(edges > 0) & (edges < len(window))]
    if not len(edges):
        return segments

    trainings = np.split(np.arange(len(window)), edges)
    parts = {part: _even(segments.parts[part], trainings) for part in COMPUTE if part in segments.parts}
    changed = segments.changed(parts, segments.step)
    waiting = np.maximum(segments.step - segments.own.mean(axis=0), 0)
    step = changed.own.mean(axis=0) + _even(waiting[None], trainings)[0]
    return segments.changed(parts, np.asarray(step, segments.step.dtype))


def _even(values: Floats, trainings: Sequence[NDArray[np.intp]]) -> Floats:
    """Return the values of each training over its usual one, at their sum before."""
    even = values.astype(np.float64)
    for columns in trainings:
        usual = float(np.quantile(even[:, columns], _USUAL))
        even[:, columns] /= usual if usual > 0 else 1.0

    whole = float(even.sum())
    return np.asarray(even * (float(values.sum()) / whole if whole > 0 else 0.0), dtype=values.dtype)
