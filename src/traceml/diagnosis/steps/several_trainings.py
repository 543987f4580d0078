"""Steps of several trainings in one run (a sweep, layers that are unfrozen later): split, or scaled to one.

Computation and waiting for other ranks depend on the model, so rules that look for irregular steps would report the
change of model. Both are scaled here to one usual value for all trainings; their sum stays the same. A change over time
is looked for in each training by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from traceml.diagnosis.steps.aligned_steps import AlignedSteps
from traceml.diagnosis.steps.own_work import COMPUTE, OwnWork
from traceml.diagnosis.steps.step_split import Floats

__all__ = ["as_one_training", "trainings_of"]

_USUAL = 0.25  # half of a training may be slow
_LASTING = 20
_SAME_SIZE = 0.02


def as_one_training(window: AlignedSteps, work: OwnWork, starts: Sequence[int]) -> OwnWork:
    """Return a window in which all trainings compute equally long.

    Args:
        starts: first step of each training but the first.
    """
    edges = np.unique(np.searchsorted(window.steps, starts))
    edges = edges[(edges > 0) & (edges < len(window))]
    if not len(edges):
        return work

    trainings = np.split(np.arange(len(window)), edges)
    parts = {part: _even(work.parts[part], trainings) for part in COMPUTE if part in work.parts}
    changed = work.changed(parts, work.step)
    waiting = np.maximum(work.step - work.own.mean(axis=0), 0)
    step = changed.own.mean(axis=0) + _even(waiting[None], trainings)[0]
    even = work.changed(parts, np.asarray(step, work.step.dtype))
    return replace(even, leveled_ns=work.step - even.step)


def trainings_of(
    window: AlignedSteps, starts: Sequence[int], returns: Mapping[int, int] | None = None
) -> list[NDArray[np.bool_]]:
    """Return the steps of each training, whose model and size of batches are the same, in the order of their starts.

    Args:
        returns: starts of those that train an earlier model again, with its first step.
    """
    models = np.array([0, *((returns or {}).get(step, step) for step in sorted(starts))])
    of_model = models[np.searchsorted(np.sort(starts), window.steps, side="right")]
    keys = of_model * (len(window) + 1) + _sizes(window)
    _, first, of_step = np.unique(keys, return_index=True, return_inverse=True)
    return [of_step == training for training in np.argsort(first).tolist()]


def _sizes(window: AlignedSteps) -> NDArray[np.intp]:
    """Return the number of each step's batch size, among those that last for some steps, as in progressive resizing."""
    sizes = window.mean_elements
    numbers = np.zeros(len(window), np.intp)
    if not len(sizes) or (sizes <= 0).any():
        return numbers

    bounds = np.array([0, *(np.flatnonzero(np.diff(sizes)) + 1).tolist(), len(sizes)])
    known: list[float] = []
    for start in bounds[:-1][np.diff(bounds) >= _LASTING].tolist():
        size = float(sizes[start])
        number = next((at for at, one in enumerate(known) if abs(size - one) <= _SAME_SIZE * one), len(known))
        known += [size] if number == len(known) else []
        numbers[start:] = number

    return numbers


def _even(values: Floats, trainings: Sequence[NDArray[np.intp]]) -> Floats:
    """Return the values of all trainings scaled to one usual value; their sum stays the same.

    The excess over the usual value is scaled too, but never up: a part that hardly takes time in one training may be
    delayed there by as much as in another one.
    """
    even = values.astype(np.float64)
    usual = [float(np.quantile(even[:, columns], _USUAL)) for columns in trainings]
    level = sum(each * len(columns) for each, columns in zip(usual, trainings, strict=True)) / values.shape[1]
    for each, columns in zip(usual, trainings, strict=True):
        in_proportion = even[:, columns] * (level / each) if each > 0 else np.full_like(even[:, columns], np.inf)
        even[:, columns] = np.minimum(in_proportion, level + np.maximum(even[:, columns] - each, 0))

    whole = float(even.sum())
    return np.asarray(even * (float(values.sum()) / whole if whole > 0 else 0.0), dtype=values.dtype)
