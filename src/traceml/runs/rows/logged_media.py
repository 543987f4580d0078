"""Logged texts, images, histograms and files of a run, followed by cursor; the newest of each name."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from traceml.database.schema import LOGGED
from traceml.database.store.reader import StoreReader
from traceml.formatting import name_at_rank, name_order
from traceml.runs.rows.logged_rows import LoggedRow, LoggedRows

__all__ = ["LoggedItem", "LoggedItems", "MediaGroup"]

_KINDS = ("image", "text", "histogram", "artifact", "refused", "value")
_KEPT = {"image": 24, "text": 24, "histogram": 24, "artifact": 1, "refused": 4, "value": 24}
# Pages are for people: further names are only in the store.
_MAX_NAMES = 1000
_MAX_CHARS = 20_000


@dataclass(frozen=True, slots=True)
class LoggedItem:
    """One logged value that is not a number.

    Attributes:
        step: its step; None if it has none.
        epoch_s: the time of the call.
        text: the text, at most 20,000 characters of it, or why a file was refused.
        counts, edges: of a histogram; one edge more than counts.
    """

    rank: int
    step: int | None
    epoch_s: float
    text: str = ""
    path: str = ""
    size_bytes: int = 0
    counts: tuple[float, ...] = ()
    edges: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class MediaGroup:
    """The newest values of one kind and name, oldest first."""

    kind: str  # image, text, histogram, artifact, refused, or value (a metric's value that is not a number)
    name: str
    items: tuple[LoggedItem, ...]
    older: int = 0  # number of values before them, which are only in the store


class LoggedItems:
    """Follows the logged values of a run, of all attempts and ranks."""

    def __init__(self) -> None:
        self._rows = LoggedRows(LOGGED.name)
        self._found: dict[tuple[str, str], deque[LoggedItem]] = {}
        self._counts: dict[tuple[str, str], int] = {}

    def update(self, reader: StoreReader) -> bool:
        """Take what arrived since the last call; return whether there was anything."""
        changed = False
        for row in self._rows.new(reader):
            changed = True
            self._take(row)

        return changed

    def groups(self) -> tuple[MediaGroup, ...]:
        """Return the newest values by kind and name."""
        ordered = sorted(self._found.items(), key=lambda entry: (_KINDS.index(entry[0][0]), name_order(entry[0][1])))
        return tuple(
            MediaGroup(kind, name, tuple(items), self._counts[kind, name] - len(items))
            for (kind, name), items in ordered
        )

    def _take(self, row: LoggedRow) -> None:
        kind, name = str(row.values.get("kind", "")), str(row.values.get("name") or "")
        if kind not in _KINDS:
            return

        key = kind, name_at_rank(name, row.rank)
        if key not in self._found and len(self._found) >= _MAX_NAMES:
            return

        self._found.setdefault(key, deque(maxlen=_KEPT[kind])).append(_item(row.values, row.rank, row.epoch_s))
        self._counts[key] = self._counts.get(key, 0) + 1


def _item(row: Mapping[str, Any], rank: int, epoch_s: float) -> LoggedItem:
    words = {"refused": row.get("why"), "value": row.get("value")}.get(str(row.get("kind")), row.get("text"))
    step = row.get("step")
    return LoggedItem(
        rank,
        step if isinstance(step, int) else None,
        epoch_s,
        text=str("" if words is None else words)[:_MAX_CHARS],
        path=str(row.get("path") or ""),
        size_bytes=int(row.get("size") or 0),
        counts=tuple(map(float, row.get("counts") or ())),
        edges=tuple(map(float, row.get("edges") or ())),
    )
