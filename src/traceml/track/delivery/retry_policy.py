"""What to do when a tracker fails: which kind of failure it is, and when to try again.

A failure is told by its type where a backend raises ours, else by what SDKs and HTTP libraries put on their exceptions.
Waits grow by `backoff_factor` up to `max_backoff`, with jitter, so that a thousand jobs do not come back at once. After
`max_retries` in a row the breaker is open: then one probe per `max_backoff`. Nothing is ever given up.
"""

from __future__ import annotations

import email.utils
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from traceml.errors import BackendBusyError, BackendRefusedError, BackendUnauthorizedError, PluginError, SettingsError
from traceml.track.tracker_state import DeliveryPhase, TrackerState

__all__ = ["FailureKind", "RetryPolicy", "StartError", "TrackerFailure", "classify", "retry_after_s", "succeeded"]

_FIRST_WAIT_S = 0.5
_TEXT_LIMIT = 500
_UNAUTHORIZED, _BUSY, _REFUSED = {401, 403, 407}, {429, 503}, {400, 409, 413, 414, 415, 422, 431}
_LONGEST_ASKED_S = 3600.0
# What is raised about the arguments of a call.
_OF_THE_CALL = (ValueError, TypeError, OverflowError, KeyError)


class FailureKind(StrEnum):
    """What a failure asks for."""

    TRANSIENT = "transient"  # the same again, later
    BUSY = "busy"  # the same again, when the tracker said
    UNAUTHORIZED = "unauthorized"  # another key
    REFUSED = "refused"  # other rows
    BROKEN = "broken"  # another installation


@dataclass(frozen=True, slots=True)
class TrackerFailure:
    """A failure as it was understood."""

    kind: FailureKind
    text: str
    retry_after_s: float | None = None


class StartError(Exception):
    """A run cannot be begun at a tracker; no row is to blame for what then looks like the refusal of one.

    Args:
        cause: what the backend raised.
    """

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        failure = classify(cause)
        if failure.kind is FailureKind.REFUSED:
            is_answer = isinstance(cause, BackendRefusedError) or not isinstance(cause, _OF_THE_CALL)
            kind = FailureKind.TRANSIENT if is_answer else FailureKind.BROKEN
            failure = TrackerFailure(kind, f"it cannot begin: {failure.text}")

        self.failure = failure


def classify(error: BaseException) -> TrackerFailure:
    """Return what kind of failure an exception of a backend is."""
    if isinstance(error, StartError):
        return error.failure

    text = _text_of(error)
    if isinstance(error, BackendBusyError):
        return TrackerFailure(FailureKind.BUSY, text, error.retry_after_s)

    for kind, types in _BY_TYPE.items():
        if isinstance(error, types):
            return TrackerFailure(kind, text)

    for each in _chain(error):
        status = _status_of(each)
        if status in _UNAUTHORIZED:
            return TrackerFailure(FailureKind.UNAUTHORIZED, text)
        if status in _BUSY:
            return TrackerFailure(FailureKind.BUSY, text, _retry_after_s(each))
        if status in _REFUSED:
            return TrackerFailure(FailureKind.REFUSED, text)

    # Raised without an answer of the tracker: the row itself cannot be put into the form that it wants.
    if isinstance(error, _OF_THE_CALL) and not _has_network(error):
        return TrackerFailure(FailureKind.REFUSED, text)

    return TrackerFailure(FailureKind.TRANSIENT, text)


_BY_TYPE: dict[FailureKind, Any] = {
    FailureKind.UNAUTHORIZED: BackendUnauthorizedError,
    FailureKind.REFUSED: BackendRefusedError,
    FailureKind.BROKEN: (ImportError, AttributeError, PluginError, NotImplementedError, SettingsError),
}


def _text_of(error: BaseException) -> str:
    said = " ".join(str(error).split())
    text = f"{type(error).__name__}: {said}" if said else type(error).__name__
    return text if len(text) <= _TEXT_LIMIT else f"{text[:_TEXT_LIMIT]}…"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _has_network(error: BaseException) -> bool:
    """Whether it is about the connection: `requests` derives some of its errors from ValueError too."""
    return any(isinstance(each, OSError) for each in _chain(error))


def _status_of(error: BaseException) -> int | None:
    """Return the HTTP status that an exception carries, as requests, httpx, urllib, MLflow, and W&B put it there."""
    response = getattr(error, "response", None)
    places = (error, response) if response is not None else (error,)
    for place in places:
        for name in ("status_code", "status", "code", "http_status"):
            status = getattr(place, name, None)
            if isinstance(status, int) and 400 <= status < 600:
                return status

    return None


def _retry_after_s(error: BaseException) -> float | None:
    headers = getattr(getattr(error, "response", None), "headers", None) or getattr(error, "headers", None)
    said = headers.get("Retry-After") if headers is not None and hasattr(headers, "get") else None
    return retry_after_s(said) if isinstance(said, str) else None


def retry_after_s(said: str) -> float | None:
    """Return the seconds of a Retry-After header, which holds a number or a date; None of neither."""
    try:
        return max(float(said), 0.0)
    except ValueError:
        pass

    try:
        return max(email.utils.parsedate_to_datetime(said).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError):
        return None


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When to try again.

    Args:
        max_retries: failures in a row before the breaker opens.
        backoff_factor: growth of the wait.
        max_backoff: longest wait, and the time between probes, in seconds.
    """

    max_retries: int = 3
    backoff_factor: float = 2.0
    max_backoff: float = 60.0

    def note(self, state: TrackerState, failure: TrackerFailure) -> float:
        """Put a failure into a backend's state, and return how many seconds to wait before the next try."""
        now = time.time()
        state.error, state.error_at = failure.text, now
        if failure.kind is FailureKind.BUSY:
            asked_s = failure.retry_after_s
            wait_s = min(asked_s, _LONGEST_ASKED_S) if asked_s is not None else self._wait_s(state.retries)
            state.phase = DeliveryPhase.WAITING
            # One that is always busy and never says until when is left more and more time, too.
            state.retries += asked_s is None
        elif failure.kind is FailureKind.UNAUTHORIZED:
            state.phase, wait_s = DeliveryPhase.UNAUTHORIZED, self.max_backoff
        elif failure.kind is FailureKind.BROKEN:
            state.phase, wait_s = DeliveryPhase.BROKEN, self.max_backoff
        else:
            is_open = state.retries >= self.max_retries
            state.phase = DeliveryPhase.OPEN if is_open else DeliveryPhase.WAITING
            wait_s = self.max_backoff if is_open else self._wait_s(state.retries)
            state.retries += 1

        state.retry_at = now + wait_s
        return wait_s

    def _wait_s(self, failures: int) -> float:
        longest_s: float = min(_FIRST_WAIT_S * self.backoff_factor ** min(failures, 60), self.max_backoff)
        return longest_s * random.uniform(0.5, 1.0)


def succeeded(state: TrackerState) -> None:
    """Note that the backend took what it was given."""
    state.phase = DeliveryPhase.DELIVERING
    state.retries, state.retry_at = 0, 0.0
    state.error, state.error_at = "", None
