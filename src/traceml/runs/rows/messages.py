"""Messages and events of a run for people, the newest ones: warnings, logged texts, verdicts, ends of ranks, alerts."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from traceml.database.info_kinds import InfoKind
from traceml.database.schema import INFO, LOGGED
from traceml.database.snapshots.rank_snapshot import SNAPSHOT
from traceml.database.source_record import SOURCE
from traceml.database.store.reader import RunEvent, StoreReader
from traceml.diagnosis.facts.core_waits import COMPETING_PROCESSES
from traceml.diagnosis.merged_hosts.host_sums import HOST_SUMS
from traceml.diagnosis.steps.representatives import HOST_CHOICE
from traceml.formatting import ranks_text
from traceml.runs.rows.logged_rows import LoggedRows

__all__ = ["RunEvents", "RunMessage", "RunMessages"]

_KEPT = 500
_FIRST_READ = 5_000  # frames at the end of a store that are read at first
_MAX_CHARS = 500
_SILENT = {"end", InfoKind.SNAPSHOT, InfoKind.PROCESS, InfoKind.SAMPLER}  # kinds of rows without information for people
_EVENTS_KEPT = 200
_READINGS = {SNAPSHOT, COMPETING_PROCESSES, HOST_CHOICE, HOST_SUMS, SOURCE}
"""Kinds of events that are stored for the diagnosis, whose finding tells what they say, or for the run's overview."""
_HIDDEN = {"kind", "t_ns", "experiment"}


@dataclass(frozen=True, slots=True)
class RunMessage:
    """Line of a log."""

    epoch_s: float
    rank: int | None  # the rank that it is about; None for the run
    kind: str  # event, warning, text, …
    text: str


class RunMessages:
    """Follows the messages in a store by cursor, at most the newest 500."""

    def __init__(self) -> None:
        self._kept: deque[RunMessage] = deque(maxlen=_KEPT)
        self._rows = LoggedRows(INFO.name, LOGGED.name, first_read=_FIRST_READ)

    def update(self, reader: StoreReader) -> None:
        """Take what arrived since the last call."""
        for row in self._rows.new(reader):
            kind = str(row.values.get("kind", ""))
            if kind not in _SILENT:
                self._kept.append(RunMessage(row.epoch_s, row.rank, kind, _words(row.values)))

    def lines(self, events: Iterable[RunEvent] = ()) -> list[RunMessage]:
        """Return the messages, the run's events among them, the newest first."""
        from_events = [message for message in map(_message_of_event, events) if message is not None]
        joined: list[RunMessage] = []
        for message in sorted([*self._kept, *from_events], key=lambda message: message.epoch_s):
            # The same words again, as of a warning of every rank, tell nothing new.
            if not joined or replace(joined[-1], epoch_s=message.epoch_s) != message:
                joined.append(message)

        return joined[::-1]


class RunEvents:
    """The newest 200 events of a run; a reading, or what tells people nothing new, displaces none of them."""

    def __init__(self) -> None:
        self._kept: deque[RunEvent] = deque(maxlen=_EVENTS_KEPT)
        self._verdict: tuple[object, ...] | None = None
        self._ends: dict[object, tuple[object, ...]] = {}  # of each rank

    def __iter__(self) -> Iterator[RunEvent]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def __repr__(self) -> str:
        return f"<RunEvents: {len(self)}>"

    def take(self, event: RunEvent) -> None:
        """Keep an event if it is one for people, and new."""
        is_new = {"verdict": self._is_new_verdict, "rank": self._is_new_end}.get(event.kind)
        if event.kind not in _READINGS and (is_new is None or is_new(event)):
            self._kept.append(event)

    def _is_new_end(self, event: RunEvent) -> bool:
        """Return whether the end of a rank says something new: it is stored again with the report of its launcher."""
        rank, ended = event.data.get("rank"), event.data.get("exit") or {}
        before, facts = self._ends.get(rank), [ended.get(key) for key in ("exception", "message", "signal")]
        code = ended.get("code") if not any(facts) else None  # of an exception it is always 1
        self._ends[rank] = (event.data.get("attempt"), event.data.get("state"), code, *facts)
        return self._ends[rank] != before

    def _is_new_verdict(self, event: RunEvent) -> bool:
        """Return whether a verdict says something new: it is stored again each time its numbers change."""
        first = (event.data.get("findings") or [{}])[0]
        before, self._verdict = self._verdict, tuple(first.get(key) for key in ("kind", "ranks", "phase"))
        return self._verdict != before


def _message_of_event(event: RunEvent) -> RunMessage | None:
    """Return an event of the run as a message."""
    data, at_s = event.data, event.epoch_ns / 1e9
    if event.kind == "verdict":
        verdict = data.get("verdict") or (data.get("findings") or [{}])[0]
        where = f" on {ranks_text(verdict['ranks'])}" if verdict.get("ranks") else ""
        return RunMessage(at_s, None, "verdict", f"{verdict.get('kind', '')}{where}")

    if event.kind == "rank":
        return RunMessage(at_s, data.get("rank"), "rank", str(data.get("state", "")))

    return RunMessage(at_s, None, event.kind, _words(data))


def _words(row: Mapping[str, Any]) -> str:
    if isinstance(row.get("text"), str):
        parts = [part for part in (str(row.get("name") or ""), row["text"]) if part]
    else:
        shown = {key: value for key, value in row.items() if key not in _HIDDEN and value not in (None, "", {}, [])}
        parts = [_short(value) if key == row.get("kind") else f"{key} {_short(value)}" for key, value in shown.items()]

    return " ".join(", ".join(parts).split())[:_MAX_CHARS]


def _short(value: Any) -> str:
    return f"<{len(value)} bytes>" if isinstance(value, bytes) else str(value)
