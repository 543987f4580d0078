"""Logged values in a trace, written in blocks of rows: a counter per name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traceml.database.schema import METRICS
from traceml.database.store.reader import StreamRecord
from traceml.runs.export.event_blocks import EventBlocks, PointBlock, PointKind, WaitingRows, as_json
from traceml.runs.export.trace_tracks import EVENTS, TraceTracks
from traceml.runs.rows.aligned_clocks import RunClocks
from traceml.traces.writer.writer import Writer

__all__ = ["MetricTracks"]

_BLOCK = 16_384  # events of a block, at most: 2 MB of text
_READ = ("t_ns", "step", "name_id", "value")
_NOT_FINITE = ("nan", "inf", "-inf")


class MetricTracks:
    """Writes metrics: as counters, and values that are not finite, which viewers cannot draw, as instants.

    Args:
        name_of: returns the name of a metric by stream and number.
    """

    def __init__(
        self, writer: Writer, tracks: TraceTracks, clocks: RunClocks, name_of: Callable[[int, int], str]
    ) -> None:
        self._blocks, self._tracks, self._clocks, self._name_of = EventBlocks(writer), tracks, clocks, name_of
        self._rows = WaitingRows(lambda stream, _, rows: self._write_rows(stream, rows), _BLOCK)

    def add(self, stream: StreamRecord, rows: Any) -> None:
        """Take rows of `schema.METRICS`; they are written sometime later.

        Raises:
            KeyError: a column is missing.
        """
        self._rows.add(stream, METRICS.name, rows[list(_READ)])

    def write(self) -> None:
        """Write the waiting rows."""
        self._rows.write()

    def _write_rows(self, stream: StreamRecord, rows: Any) -> None:
        pid, tid = self._tracks.rank(stream, EVENTS)
        form = _forms(rows["value"])
        found, kind = np.unique(rows["name_id"] * (1 + len(_NOT_FINITE)) + form, return_inverse=True)
        kinds = [self._kind(stream.id, *divmod(each, 1 + len(_NOT_FINITE))) for each in found.tolist()]
        numbers = as_json(np.where(form == 0, rows["value"], 0.0).tolist())
        numbers[form > 0] = as_json(rows["step"][form > 0].tolist())
        at_ns = self._clocks.of_date(stream.id, rows["t_ns"])
        self._blocks.write_points(PointBlock(pid, tid, kinds, kind, at_ns, numbers[:, None]))

    def _kind(self, stream: int, number: int, form: int) -> PointKind:
        name = self._name_of(stream, number)
        if not form:
            return PointKind(name, "metric", "C", ("value",))

        value = _NOT_FINITE[form - 1]
        return PointKind(f"{name} is {value}", "metric", "i", ("step",), {"metric": name, "value": value})


def _forms(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return 0 for each finite value, else one plus the place in `_NOT_FINITE`."""
    return np.select([np.isnan(values), values == np.inf, values == -np.inf], [1, 2, 3], 0)
