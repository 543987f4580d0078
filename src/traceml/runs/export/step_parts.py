"""Parts of steps in drawing order, with their bounds.

A row has the duration of each phase, not its time. Phases are drawn one after the other in their usual order.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from traceml.database.schema import PHASE_LABELS, in_phase_order
from traceml.diagnosis.steps.aligned_steps import Ints
from traceml.diagnosis.steps.step_split import own_backward

__all__ = ["DEVICE_PARTS", "STEP_PARTS", "device_parts", "part_bounds", "step_parts", "waiting_of"]


_CATEGORIES = {"input_wait": "input", "h2d": "transfer", "comm": "comm", "checkpoint": "checkpoint", "wait": "comm"}
_ORDER = in_phase_order(label for label in PHASE_LABELS if label != "user")
_AFTER_BACKWARD = _ORDER.index("backward") + 1
_PHASES = (*_ORDER[:_AFTER_BACKWARD], "wait", *_ORDER[_AFTER_BACKWARD:])
STEP_PARTS = (*((name, _CATEGORIES.get(name, "compute")) for name in _PHASES), ("user", "user"), ("other", "other"))
"""(name, category) of the parts of a step. `wait` is the waiting for other ranks inside backward."""
_DEVICE = ("h2d", "forward", "backward", "wait", "comm", "optimizer")
DEVICE_PARTS = tuple((name, "comm" if name in ("wait", "comm") else "device") for name in _DEVICE)
"""(name, category) of the parts of a device step."""


def waiting_of(rows: Any, *, grouped: bool) -> Ints:
    """Return the nanoseconds of waiting inside backward, -1 where it was not measured.

    Args:
        rows: rows of steps or of device steps.
        grouped: whether the ranks wait for each other.
    """
    if not grouped:
        return np.full(len(rows), -1)

    backward, own = rows["backward_ns"], np.where(rows["backward_own_ns"] < 0, np.nan, rows["backward_own_ns"])
    return np.where(np.isnan(own), -1, backward - own_backward(backward, own)).astype(np.int64)


def step_parts(rows: Any, waiting: Ints) -> Ints:
    """Return nanoseconds, step x `STEP_PARTS`."""
    parts = _matrix(rows, waiting, [name for name, _ in STEP_PARTS[:-1]])
    return np.column_stack([parts, rows["total_ns"] - parts.sum(axis=1)])


def device_parts(rows: Any, waiting: Ints) -> Ints:
    """Return nanoseconds, step x `DEVICE_PARTS`."""
    return _matrix(rows, waiting, _DEVICE)


def _matrix(rows: Any, waiting: Ints, names: Any) -> Ints:
    wait = np.maximum(waiting, 0)
    columns = {"wait": wait, "backward": rows["backward_ns"] - wait}
    return np.column_stack([columns[name] if name in columns else rows[f"{name}_ns"] for name in names])


def part_bounds(begin: Ints, end: Ints, parts: Ints) -> tuple[Ints, Ints]:
    """Return start and end of each part: one after the other from `begin`, none after `end`."""
    ends = np.minimum(begin[:, None] + np.cumsum(np.maximum(parts, 0), axis=1), end[:, None])
    return np.column_stack([np.minimum(begin, end), ends[:, :-1]]), ends
