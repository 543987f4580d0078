"""Telling the user, among the script's own words, that a tracker does not take what is logged.

Delivery happens in other processes, so the script would hear nothing of it. Said once for each tracker: some time after
the start, when a wrong address or key has shown, and at the end.
"""

from __future__ import annotations

import logging
from pathlib import Path

from traceml.track.tracker_state import DeliveryPhase, states_of

__all__ = ["TrackerWarnings"]

_TROUBLED = {DeliveryPhase.WAITING, DeliveryPhase.OPEN, DeliveryPhase.UNAUTHORIZED, DeliveryPhase.BROKEN}
_TEXT_CHARS = 200

_log = logging.getLogger("traceml")


class TrackerWarnings:
    """What one process has told of its run's trackers."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def tell(self, run_dir: Path) -> None:
        """Warn of each tracker that fails now and was not told yet.

        Args:
            run_dir: the run's folder; where it is on another host, nothing is known here.
        """
        for state in states_of(run_dir):
            if state.phase not in _TROUBLED or not state.error or state.backend in self._told:
                continue

            self._told.add(state.backend)
            error = state.error if len(state.error) <= _TEXT_CHARS else f"{state.error[:_TEXT_CHARS]}..."
            goes_on = "" if state.phase is DeliveryPhase.BROKEN else "it is tried again, and "
            _log.warning(
                "%s%s does not take what is logged (%s). It is kept in %s: %s`traceml sync` delivers it.",
                state.backend, f" at {state.target}" if state.target else "", error, run_dir, goes_on,
            )  # fmt: skip
