"""Classification of what a tracker raises.

The kind of a failure follows from its type where a backend raises ours, else from what SDKs and HTTP libraries put on
their exceptions.

Process: delivery.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from enum import StrEnum
from typing import Any, NamedTuple

from traceml.errors import (
    BackendBusyError,
    BackendError,
    BackendRefusedError,
    BackendUnauthorizedError,
    PluginError,
    SettingsError,
)

__all__ = ["FailureKind", "StartError", "TrackerFailure", "classify", "error_of_status", "retry_after_s"]

_TEXT_LIMIT = 500
_UNAUTHORIZED, _BUSY, _REFUSED = {401, 403, 407}, {429, 503}, {400, 409, 413, 414, 415, 422, 431}
_ARGUMENT_ERRORS = (ValueError, TypeError, OverflowError, KeyError)
_NAME_ERRORS = {errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR}


class FailureKind(StrEnum):
    """Kind of a failure, by what would help."""

    TRANSIENT = "transient"  # the same call again, later
    BUSY = "busy"  # the same call again, when the tracker asked for it
    UNAUTHORIZED = "unauthorized"  # another key
    REFUSED = "refused"  # other rows
    BROKEN = "broken"  # another installation


class TrackerFailure(NamedTuple):
    """One classified failure."""

    kind: FailureKind
    text: str
    retry_after_s: float | None = None


class StartError(Exception):
    """A run cannot be started at a tracker. No row is the cause, even where the tracker answers as if one were."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        failure = classify(cause)
        if failure.kind is FailureKind.REFUSED:
            is_answer = isinstance(cause, BackendRefusedError) or not isinstance(cause, _ARGUMENT_ERRORS)
            kind = FailureKind.TRANSIENT if is_answer else FailureKind.BROKEN
            failure = TrackerFailure(kind, f"the run cannot be started: {failure.text}")

        self.failure = failure


def classify(error: BaseException) -> TrackerFailure:
    """Return the classified failure for an exception of a backend."""
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

    # Raised without an answer of the tracker: the row itself cannot be converted to the tracker's form, or to a file.
    is_name = any(isinstance(each, OSError) and each.errno in _NAME_ERRORS for each in _chain(error))
    if is_name or (isinstance(error, _ARGUMENT_ERRORS) and not _is_network_error(error)):
        return TrackerFailure(FailureKind.REFUSED, text)

    return TrackerFailure(FailureKind.TRANSIENT, text)


_BY_TYPE: dict[FailureKind, Any] = {
    FailureKind.UNAUTHORIZED: BackendUnauthorizedError,
    FailureKind.REFUSED: BackendRefusedError,
    FailureKind.BROKEN: (ImportError, AttributeError, PluginError, NotImplementedError, SettingsError),
}


def error_of_status(tracker: str, status: int | None, why: str, *, retry_after: str | None = None) -> BackendError:
    """Return the error for a tracker's answer, by its HTTP status.

    Args:
        tracker: its name in the message.
        status: None where it is not known.
        why: its text.
        retry_after: the answer's header of that name.
    """
    if status in _UNAUTHORIZED:
        return BackendUnauthorizedError(f"{tracker} does not accept the credentials ({status}): {why}")
    if status in _BUSY:
        seconds = retry_after_s(retry_after) if retry_after else None
        return BackendBusyError(f"{tracker} is busy ({status}): {why}", seconds)
    if status in _REFUSED:
        return BackendRefusedError(f"{tracker} refuses the rows ({status}): {why}")

    return BackendError(f"{tracker} failed{'' if status is None else f' ({status})'}: {why}")


def _text_of(error: BaseException) -> str:
    message = " ".join(str(error).split())
    text = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return text if len(text) <= _TEXT_LIMIT else f"{text[:_TEXT_LIMIT]}…"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _is_network_error(error: BaseException) -> bool:
    """Whether the connection failed: `requests` derives some of its errors from ValueError too."""
    return any(isinstance(each, OSError) for each in _chain(error))


def _status_of(error: BaseException) -> int | None:
    """Return the HTTP status that an exception carries, as requests, httpx, urllib, MLflow and W&B put it there."""
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
    header = headers.get("Retry-After") if headers is not None and hasattr(headers, "get") else None
    return retry_after_s(header) if isinstance(header, str) else None


def retry_after_s(header: str) -> float | None:
    """Return the seconds of a Retry-After header, which holds a number or a date; None for anything else."""
    try:
        return max(float(header), 0.0)
    except ValueError:
        pass

    from email.utils import parsedate_to_datetime  # the rank imports this module, but needs no dates

    try:
        return max(parsedate_to_datetime(header).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError):
        return None
