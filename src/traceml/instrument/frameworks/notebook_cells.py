"""Ends and begins of a notebook's cells: between them nothing trains."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from traceml.instrument.guard import Guard
    from traceml.instrument.step_clock import StepClock

__all__ = ["NotebookCells"]


class NotebookCells:
    """Pauses a clock between the cells of IPython's shell, if this process has one.

    Without it the time in which somebody reads, or writes the next cell, would be a step of minutes.
    """

    def __init__(self, clock: StepClock, guard: Guard) -> None:
        self._clock, self._guard = clock, guard
        self._events: Any = None

    def follow(self) -> None:
        """Handle the ends and begins of cells from now on."""
        shell = getattr(sys.modules.get("IPython"), "get_ipython", _no_shell)()
        if shell is None or self._events is not None:
            return

        shell.events.register("post_run_cell", self._end)
        shell.events.register("pre_run_cell", self._begin)
        self._events = shell.events

    def leave(self) -> None:
        """Handle no more of them."""
        events, self._events = self._events, None
        if events is not None:
            events.unregister("post_run_cell", self._end)
            events.unregister("pre_run_cell", self._begin)

    def _end(self, _result: Any) -> None:
        self._guard(self._clock.pause_training)

    def _begin(self, _info: Any) -> None:
        self._guard(self._clock.resume_training)


def _no_shell() -> None:
    """Return None, as IPython does outside of its shells."""
