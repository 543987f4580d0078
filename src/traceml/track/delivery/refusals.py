"""Finding the rows that a tracker refuses, so that all others go on.

A batch that is refused is halved until one row is left; that one is counted, with the reason, and left out. Where the
search stands is kept in the delivery's memory: a backend that has to start over comes by the same rows again, and finds
what was found before. One that refuses everything is broken: then the rows that it refused last are taken back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

from traceml.track.delivery.record_reader import RecordBatch, position
from traceml.track.tracker_state import TrackerState

__all__ = ["RefusalOutcome", "RefusalSearch", "count_refused"]

_IN_A_ROW = 50
_REASONS = 20
_KEY = "suspect"


class RefusalOutcome(Enum):
    """What a refusal came to."""

    SEARCHING = "searching"  # read again: the next batch is smaller
    FOUND = "found"  # one row, which is left out; the cursor is behind it
    EVERYTHING = "everything"  # row after row: the tracker is broken, and what it refused last is taken back


class RefusalSearch:
    """The search for refused rows of one delivery.

    Args:
        state: its state.
    """

    def __init__(self, state: TrackerState) -> None:
        self._state = state

    def limit(self, here: Mapping[str, int], usual: int) -> int:
        """Return how many rows the next batch takes at most.

        Args:
            here: where it begins.
            usual: as many as where nothing is refused.
        """
        search = self._search
        if search is None or not position(search["from"]) <= position(here) < position(search["to"]):
            return usual

        return int(search["rows"])

    def stops(self) -> Iterator[dict[str, int]]:
        """Yield where a batch has to end: around what is searched, and around each row that was found."""
        search = self._search
        if search is None:
            return

        for part in (search, *search["found"]):
            yield part["from"]
            yield part["to"]

    def knows(self, batch: RecordBatch) -> bool:
        """Whether a batch is a row that was refused before, by a backend that now starts over."""
        search = self._search
        return search is not None and any(found["to"] == batch.cursor for found in search["found"])

    def passed(self) -> None:
        """Note that a batch was taken: the tracker does not refuse everything."""
        if self._search is not None:
            self._search["in_a_row"] = 0

    def note(self, batch: RecordBatch, here: Mapping[str, int], why: str) -> RefusalOutcome:
        """Note that a batch was refused.

        Args:
            batch: the batch.
            here: where it began.
            why: what the tracker said.
        """
        search = self._state.memory.setdefault(_KEY, {"found": [], "in_a_row": 0})
        search |= {"from": dict(here), "to": dict(batch.cursor), "rows": max(batch.rows // 2, 1)}
        if batch.rows > 1:
            return RefusalOutcome.SEARCHING

        if batch.rows and batch.frames:  # the row, or what is made of the frames before it: those first
            search["to"] = {"frame": batch.frames[-1].id, "row": 0}
            return RefusalOutcome.SEARCHING

        search["found"].append({"from": dict(here), "to": dict(batch.cursor)})
        search["in_a_row"] += 1
        if search["in_a_row"] > _IN_A_ROW:
            self._take_back(search)
            return RefusalOutcome.EVERYTHING

        self._leave_out(batch, why)
        return RefusalOutcome.FOUND

    def carried(self) -> dict[str, Any]:
        """Return what a delivery that starts over takes along in its memory."""
        return {_KEY: self._search} if self._search is not None else {}

    @property
    def _search(self) -> Any:
        return self._state.memory.get(_KEY)

    def _leave_out(self, batch: RecordBatch, why: str) -> None:
        state = self._state
        state.passed += batch.rows
        state.cursor = dict(batch.cursor)
        if batch.rows:
            count_refused(state, why)

    def _take_back(self, search: dict[str, Any]) -> None:
        state, n = self._state, search["in_a_row"]
        state.cursor = search["found"][-n]["from"]
        state.failed -= n - 1
        state.passed -= n - 1
        state.reasons.clear()
        del search["found"][-n:]
        search["in_a_row"] = 0
        if not search["found"]:
            del state.memory[_KEY]


def count_refused(state: TrackerState, why: str) -> None:
    """Count a row that is refused for good, with the reason."""
    state.failed += 1
    if why in state.reasons or len(state.reasons) < _REASONS:
        state.reasons[why] = state.reasons.get(why, 0) + 1
