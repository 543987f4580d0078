"""Metrics over steps, at most a few hundred points per name: each with the mean and extremes of its values."""

from __future__ import annotations

import math

import msgspec
import numpy as np
from numpy.typing import NDArray

from traceml.database.store.reader import StoreReader
from traceml.formatting import name_order
from traceml.runs.rows.metrics import OWN_LOSS, MetricReader, is_hidden

__all__ = ["MetricSeries", "MetricSeriesSet"]

_MAX_POINTS = 400
# Charts are for people: further names are only in the store and in the report's table.
_MAX_NAMES = 500

Floats = NDArray[np.float64]


class MetricSeries(msgspec.Struct, frozen=True):
    """One metric over steps; joined values have their mean and extremes, NaN is a gap."""

    name: str  # name of the metric, with `/rank_r` for ranks above 0
    steps: Floats  # the step of each point, ascending
    values: Floats  # means of the finite values; least, most: their extremes
    least: Floats
    most: Floats
    missing: int  # number of values that were not finite
    epoch_s: Floats


class MetricSeriesSet:
    """Series of all metrics of a run; all attempts and ranks."""

    def __init__(self) -> None:
        self._reader = MetricReader()
        self._points: dict[str, NDArray[np.float64]] = {}
        self.hidden: set[str] = set()
        """Names that are left out, because there are too many."""

    def update(self, reader: StoreReader) -> None:
        """Take what arrived since the last call."""
        for frames in self._reader.read(reader):
            new: dict[str, list[NDArray[np.float64]]] = {}
            for frame in frames:
                for name, rows in zip(frame.names, np.split(frame.rows, frame.starts[1:]), strict=True):
                    new.setdefault(name, []).append(_points(rows))

            for name, parts in new.items():
                self._add(name, np.concatenate(parts))

    def lines(self) -> list[MetricSeries]:
        """Return the series, sorted by name: `layer2` before `layer10`."""
        hides_loss = is_hidden(self._points)
        return [
            _line(name, points)
            for name, points in sorted(self._points.items(), key=lambda entry: name_order(entry[0]))
            if not (hides_loss and name.startswith(OWN_LOSS))
        ]

    def _add(self, name: str, points: NDArray[np.float64]) -> None:
        if name not in self._points and len(self._points) >= _MAX_NAMES:
            self.hidden.add(name)
            return

        kept = np.concatenate([self._points[name], points]) if name in self._points else points
        kept = kept[np.argsort(kept[:, 0], kind="stable")]  # a later attempt counts from an earlier step again
        self._points[name] = _joined(kept) if len(kept) > _MAX_POINTS else kept


def _points(rows: NDArray[np.void]) -> NDArray[np.float64]:
    """Return step, mean, count, least, greatest, number of non-finite values, and time in seconds of each row."""
    values, finite = rows["value"], np.isfinite(rows["value"])
    points = np.empty((len(rows), 7))
    points[:, 0], points[:, 1], points[:, 2] = rows["step"], np.where(finite, values, 0), finite
    points[:, 3], points[:, 4] = np.where(finite, values, np.inf), np.where(finite, values, -np.inf)
    points[:, 5], points[:, 6] = ~finite, rows["t_ns"] / 1e9
    return points


def _joined(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Join neighbors to points of equally many values, however often some of them were joined before."""
    counts = points[:, 2] + points[:, 5]
    ends = counts.cumsum()
    size = 2 ** math.ceil(math.log2(ends[-1] / _MAX_POINTS))  # a power of two, so that joined ones are joined whole
    starts = np.flatnonzero(np.diff((ends - counts) // size, prepend=-1))
    joined = points[starts]  # step and time are the first one's
    joined[:, [2, 5]] = np.add.reduceat(points[:, [2, 5]], starts)
    lengths = np.diff(starts, append=len(points))
    shares = points[:, 2] / np.maximum(np.repeat(joined[:, 2], lengths), 1)
    joined[:, 1] = np.add.reduceat(points[:, 1] * shares, starts)  # a sum of the values themselves may overflow
    joined[:, 3] = np.minimum.reduceat(points[:, 3], starts)
    joined[:, 4] = np.maximum.reduceat(points[:, 4], starts)
    return joined


def _line(name: str, points: NDArray[np.float64]) -> MetricSeries:
    some = points[:, 2] > 0
    mean, least, most = (np.where(some, points[:, column], np.nan) for column in (1, 3, 4))
    return MetricSeries(name, points[:, 0], mean, least, most, int(points[:, 5].sum()), points[:, 6])
