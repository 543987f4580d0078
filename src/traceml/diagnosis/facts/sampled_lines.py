"""Lines of the user's code that the training thread was seen in, by phase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import numpy as np
from numpy.typing import NDArray

from traceml.database.schema import LINE_OUTSIDE, LINE_PHASES, LINE_STARTUP
from traceml.database.store.thinning import LINE_KEYS, LINE_SUMS

__all__ = ["OUTSIDE_STEPS", "LazyLines", "LineCounts", "SampledLine", "parsed_place"]

OUTSIDE_STEPS = (LINE_PHASES[LINE_STARTUP], LINE_PHASES[LINE_OUTSIDE])
"""Names for the time before the first step and between steps, in addition to those of the phases."""

_OUTSIDE = (LINE_STARTUP, LINE_OUTSIDE)
_MAX_PARTS = 32  # rows that wait to be summed, in calls


@dataclass(frozen=True, slots=True)
class SampledLine:
    """A line of the user's code, and how often it was seen.

    Attributes:
        part: a phase, `other`, or a name of `OUTSIDE_STEPS`.
        file, line, function: the innermost code of the user; None where only libraries ran.
        library: innermost library function that it had called, `FILE:LINE FUNCTION`.
        watched_ns: time before the samples in which the phase was watched without a break.
        cpu_ns: CPU time of the training thread in it.
    """

    rank: int
    part: str
    file: str | None
    line: int | None
    function: str | None
    library: str | None
    samples: int
    watched_ns: int = 0
    cpu_ns: int = 0


class LineCounts:
    """Sums the rows of `schema.LINES` by rank, phase and line."""

    def __init__(self) -> None:
        self._ranks: dict[int, _RankCounts] = {}

    def add(self, rank: int, rows: NDArray[np.void]) -> None:
        """Take rows of a rank."""
        self._ranks.setdefault(rank, _RankCounts()).add(rows)

    def lines(self, names: Mapping[int, Mapping[int, str]], ends_ns: Sequence[int] = ()) -> tuple[SampledLine, ...]:
        """Return the lines of all ranks, the most frequent of each rank first.

        Args:
            names: texts of each rank by id.
            ends_ns: time at which the last step of each rank ended, 0 for none. After it a rank may hang, or have ended
                its training: what it does then has no part in the phases of the steps.
        """
        return tuple(
            SampledLine(rank, LINE_PHASES.get(phase, "other"), *parsed_place(known.get(line)), known.get(called), *sums)
            for rank, counts in sorted(self._ranks.items())
            for known in (names.get(rank, {}),)
            for phase, line, called, *sums in counts.summed(ends_ns[rank] if rank < len(ends_ns) else 0).tolist()
        )


class _RankCounts:
    """Rows of one rank. Those in the phases of steps are apart until a later step has begun."""

    def __init__(self) -> None:
        self._parts: list[NDArray[np.int64]] = []
        self._newest: list[tuple[int, NDArray[np.int64]]] = []  # with the middle of the time in which they were counted
        self._step, self._flushed_ns = -1, 0

    def add(self, rows: NDArray[np.void]) -> None:
        """Take rows, in order; all that were counted to the same time have it as theirs."""
        counts = np.stack([rows[name] for name in (*LINE_KEYS, *LINE_SUMS)], axis=1)
        outside = np.isin(rows["phase"], _OUTSIDE)
        for flushed_ns in np.unique(rows["t_ns"]).tolist():
            flushed = rows["t_ns"] == flushed_ns
            step = int(rows["step"][flushed].max())
            if step > self._step:
                self._parts += [each for _, each in self._newest]
                self._newest, self._step = [], step

            self._parts = _compact([*self._parts, counts[flushed & outside]])
            self._newest.append(((self._flushed_ns + flushed_ns) // 2, counts[flushed & ~outside]))
            self._flushed_ns = flushed_ns

        if len(self._newest) > _MAX_PARTS:
            first, *others = self._newest
            self._newest = [first, (others[0][0], _summed([each for _, each in others]))]

    def summed(self, end_ns: int) -> NDArray[np.int64]:
        """Return the sums, of phases of steps those that were counted mostly before a time."""
        return _summed([*self._parts, *(each for middle_ns, each in self._newest if middle_ns <= end_ns)])


class LazyLines(Sequence[SampledLine]):
    """The lines of a run, made when a rule asks for them: a live verdict seldom does, and has many ranks.

    Args:
        ends_ns: time at which the last step of each rank ended.
    """

    def __init__(self, counts: LineCounts, names: Mapping[int, Mapping[int, str]], ends_ns: Sequence[int]) -> None:
        self._counts, self._names, self._ends_ns = counts, names, ends_ns

    @cached_property
    def _lines(self) -> tuple[SampledLine, ...]:
        return self._counts.lines(self._names, self._ends_ns)

    @overload
    def __getitem__(self, at: int) -> SampledLine: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[SampledLine, ...]: ...
    def __getitem__(self, at: int | slice) -> SampledLine | tuple[SampledLine, ...]:
        """Return a line, or some of them."""
        return self._lines[at]

    def __len__(self) -> int:
        return len(self._lines)


def _compact(parts: list[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
    return [_summed(parts)] if len(parts) > _MAX_PARTS else parts


def _summed(parts: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Return (phase, line, library function, samples, times), each line once, the most frequent first."""
    rows = np.concatenate(parts)
    keys, at = np.unique(rows[:, : len(LINE_KEYS)], axis=0, return_inverse=True)
    sums = np.zeros((len(keys), len(LINE_SUMS)), np.int64)
    np.add.at(sums, at.reshape(-1), rows[:, len(LINE_KEYS) :])
    order = np.argsort(-sums[:, 0], kind="stable")
    return np.column_stack([keys, sums])[order]


def parsed_place(text: str | None) -> tuple[str | None, int | None, str | None]:
    """Return (file, line, function) of `FILE:LINE FUNCTION`."""
    if not text:
        return None, None, None

    place, _, function = text.rpartition(" ")
    file, _, line = place.rpartition(":")
    return (file, int(line), function) if line.isdecimal() else (None, None, None)
