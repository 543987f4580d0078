"""Metrics of a run by name, followed by cursor, and their summary for the report.

The losses that traceml reads itself are the metric `traceml/loss`, which is left out where the training logs a loss.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from traceml.database.schema import LOSSES, METRICS, NAMES
from traceml.database.store.reader import Frame, NextRows, StoreReader
from traceml.database.store.records import names_of
from traceml.database.store.run_clocks import RunClocks
from traceml.formatting import name_at_rank, name_order

__all__ = ["OWN_LOSS", "MetricFigures", "MetricFrame", "MetricReader", "MetricSummary", "drawn_metrics", "is_hidden",
           "is_loss", "metric_group", "metric_turns"]  # fmt: skip

OWN_LOSS = "traceml/loss"
"""Name of the losses that traceml reads."""

# A report is read by people and loaded whole; a run may have a hundred thousand names.
_SHOWN_NAMES = 1000
_FRAMES = 256
_LOSS_ROWS = 200_000  # of more, some are read, spread over the run
_LOSS_FRAMES = 256
_WAIT_ROWS = 32  # of a rank above 0, until its losses stand for the run's
_NUMBER = re.compile("[0-9]+")
_NO_TRAINING = ("val", "eval", "test")


class MetricFrame(msgspec.Struct, frozen=True):
    """Values that one rank logged, sorted by name; those of a name in the order of logging."""

    names: list[str]  # each name once, with `/rank_r` for ranks above 0
    starts: NDArray[np.int64]  # index of the first row of each name
    rows: NDArray[np.void]  # rows of `schema.METRICS`
    stream: int

    @property
    def ends(self) -> list[int]:
        """Index after the last row of each name."""
        return [*self.starts[1:].tolist(), len(self.rows)]


def is_hidden(names: Iterable[str]) -> bool:
    """Return whether the losses that traceml reads are left out: the training logs its own under one of the names."""
    return any(_is_training_loss(name) for name in names if not name.startswith(OWN_LOSS))


def is_loss(name: str) -> bool:
    """Return whether a metric is a loss, by its name."""
    return "loss" in name.lower()


def metric_group(name: str) -> str:
    """Return the group of a metric: its name before the first slash, empty if it has none.

    All layers are one group thus: `grad/layer0/weight` would be alone in a group of its layer.
    """
    prefix, slash, _ = name.partition("/")
    return prefix if slash else ""


def drawn_metrics(names: Iterable[str], most: int, weight: Callable[[str], Any]) -> list[str]:
    """Return the names of the metrics that have charts, in order, where a screen has charts for some only.

    Args:
        weight: sorts the names; those with the same weight take turns by group.
    """
    turns = metric_turns(names)
    drawn = sorted(turns, key=lambda name: (weight(name), turns[name]))[:most]
    return sorted(drawn, key=lambda name: (weight(name), name_order(name)))


def metric_turns(names: Iterable[str]) -> dict[str, int]:
    """Return the turn of each name.

    The first of each group comes in turn 0, the second of each in turn 1: a hundred norms of gradients do not hide the
    accuracy. Within a group, likewise, names that differ in a number only, as those of layers do.
    """
    ordered = sorted(names, key=name_order)
    alike = _places(ordered, lambda name: _NUMBER.sub("", name))
    return _places(sorted(ordered, key=alike.__getitem__), metric_group)


def _places(names: Iterable[str], group_of: Callable[[str], str]) -> dict[str, int]:
    """Return how many of its group come before each name."""
    seen: Counter[str] = Counter()
    places = {}
    for name in names:
        places[name] = seen[group_of(name)]
        seen[group_of(name)] += 1

    return places


def _is_training_loss(name: str) -> bool:
    return is_loss(name) and not any(word in name.lower() for word in _NO_TRAINING)


class MetricReader:
    """Reads the metrics of all attempts and ranks by cursor, and the losses of one rank."""

    def __init__(self) -> None:
        self._after = 0
        self._next_rows: NextRows = {}
        self._losses_after: dict[int, int] = {}
        self._loss_rank: int | None = None
        self._names: dict[tuple[int, int], str] = {}
        self._ranks: dict[int, int] = {}

    def read(self, reader: StoreReader) -> Iterator[list[MetricFrame]]:
        """Return what arrived since the last call, some hundred frames at a time."""
        if METRICS.name not in reader.tables:
            return  # a store that is older than the table

        while frames := reader.frames_of((NAMES.name, METRICS.name), self._after, _FRAMES, self._next_rows):
            self._after = frames[-1].id
            found = []
            for frame in frames:
                if frame.table == NAMES.name:
                    self._names |= {(frame.stream, number): name for number, name in names_of(frame.maps())}
                    continue

                if frame.stream not in self._ranks:
                    self._ranks = {record.id: record.rank for record in reader.streams()}

                found.append(self._frame(frame.stream, np.frombuffer(frame.data, METRICS.dtype)))

            yield found

        if LOSSES.name in reader.tables and (losses := self._losses(reader)):
            yield losses

    def _losses(self, reader: StoreReader) -> list[MetricFrame]:
        """Return the new losses of the lowest rank that has any."""
        streams = reader.streams()
        if self._loss_rank is None:
            having = reader.streams_with(LOSSES.name)
            lowest = min((stream.rank for stream in streams if stream.id in having), default=None)
            is_sure = lowest == 0 or reader.stored(LOSSES.name) >= _WAIT_ROWS
            self._loss_rank = lowest if is_sure else None

        mine = [stream for stream in streams if stream.rank == self._loss_rank]
        clocks = RunClocks(mine)
        frames = (frame for stream in mine for frame in self._loss_frames(reader, stream.id))
        return [_of_losses(frame, self._loss_rank or 0, clocks) for frame in frames]

    def _loss_frames(self, reader: StoreReader, stream: int) -> Iterator[Frame]:
        """Yield the new frames of losses of a stream; the first time, of very many some."""
        after = self._losses_after.get(stream)
        if after is None and reader.stored(LOSSES.name, stream) > _LOSS_ROWS:
            after = reader.last_id()
            yield from reader.spread_frames(LOSSES.name, {stream}, _LOSS_FRAMES, _LOSS_ROWS // _LOSS_FRAMES)

        self._losses_after[stream] = after or 0
        for frame in reader.frames(LOSSES.name, after or 0, stream, next_rows=self._next_rows):
            self._losses_after[stream] = frame.id
            yield frame

    def _frame(self, stream: int, rows: NDArray[Any]) -> MetricFrame:
        rows = rows[np.argsort(rows["name_id"], kind="stable")]
        ids, starts = np.unique(rows["name_id"], return_index=True)
        rank = self._ranks[stream]
        names = [name_at_rank(self._names.get((stream, number), f"(name {number})"), rank) for number in ids.tolist()]
        return MetricFrame(names, starts, rows, stream)


def _of_losses(frame: Frame, rank: int, clocks: RunClocks) -> MetricFrame:
    losses = np.frombuffer(frame.data, LOSSES.dtype)
    rows = np.zeros(len(losses), METRICS.dtype)
    rows["t_ns"] = clocks.from_monotonic(frame.stream, losses["t_ns"])
    rows["step"], rows["value"] = losses["step"], losses["loss"]
    return MetricFrame([name_at_rank(OWN_LOSS, rank)], np.zeros(1, np.int64), rows, frame.stream)


class MetricFigures(NamedTuple):
    """Figures of one metric over all of its values; NaN if none of them is finite."""

    last: float
    least: float
    greatest: float
    number: int


class MetricSummary:
    """Last, least, greatest value and count per name; all attempts and ranks."""

    def __init__(self) -> None:
        self._reader = MetricReader()
        # name -> [last, its time, least, greatest, count, stream of the last]
        self._found: dict[str, list[float]] = {}
        self.hidden: set[str] = set()
        """Names that are left out, because there are too many."""

    def update(self, reader: StoreReader) -> bool:
        """Take what arrived since the last call; return whether there was anything."""
        changed = False
        for frames in self._reader.read(reader):
            changed = True
            for frame in frames:
                self._take(frame)

        return changed

    def figures(self) -> dict[str, MetricFigures]:
        """Return the figures of each name."""
        hides_loss = is_hidden(self._found)
        return {
            name: MetricFigures(last, least, greatest, int(count))
            for name, (last, _, least, greatest, count, _) in self._found.items()
            if not (hides_loss and name.startswith(OWN_LOSS))
        }

    def _take(self, frame: MetricFrame) -> None:
        values, times = frame.rows["value"], frame.rows["t_ns"]
        least, greatest = np.fmin.reduceat(values, frame.starts), np.fmax.reduceat(values, frame.starts)
        for at, (name, start, end) in enumerate(zip(frame.names, frame.starts.tolist(), frame.ends, strict=True)):
            entry = self._entry(name)
            if entry is None:
                continue

            # A process logs in order, also when its wall clock is set back.
            if frame.stream == entry[5] or times[end - 1] >= entry[1]:
                entry[0], entry[1], entry[5] = float(values[end - 1]), float(times[end - 1]), frame.stream

            entry[2], entry[3] = float(np.fmin(entry[2], least[at])), float(np.fmax(entry[3], greatest[at]))
            entry[4] += end - start

    def _entry(self, name: str) -> list[float] | None:
        if name not in self._found and len(self._found) >= _SHOWN_NAMES:
            self.hidden.add(name)
            return None

        return self._found.setdefault(name, [math.nan, -1.0, math.nan, math.nan, 0, -1])
