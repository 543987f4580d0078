"""Messages of a run, the newest ones: events, warnings of ranks, logged texts."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from traceml.database.schema import INFO, LOGGED
from traceml.database.store.reader import RunEvent, StoreReader
from traceml.formatting import ranks_text
from traceml.runs.rows.aligned_clocks import RunClocks

__all__ = ["RunMessage", "RunMessages"]

_KEPT = 500
_FIRST_READ = 5_000  # frames at the end of a store that are read at first
_MAX_CHARS = 500
_SILENT = {"end", "snapshot", "process", "sampler"}  # kinds of rows without information for people
_HIDDEN = {"kind", "t_ns", "experiment"}


@dataclass(frozen=True, slots=True)
class RunMessage:
    """Line of a log.

    Attributes:
        rank: the rank that it is about; None for the run.
        kind: event, warning, text, …
    """

    epoch_s: float
    rank: int | None
    kind: str
    text: str


class RunMessages:
    """Follows the messages in a store by cursor, at most the newest 500."""

    def __init__(self) -> None:
        self._kept: deque[RunMessage] = deque(maxlen=_KEPT)
        self._after: int | None = None
        self._clocks = RunClocks(())
        self._ranks: dict[int, int] = {}

    def update(self, reader: StoreReader) -> None:
        """Take what arrived since the last call."""
        if self._after is None:
            self._after = max(reader.last_id() - _FIRST_READ, 0)

        while frames := reader.frames_of((INFO.name, LOGGED.name), self._after):
            self._after = frames[-1].id
            for frame in frames:
                if frame.stream not in self._ranks:
                    streams = reader.streams()
                    self._clocks, self._ranks = RunClocks(streams), {stream.id: stream.rank for stream in streams}

                for row in frame.maps():
                    self._take(frame.stream, frame.table, row)

    def lines(self, events: Iterable[RunEvent] = ()) -> list[RunMessage]:
        """Return the messages, the run's events among them, the newest first."""
        from_events = [message for message in map(_message_of_event, events) if message is not None]
        joined: list[RunMessage] = []
        for message in sorted([*self._kept, *from_events], key=lambda message: message.epoch_s):
            # The same words again, as of a warning of every rank, tell nothing new.
            if not joined or replace(joined[-1], epoch_s=message.epoch_s) != message:
                joined.append(message)

        return joined[::-1]

    def _take(self, stream: int, table: str, row: Mapping[str, Any]) -> None:
        kind = str(row.get("kind", ""))
        if kind in _SILENT:
            return

        date = self._clocks.of_stamp if table == INFO.name else self._clocks.of_date
        at_s = date(stream, int(row.get("t_ns", 0))) / 1e9
        self._kept.append(RunMessage(at_s, self._ranks[stream], kind, _words(row)))


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
