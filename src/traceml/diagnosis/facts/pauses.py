"""Pauses of the training thread, by rank and step: garbage collections and compilations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from traceml.database.schema import LINE_OTHER, LINE_PHASES, PAUSES, Pause

__all__ = ["PauseHistory"]

MAX_ROWS = 16_384
"""Rows kept of each rank, the newest."""

Rows = NDArray[np.void]
Floats = NDArray[np.float32]


class PauseHistory:
    """Rows of `schema.PAUSES` by rank.

    Args:
        names: texts of each rank by id.
    """

    def __init__(self, names: Mapping[int, Mapping[int, str]] | None = None) -> None:
        self._rows: dict[int, Rows] = {}
        self._names: Mapping[int, Mapping[int, str]] = {} if names is None else names

    def add(self, rank: int, rows: Rows) -> None:
        """Take rows of a rank, in order."""
        before = self._rows.get(rank)
        self._rows[rank] = (rows.copy() if before is None else np.concatenate([before, rows]))[-MAX_ROWS:]

    def rows(self, rank: int, cause: Pause) -> Rows:
        """Return the kept rows of a rank about one cause."""
        rows = self._rows.get(rank)
        return np.empty(0, PAUSES.dtype) if rows is None else rows[rows["cause"] == cause]

    def text(self, rank: int, number: int) -> str:
        """Return a text of a rank by its id; empty where it is not known."""
        return self._names.get(rank, {}).get(int(number), "")

    def most_frequent(self, rank: int, rows: Rows, column: str) -> str:
        """Return the text that most of the rows have in a column of ids; empty where none has one."""
        ids = Counter(rows[column][rows[column] >= 0].tolist())
        return self.text(rank, ids.most_common(1)[0][0]) if ids else ""

    def per_step(
        self,
        ranks: Sequence[int] | NDArray[np.int64],
        steps: NDArray[np.int64],
        cause: Pause,
        wanted: Callable[[Rows], NDArray[np.bool_]],
    ) -> dict[str, Floats]:
        """Return nanoseconds by phase, rank x step.

        Args:
            ranks: the ranks.
            steps: numbers of the steps, ascending.
            cause: what the pauses are.
            wanted: selects rows.
        """
        sums: dict[str, Floats] = {}
        for row, rank in enumerate(ranks):
            rows = self.rows(int(rank), cause)
            for phase, columns, ns in _shares(rows[wanted(rows)], steps):
                values = sums.setdefault(phase, np.zeros((len(ranks), len(steps)), np.float32))
                np.add.at(values[row], columns, ns)

        return sums


def _shares(rows: Rows, steps: NDArray[np.int64]) -> Iterator[tuple[str, NDArray[np.intp], NDArray[np.float64]]]:
    """Yield (phase, columns, nanoseconds) of rows; several short pauses together are spread over their steps."""
    if not len(rows) or not len(steps):
        return

    single = rows[rows["count"] == 1]
    columns = np.minimum(np.searchsorted(steps, single["step"]), len(steps) - 1)
    inside = steps[columns] == single["step"]
    for number in np.unique(single["phase"][inside]).tolist():
        chosen = inside & (single["phase"] == number)
        yield LINE_PHASES.get(number, "other"), columns[chosen], single["ns"][chosen].astype(np.float64)

    together = rows[(rows["count"] > 1) & (rows["step"] >= steps[0]) & (rows["step"] <= steps[-1])]
    passed = max(int(steps[-1] - steps[0]) + 1, 1)
    if len(together):
        each = float(together["ns"].sum()) / passed
        yield LINE_PHASES[LINE_OTHER], np.arange(len(steps)), np.full(len(steps), each)
