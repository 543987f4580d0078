"""Warnings in the script's own output that a tracker does not accept what is logged.

Delivery runs in other processes, so the script would not show its errors. Each tracker is reported once: some time
after the start, when a wrong address or key has shown, or at the end.
"""

from __future__ import annotations

import logging
from pathlib import Path

from traceml.track.tracker_state import FAILING_PHASES, DeliveryPhase, states_of

__all__ = ["TrackerWarnings"]

_TEXT_CHARS = 200

_log = logging.getLogger("traceml")


class TrackerWarnings:
    """Warnings of one process about its run's trackers, each shown once."""

    def __init__(self) -> None:
        self._warned: set[str] = set()

    def show(self, run_dir: Path) -> None:
        """Warn about each tracker that fails now and was not reported yet.

        Args:
            run_dir: the run's folder; when it is on another host, nothing is known here.
        """
        for state in states_of(run_dir):
            if state.phase not in FAILING_PHASES or not state.error or state.backend in self._warned:
                continue

            self._warned.add(state.backend)
            error = state.error if len(state.error) <= _TEXT_CHARS else f"{state.error[:_TEXT_CHARS]}..."
            is_broken = state.phase is DeliveryPhase.BROKEN
            next_try = "once that is mended, " if is_broken else "it is tried again, and "
            _log.warning(
                "%s%s does not accept what is logged (%s). The rows are kept in %s: %s`traceml sync` delivers them.",
                state.backend, f" at {state.target}" if state.target else "", error, run_dir, next_try,
            )  # fmt: skip
