"""Steps whose optimizer calls its closure several times, as L-BFGS does: more passes over the model are more work."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from traceml.diagnosis.steps.aligned_steps import AlignedSteps
from traceml.diagnosis.steps.own_work import COMPUTE, OwnWork
from traceml.diagnosis.steps.step_split import Floats

__all__ = ["without_more_passes"]

_PASSES = ("forward", "backward")
_REPEATED = (*COMPUTE, "other")  # a closure has code of its own, as the loss
_MORE = 1.5
"""Forward and backward both take this many times longer than usual where there are more passes."""


def without_more_passes(window: AlignedSteps, work: OwnWork) -> dict[str, Floats]:
    """Return parts as they would be if no optimizer called its closure more often than usual; empty if none does.

    What takes longer than the number of passes explains stays.
    """
    if not window.closures.any() or not all(part in work.parts for part in _PASSES):
        return {}

    usual = {part: np.median(work.parts[part], axis=1, keepdims=True) for part in _REPEATED if part in work.parts}
    passes = np.minimum(*(work.parts[part] / np.maximum(usual[part], 1) for part in _PASSES))
    has_more = window.closures & (passes >= _MORE)
    return {part: _without(work.parts[part], usual[part], passes, has_more) for part in usual} if has_more.any() else {}


def _without(values: Floats, usual_ns: Floats, passes: Floats, has_more: NDArray[np.bool_]) -> Floats:
    """Return a part without more passes; each may take half as long again as usual, on larger batches."""
    left = np.maximum(values - (_MORE * passes - 1) * usual_ns, np.minimum(values, usual_ns))
    return np.where(has_more, left, values)
