"""Classification of failures, and the time of the next try."""

from __future__ import annotations

import email.message
import email.utils
import json
import time
import urllib.error
from typing import Any

import pytest
import requests

from traceml.errors import BackendBusyError, BackendRefusedError, BackendUnauthorizedError, PluginError
from traceml.track.delivery.retry_policy import RetryPolicy, succeeded
from traceml.track.plugins.failure_kinds import FailureKind, TrackerFailure, classify, error_of_status, retry_after_s
from traceml.track.tracker_state import DeliveryPhase, TrackerState

TRANSIENT = TrackerFailure(FailureKind.TRANSIENT, "no route")


def http_error(status: int, **headers: str) -> Exception:
    """Return the exception that `requests` raises for a response of this status."""
    response = requests.Response()
    response.status_code = status
    response.headers.update(headers)
    return requests.HTTPError(f"{status}", response=response)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConnectionRefusedError("no"), FailureKind.TRANSIENT),
        (TimeoutError(), FailureKind.TRANSIENT),
        (requests.ConnectionError("no"), FailureKind.TRANSIENT),
        (requests.exceptions.InvalidJSONError("an answer cut short"), FailureKind.TRANSIENT),
        (OSError(28, "No space left on device"), FailureKind.TRANSIENT),
        (OSError(36, "File name too long"), FailureKind.REFUSED),
        (IsADirectoryError(21, "Is a directory"), FailureKind.REFUSED),
        (http_error(500), FailureKind.TRANSIENT),
        (http_error(502), FailureKind.TRANSIENT),
        (BackendBusyError("later", 7.0), FailureKind.BUSY),
        (http_error(429), FailureKind.BUSY),
        (http_error(503), FailureKind.BUSY),
        (BackendUnauthorizedError("no"), FailureKind.UNAUTHORIZED),
        (http_error(401), FailureKind.UNAUTHORIZED),
        (urllib.error.HTTPError("http://h", 403, "no", email.message.Message(), None), FailureKind.UNAUTHORIZED),
        (BackendRefusedError("bad name"), FailureKind.REFUSED),
        (http_error(400), FailureKind.REFUSED),
        (ValueError("not a number"), FailureKind.REFUSED),
        (ModuleNotFoundError("wandb"), FailureKind.BROKEN),
        (AttributeError("module has no attribute"), FailureKind.BROKEN),
        (PluginError("no such backend"), FailureKind.BROKEN),
    ],
    ids=lambda value: f"{type(value).__name__}-{value}" if isinstance(value, Exception) else str(value),
)  # fmt: skip
def test_failures_are_told_apart(error: Exception, kind: FailureKind) -> None:
    assert classify(error).kind is kind


def test_the_cause_counts_where_a_library_wraps_it() -> None:
    """An SDK's own exception around an HTTP error is what the HTTP error was."""
    wrapped = RuntimeError("could not log")
    wrapped.__cause__ = http_error(429, **{"Retry-After": "12"})

    assert classify(wrapped) == TrackerFailure(FailureKind.BUSY, "RuntimeError: could not log", 12.0)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 407, 409, 413, 422, 429, 431, 500, 502, 503])
def test_a_status_means_the_same_wherever_it_is_read(status: int) -> None:
    """By a backend from its tracker's answer, or by the delivery from an exception of a library."""
    error = error_of_status("MLflow", status, "why", retry_after="12")

    by_exception = classify(http_error(status, **{"Retry-After": "12"}))
    assert classify(error).kind is by_exception.kind
    assert classify(error).retry_after_s == by_exception.retry_after_s
    assert f"({status}): why" in str(error)


def test_retry_after_is_a_number_or_a_date() -> None:
    assert retry_after_s("3.5") == 3.5
    assert 500 < (retry_after_s(email.utils.formatdate(time.time() + 600, usegmt=True)) or 0) <= 601
    assert retry_after_s("soon") is None


def wait_after(policy: RetryPolicy, state: TrackerState, failure: TrackerFailure) -> float:
    before = time.time()
    waits = policy.record_failure(state, failure)
    assert before + waits <= state.retry_at <= time.time() + waits
    return waits


def test_waits_grow_with_jitter_and_then_the_breaker_opens() -> None:
    policy, state = RetryPolicy(max_retries=3, backoff_factor=2.0, max_backoff=60.0), TrackerState("x")

    waits = [wait_after(policy, state, TRANSIENT) for _ in range(2)]

    assert state.phase is DeliveryPhase.WAITING
    assert [low <= wait <= 2 * low for wait, low in zip(waits, (0.25, 0.5), strict=True)] == [True] * 2
    assert [wait_after(policy, state, TRANSIENT) for _ in range(5)] == [60.0] * 5
    assert state.phase is DeliveryPhase.OPEN
    assert state.error == "no route"


def test_a_success_closes_the_breaker() -> None:
    policy, state = RetryPolicy(max_retries=0), TrackerState("x")
    wait_after(policy, state, TRANSIENT)
    assert state.phase is DeliveryPhase.OPEN

    succeeded(state)

    assert (state.phase, state.retries, state.retry_at, state.error) == (DeliveryPhase.DELIVERING, 0, 0.0, "")


def test_one_that_is_busy_is_left_alone_as_long_as_it_says_and_its_breaker_stays_closed() -> None:
    policy, state = RetryPolicy(max_retries=1), TrackerState("x")

    waits = [wait_after(policy, state, TrackerFailure(FailureKind.BUSY, "429", 90.0)) for _ in range(5)]

    assert waits == [90.0] * 5
    assert state.phase is DeliveryPhase.WAITING


@pytest.mark.parametrize(
    ("kind", "phase"),
    [(FailureKind.UNAUTHORIZED, DeliveryPhase.UNAUTHORIZED), (FailureKind.BROKEN, DeliveryPhase.BROKEN)],
)
def test_what_a_person_has_to_mend_is_probed_rarely(kind: FailureKind, phase: DeliveryPhase) -> None:
    state = TrackerState("x")

    assert wait_after(RetryPolicy(max_backoff=30.0), state, TrackerFailure(kind, "no")) == 30.0
    assert state.phase is phase


def test_a_state_survives_and_a_damaged_one_counts_as_none(tmp_path: Any) -> None:
    state = TrackerState("pkg.mod:Back/End", phase=DeliveryPhase.OPEN, cursor={"frame": 3, "row": 7}, delivered=5)
    state.resume = {"event": 9, "derived": {"ranks": 2}}
    state.save(tmp_path)

    assert TrackerState.load(tmp_path, "pkg.mod:Back/End") == state
    stored = json.loads(TrackerState.path_in(tmp_path, "pkg.mod:Back/End").read_text())
    assert stored["resume"] == {"event": 9, "derived": {"ranks": 2}}

    TrackerState.path_in(tmp_path, "pkg.mod:Back/End").write_text("{")
    assert TrackerState.load(tmp_path, "pkg.mod:Back/End") == TrackerState("pkg.mod:Back/End")
