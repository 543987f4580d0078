"""Search for the rows that a tracker refuses, so that all others are delivered.

A refused batch is halved until one row is left; that row is counted, with the reason, and skipped. The state of the
search is part of the delivery's state: a backend that has to start over reads the same rows again and skips those
found before. A tracker that refuses everything is broken: the rows that it refused last are then no longer skipped.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum

from traceml.track.delivery.record_reader import RecordBatch, position
from traceml.track.plugins.failure_kinds import FailureKind, classify
from traceml.track.tracker_state import ResumeState, SuspectState, TrackerState

__all__ = ["RefusalOutcome", "RefusalSearch", "count_refused", "refusal_counted"]

_MAX_CONSECUTIVE = 50
_REASONS = 20
_log = logging.getLogger("traceml")


class RefusalOutcome(Enum):
    """Result of a refused batch."""

    SEARCHING = "searching"  # read again: the next batch is smaller
    FOUND = "found"  # one row, which is skipped; the cursor is behind it
    EVERYTHING = "everything"  # row after row: the tracker is broken, and the rows refused last are not skipped


class RefusalSearch:
    """Search for the refused rows of one delivery."""

    def __init__(self, state: TrackerState) -> None:
        self._state = state

    def limit(self, here: Mapping[str, int], usual: int) -> int:
        """Return the most rows of the next batch."""
        search = self._search
        if search is None or not position(search["from"]) <= position(here) < position(search["to"]):
            return usual

        return int(search["rows"])

    def stops(self) -> Iterator[dict[str, int]]:
        """Yield the cursors at which a batch has to end: around the searched range, and around each refused row."""
        search = self._search
        if search is None:
            return

        yield from (search["from"], search["to"])
        for found in search["found"]:
            yield from (found["from"], found["to"])

    def knows(self, batch: RecordBatch) -> bool:
        """Whether a batch is a row that was refused before, for a backend that starts over."""
        search = self._search
        return search is not None and any(found["to"] == batch.cursor for found in search["found"])

    def passed(self) -> None:
        """Record that a batch was accepted: the tracker does not refuse everything."""
        if self._search is not None:
            self._search["in_a_row"] = 0

    def record(self, batch: RecordBatch, here: Mapping[str, int], why: str) -> RefusalOutcome:
        """Record a refused batch."""
        search = self._state.resume.setdefault("suspect", {"found": [], "in_a_row": 0})
        search.update({"from": dict(here), "to": dict(batch.cursor), "rows": max(batch.rows // 2, 1)})
        if batch.rows > 1:
            return RefusalOutcome.SEARCHING

        if batch.rows and batch.frames:
            # The row may be refused, or values derived from the frames before it: try those first.
            search["to"] = {"frame": batch.frames[-1].id, "row": 0}
            return RefusalOutcome.SEARCHING

        search["found"].append({"from": dict(here), "to": dict(batch.cursor)})
        search["in_a_row"] += 1
        if search["in_a_row"] > _MAX_CONSECUTIVE:
            self._unskip(search)
            return RefusalOutcome.EVERYTHING

        self._skip(batch, why)
        return RefusalOutcome.FOUND

    def carried(self) -> ResumeState:
        """Return what a delivery keeps when it starts over."""
        return {"suspect": self._search} if self._search is not None else {}

    @property
    def _search(self) -> SuspectState | None:
        return self._state.resume.get("suspect")

    def _skip(self, batch: RecordBatch, why: str) -> None:
        state = self._state
        state.passed += batch.rows
        state.reach(batch.reached)
        state.cursor = dict(batch.cursor)
        if batch.rows:
            count_refused(state, why)

    def _unskip(self, search: SuspectState) -> None:
        state, n = self._state, search["in_a_row"]
        state.cursor = search["found"][-n]["from"]
        state.failed -= n - 1
        state.passed -= n - 1
        state.reached.clear()
        state.reasons.clear()
        del search["found"][-n:]
        search["in_a_row"] = 0
        if not search["found"]:
            del state.resume["suspect"]


@contextmanager
def refusal_counted(state: TrackerState, what: str) -> Iterator[None]:
    """Count what the block sends where the tracker refuses it, or has no such thing: it costs nothing else."""
    try:
        yield
    except Exception as error:
        failure = classify(error)  # a backend of a third party may not support artifacts
        if failure.kind is not FailureKind.REFUSED and not isinstance(error, NotImplementedError):
            raise

        _log.warning("%s refuses %s: %s", state.backend, what, failure.text)
        count_refused(state, failure.text)


def count_refused(state: TrackerState, why: str) -> None:
    """Count a refused row, with the reason."""
    state.failed += 1
    if why in state.reasons or len(state.reasons) < _REASONS:
        state.reasons[why] = state.reasons.get(why, 0) + 1
