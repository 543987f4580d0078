"""Waits between retries after a failure.

Waits grow by `backoff_factor` up to `max_backoff`, with jitter, so that a thousand jobs do not return at once. After
`max_retries` failures in a row the circuit breaker is open: then one probe per `max_backoff`. No row is given up.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from traceml.clock import jittered
from traceml.track.plugins.failure_kinds import FailureKind, TrackerFailure
from traceml.track.tracker_state import DeliveryPhase, TrackerState

__all__ = ["RetryPolicy", "succeeded"]

_FIRST_WAIT_S = 0.5
_LONGEST_ASKED_S = 3600.0


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Number of retries and the time between them."""

    max_retries: int = 3  # failures in a row before the breaker opens
    backoff_factor: float = 2.0
    max_backoff: float = 60.0  # longest wait, and the time between probes, in seconds

    def record_failure(self, state: TrackerState, failure: TrackerFailure) -> float:
        """Record a failure in a tracker's state, and return the seconds to wait before the next try."""
        now = time.time()
        state.error = failure.text
        if failure.kind is FailureKind.BUSY:
            asked_s = failure.retry_after_s
            wait_s = min(asked_s, _LONGEST_ASKED_S) if asked_s is not None else self._wait_s(state.retries)
            state.phase = DeliveryPhase.WAITING
            # Waits also grow for a tracker that is always busy and names no time.
            state.retries += asked_s is None
        elif failure.kind is FailureKind.UNAUTHORIZED:
            state.phase, wait_s = DeliveryPhase.UNAUTHORIZED, self.max_backoff
        elif failure.kind is FailureKind.BROKEN:
            state.phase, wait_s = DeliveryPhase.BROKEN, self.max_backoff
        else:
            wait_s = self._wait_s(state.retries)
            state.retries += 1
            state.phase = DeliveryPhase.WAITING
            if state.retries >= self.max_retries:
                state.phase, wait_s = DeliveryPhase.OPEN, self.max_backoff

        state.retry_at = now + wait_s
        return wait_s

    def _wait_s(self, failures: int) -> float:
        longest_s: float = min(_FIRST_WAIT_S * self.backoff_factor ** min(failures, 60), self.max_backoff)
        return jittered(longest_s)


def succeeded(state: TrackerState) -> None:
    """Record that the tracker accepted what it was given."""
    state.phase = DeliveryPhase.DELIVERING
    state.retries, state.retry_at, state.error = 0, 0.0, ""
