"""Length of the latest steps, by which the work between them is planned.

Every 64 steps the instrumentation looks after itself. That takes 90 us and leaves cold caches to the next steps: 1.5 us
per step of 70 us. Where steps take less than a millisecond it happens ten times a second, after the first 256 of a run.
"""

from __future__ import annotations

from traceml.clock import monotonic_ns

__all__ = ["SHORT_STEP_NS", "StepPace"]

SHORT_STEP_NS = 1_000_000
"""Shorter steps are disturbed less often."""
_FIRST_STEPS = 256
_SELDOM_NS = 100_000_000


class StepPace:
    """Mean time of the latest steps.

    Attributes:
        step_ns: between the last two calls of `note`, in nanoseconds.
    """

    def __init__(self) -> None:
        self.step_ns = 0
        self._rows = self._at_ns = self._was_due_ns = 0

    def record(self, rows: int) -> None:
        """Measure the steps since the last call."""
        now = monotonic_ns()
        self.step_ns = (now - self._at_ns) // max(rows - self._rows, 1)
        self._rows, self._at_ns = rows, now

    def is_due(self) -> bool:
        """Return whether the instrumentation is looked after now."""
        is_due = (
            self.step_ns >= SHORT_STEP_NS or self._rows <= _FIRST_STEPS or self._at_ns - self._was_due_ns >= _SELDOM_NS
        )
        if is_due:
            self._was_due_ns = self._at_ns

        return is_due
