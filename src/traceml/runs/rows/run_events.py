"""Events of a run for people, the newest ones: verdicts, ends of ranks, alerts; no readings of the machine."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from traceml.database.snapshots import SNAPSHOT
from traceml.database.source_reading import SOURCE
from traceml.database.store.reader import RunEvent
from traceml.diagnosis.facts.core_waits import CORE_TAKERS
from traceml.diagnosis.merged_hosts.host_sums import HOST_SUMS
from traceml.diagnosis.steps.representatives import HOST_CHOICE

__all__ = ["RunEvents"]

_KEPT = 200
_READINGS = {SNAPSHOT, CORE_TAKERS, HOST_CHOICE, HOST_SUMS, SOURCE}
"""Kinds that are stored for the diagnosis, whose finding tells what they say, or for the run's overview."""


class RunEvents:
    """The newest 200 events of a run; a reading, and a verdict with only other numbers, displaces none of them."""

    def __init__(self) -> None:
        self._kept: deque[RunEvent] = deque(maxlen=_KEPT)
        self._verdict: tuple[object, ...] | None = None

    def __iter__(self) -> Iterator[RunEvent]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def __repr__(self) -> str:
        return f"<RunEvents: {len(self)}>"

    def take(self, event: RunEvent) -> None:
        """Keep an event if it is one for people, and new."""
        if event.kind in _READINGS or (event.kind == "verdict" and not self._is_new(event)):
            return

        self._kept.append(event)

    def _is_new(self, event: RunEvent) -> bool:
        """Return whether a verdict says something new: it is stored again each time its numbers change."""
        first = (event.data.get("findings") or [{}])[0]
        before, self._verdict = self._verdict, tuple(first.get(key) for key in ("kind", "ranks", "phase"))
        return self._verdict != before
