"""Pauses of the training thread, by rank and step: garbage collections, compilations, checkpoints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec
import numpy as np
from msgspec.structs import asdict
from numpy.typing import NDArray

from traceml.database.row_arrays import join_rows
from traceml.database.schema import LINE_OTHER, LINE_PHASES, PAUSES, Compiled, Pause
from traceml.diagnosis.facts.run_time import SET_UP_STEPS
from traceml.diagnosis.facts.trainings.step_numbers import StepNumbers
from traceml.formatting import parsed_place

__all__ = ["PauseHistory", "Saves", "are_first_versions"]

MAX_ROWS = 16_384
"""Rows kept of each rank, the newest."""

Rows = NDArray[np.void]
Floats = NDArray[np.float32]


class Saves(msgspec.Struct, frozen=True):
    """Checkpoints of the rank that took longest for them; None if a fact is not known."""

    size_bytes: float | None  # mean size of one; of several files that a step saves, their sum
    bytes_per_s: float | None
    target: str | None  # file or folder of the newest
    file: str | None  # the user's line that called for most of them, with `line` and `function`
    line: int | None
    function: str | None
    asynchronous: bool | None = None  # True if the files of most are written after the call has returned

    def evidence(self) -> dict[str, object]:
        """Return what is known, as a finding's evidence."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def are_first_versions(rows: Rows) -> NDArray[np.bool_]:
    """Return which compilations a function's first step needs, as those for parameters of each shape."""
    called = rows[["line_id", "step"]]
    return np.isin(called, called[rows["detail"] == Compiled.FIRST])


class PauseHistory:
    """Rows of `schema.PAUSES` by rank."""

    def __init__(
        self, names: Mapping[int, Mapping[int, str]] | None = None, numbers: StepNumbers | None = None
    ) -> None:
        self._rows: dict[int, Rows] = {}
        self._ranks: dict[int, set[int]] = {cause: set() for cause in Pause}
        self._names: Mapping[int, Mapping[int, str]] = {} if names is None else names
        self._numbers = StepNumbers() if numbers is None else numbers

    def add(self, rank: int, rows: Rows) -> None:
        """Take rows of a rank, in order."""
        before = self._rows.get(rank)
        self._rows[rank] = (rows.copy() if before is None else join_rows([before, rows]))[-MAX_ROWS:]
        for cause in np.unique(rows["cause"]).tolist():
            self._ranks.setdefault(cause, set()).add(rank)

    def ranks(self, cause: Pause) -> set[int]:
        """Return the ranks that had such a pause: few of many, as a rule."""
        return self._ranks[cause]

    def rows(self, rank: int, cause: Pause) -> Rows:
        """Return the kept rows of a rank about one cause."""
        rows = self._rows.get(rank)
        return np.empty(0, PAUSES.dtype) if rows is None else rows[rows["cause"] == cause]

    def longest(
        self, ranks: Sequence[int] | NDArray[np.int64], cause: Pause, chosen: Callable[[Rows], Rows] = lambda rows: rows
    ) -> tuple[int, Rows]:
        """Return which of some ranks spent most time on one cause, and its rows about it; none where no rank has any.

        Args:
            chosen: of the rows of a rank those that count.
        """
        known = sorted(self._ranks[cause].intersection(np.asarray(ranks).tolist()))
        by_rank = {rank: chosen(self.rows(rank, cause)) for rank in known}
        nothing = -1, np.empty(0, PAUSES.dtype)
        return max(by_rank.items(), key=lambda each: int(each[1]["ns"].sum()), default=nothing)

    def set_up_compile_s(self, rank: int) -> float:
        """Return the seconds for which functions were compiled for the first time in the first steps of a rank."""
        rows = self.rows(rank, Pause.COMPILATION)
        in_set_up = (rows["step"] >= 0) & (rows["step"] < self._numbers.first + SET_UP_STEPS)
        return float(rows["ns"][in_set_up & are_first_versions(rows)].sum()) / 1e9

    def early_compile_s(self, rank: int) -> float:
        """Return the seconds of compiling before the first step of a rank.

        Without a data loader a step begins with the forward, which a compiled model runs once it is compiled. An
        evaluation between steps has no open step either, so these come before all that was in a step.
        """
        rows = self._rows.get(rank, np.empty(0, PAUSES.dtype))
        ended = rows["t_end_ns"][rows["step"] >= 0]
        if not len(ended):
            return 0.0

        is_early = (rows["cause"] == Pause.COMPILATION) & (rows["t_end_ns"] < ended.min())
        return float(rows["ns"][is_early].sum()) / 1e9

    def text(self, rank: int, number: int) -> str:
        """Return a text of a rank by its id; empty if unknown."""
        return self._names.get(rank, {}).get(int(number), "")

    def most_frequent(self, rank: int, rows: Rows, column: str) -> str:
        """Return the text that most of the rows have in a column of ids; empty if none has one."""
        ids = Counter(rows[column][rows[column] >= 0].tolist())
        return self.text(rank, ids.most_common(1)[0][0]) if ids else ""

    def place(self, rank: int, rows: Rows) -> tuple[str | None, int | None, str | None]:
        """Return file, line and function that most of the rows have; None for each if unknown."""
        return parsed_place(self.most_frequent(rank, rows, "line_id"))

    def saves(self, ranks: Sequence[int] | NDArray[np.int64]) -> Saves | None:
        """Return facts of the checkpoints of some ranks; None if none is known."""
        rank, rows = self.longest(ranks, Pause.SAVE)
        if not len(rows):
            return None

        sized = rows[rows["size_bytes"] > 0]
        total, seconds = float(sized["size_bytes"].sum()), max(float(sized["ns"].sum()), 1.0) / 1e9
        place = self.place(rank, rows)
        times = len(np.unique(sized["step"]))
        size, speed = (total / times, total / seconds) if times else (None, None)
        later = True if 2 * np.count_nonzero(rows["detail"]) > len(rows) else None
        return Saves(size, speed, self.text(rank, int(rows["text_id"][-1])) or None, *place, later)

    def per_step(
        self,
        ranks: Sequence[int] | NDArray[np.int64],
        steps: NDArray[np.int64],
        cause: Pause,
        wanted: Callable[[Rows], NDArray[np.bool_]] | None = None,
    ) -> dict[str, Floats]:
        """Return nanoseconds by phase, rank x step.

        Args:
            steps: numbers of the steps, ascending.
        """
        sums: dict[str, Floats] = {}
        for row in np.flatnonzero(np.isin(ranks, list(self.ranks(cause)))).tolist():
            rows = self.rows(int(ranks[row]), cause)
            for phase, columns, ns in _shares(rows if wanted is None else rows[wanted(rows)], steps):
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
