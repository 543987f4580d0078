"""Lines of the user's code that the training thread was seen in, by phase."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import msgspec
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from traceml.database.schema import (
    LINE_AFTER_STEPS,
    LINE_OUTSIDE,
    LINE_PHASES,
    LINE_STARTUP,
    LINE_THREADS,
    LINE_WORKERS,
    line_phase_name,
)
from traceml.database.store.thinning import LINE_KEYS, LINE_SUMS
from traceml.formatting import parsed_place

__all__ = ["MAX_LOADERS", "OUTSIDE_STEPS", "DividedLines", "LazyLines", "LazyWorkerLines", "LineCounts", "SampledLine"]

OUTSIDE_STEPS = (LINE_PHASES[LINE_STARTUP], LINE_PHASES[LINE_OUTSIDE], LINE_AFTER_STEPS)
"""Names for the time before the first step, between steps and after them, in addition to those of the phases."""

_OUTSIDE = (LINE_STARTUP, LINE_OUTSIDE)
_SAMPLES = len(LINE_KEYS)
_MAX_PARTS = 32  # rows that wait to be summed, in calls
_MAX_INTERVALS = 64  # intervals of the run that are told apart, of each of so many ranks
_MAX_SPAN_RANKS = 64
MAX_LOADERS = 64
"""Newest loaders of a rank of which anything is kept: a script may make others for each epoch."""
_NONE = np.empty((0, len(LINE_KEYS) + len(LINE_SUMS) + 1), np.int64)


class SampledLine(msgspec.Struct, frozen=True):
    """A line of the user's code, and how often it was seen."""

    rank: int
    part: str  # a phase, `other`, or a name of `OUTSIDE_STEPS`
    file: str | None  # the innermost code of the user, with `line` and `function`; None if only libraries ran
    line: int | None
    function: str | None
    library: str | None  # innermost library function that it had called, `FILE:LINE FUNCTION`
    samples: int
    watched_ns: int = 0  # time before the samples in which the phase was watched without a break
    # CPU time of the training thread in it; while it makes a batch, also of threads that are not Python's
    cpu_ns: int = 0

    @property
    def is_idle(self) -> bool:
        """Whether a loader worker made no batch: then no code is known."""
        return self.file is None and self.library is None


DividedLines = tuple[Sequence[SampledLine], Sequence[SampledLine]]
"""Lines in some steps, and those in the others."""


class LineCounts:
    """Sums the rows of `schema.LINES` by rank, phase and line.

    Args:
        names: texts of each rank by id, as far as they have arrived.
    """

    def __init__(self, names: Mapping[int, Mapping[int, str]]) -> None:
        self._names = names
        self._ranks: dict[int, _RankCounts] = {}
        self._evaluated_ns: dict[int, int] = {}

    def add(self, rank: int, rows: NDArray[np.void]) -> None:
        """Take rows of a rank."""
        counts = self._ranks.get(rank)
        if counts is None:
            intervals = _RankIntervals() if len(self._ranks) < _MAX_SPAN_RANKS else None
            counts = self._ranks[rank] = _RankCounts(intervals)

        counts.add(rows)

    def evaluated(self, rank: int, end_ns: int) -> None:
        """Take the end of an evaluation of a rank, before which nothing is after its training."""
        self._evaluated_ns[rank] = end_ns

    def divided(self, latest: Sequence[int], ends_ns: Sequence[int], steps: Container[int]) -> DividedLines:
        """Return the lines in the phases of some steps, and in those of the others; of the first ranks that had any.

        Args:
            latest: last step of each rank.
            ends_ns: time at which it ended.
            steps: those steps.
        """
        return self._divided(latest, ends_ns, lambda first, last: (first + last) // 2 in steps)

    def apart_from(
        self, latest: Sequence[int], ends_ns: Sequence[int], steps: Collection[int]
    ) -> tuple[SampledLine, ...]:
        """Return the lines in the phases of steps, by intervals of the run in which none of some steps was open.

        Args:
            latest, ends_ns: as of `divided`.
            steps: those steps, which are few.
        """
        return self._divided(latest, ends_ns, lambda first, last: any(first <= step <= last for step in steps))[1]

    def _divided(
        self, latest: Sequence[int], ends_ns: Sequence[int], is_chosen: Callable[[int, int], bool]
    ) -> tuple[tuple[SampledLine, ...], tuple[SampledLine, ...]]:
        """Return the lines of intervals that are chosen, by first and last step, and those of the others."""
        divided = {
            rank: counts.intervals.divided(is_chosen, latest[rank], ends_ns[rank])
            for rank, counts in self._ranks.items()
            if counts.intervals is not None and rank < min(len(latest), len(ends_ns))
        }
        inside, outside = ({rank: _by_time(parts[at]) for rank, parts in divided.items() if parts[at]} for at in (0, 1))
        return self._lines_of(inside), self._lines_of(outside)

    def of_other_threads(self) -> tuple[SampledLine, ...]:
        """Return the lines that other Python threads were seen in, the most frequent of each rank first."""
        threads = {rank: counts.threads for rank, counts in self._ranks.items() if len(counts.threads)}
        return self._lines_of({rank: _by_time([counts]) for rank, counts in threads.items()})

    def of_workers(self) -> dict[int, tuple[SampledLine, ...]]:
        """Return the lines that the workers of each loader, by its number, were seen in while they made batches.

        Idle ones are how often they made none.
        """
        workers = {rank: counts.workers for rank, counts in self._ranks.items() if len(counts.workers)}
        phases = {phase for counts in workers.values() for phase in counts[:, 0].tolist()}
        return {
            LINE_WORKERS - phase: self._lines_of(
                {rank: _by_time([counts[counts[:, 0] == phase]]) for rank, counts in workers.items()}
            )
            for phase in sorted(phases, reverse=True)
        }

    def lines(self, ends_ns: Sequence[int] = (), *, has_ended: bool = False) -> tuple[SampledLine, ...]:
        """Return the lines of all ranks, the most frequent of each rank first.

        Args:
            ends_ns: time at which the last step of each rank ended, 0 for none. After it a rank may hang, or have ended
                its training: what it does then has no part in the phases of the steps.
            has_ended: whether the run has: then these lines follow as those of `LINE_AFTER_STEPS`.
        """
        ends = {rank: ends_ns[rank] if rank < len(ends_ns) else 0 for rank in self._ranks}
        # Where it evaluates after its last step, what follows is outside steps, too.
        evaluated = {rank: max(end_ns, self._evaluated_ns.get(rank, 0)) for rank, end_ns in ends.items()}
        until = {rank: end_ns for rank, end_ns in evaluated.items() if has_ended and ends[rank] > 0}
        lines = self._lines_of({rank: each.summed(ends[rank], until.get(rank)) for rank, each in self._ranks.items()})
        after = {rank: self._ranks[rank].summed_after(ends[rank], end_ns) for rank, end_ns in until.items()}
        return lines + tuple(replace(each, part=LINE_AFTER_STEPS) for each in self._lines_of(after))

    def _lines_of(self, summed: Mapping[int, NDArray[np.int64]]) -> tuple[SampledLine, ...]:
        return tuple(
            SampledLine(rank, line_phase_name(phase), *parsed_place(known.get(line)), known.get(called), *sums)
            for rank, counts in sorted(summed.items())
            for known in (self._names.get(rank, {}),)
            for phase, line, called, *sums in counts.tolist()
        )


class _RankCounts:
    """Rows of one rank. Those in the phases of steps are apart until a later step has begun."""

    def __init__(self, intervals: _RankIntervals | None = None) -> None:
        self.intervals = intervals  # takes these, by interval of the run, too; None if nothing asks for them
        self.threads = self.workers = _NONE  # sums of the rows of other Python threads, and of loader workers
        self._parts: list[NDArray[np.int64]] = []
        # with the middle of the time in which they were counted: in the phases of steps, and between steps
        self._newest: list[tuple[int, NDArray[np.int64]]] = []
        self._outside: list[tuple[int, NDArray[np.int64]]] = []
        self._step, self._flushed_ns = -1, 0
        self._first: NDArray[np.int64] | None = None  # counted since a time that is not known

    def add(self, rows: NDArray[np.void]) -> None:
        """Take rows, in order; all that were counted to the same time have it as theirs."""
        of_threads, of_workers = rows["phase"] == LINE_THREADS, rows["phase"] <= LINE_WORKERS
        if of_threads.any():
            self.threads = _summed([self.threads, _counts_of(rows[of_threads], 0)])

        if of_workers.any():
            self.workers = _of_newest_loaders(_summed([self.workers, _counts_of(rows[of_workers], 0)]))

        rows = rows[rows["phase"] > LINE_THREADS]
        outside = np.isin(rows["phase"], _OUTSIDE)
        for flushed_ns in np.unique(rows["t_ns"]).tolist():
            flushed = rows["t_ns"] == flushed_ns
            last = int(rows["step"][flushed].max())
            counts = self._counts(rows[flushed], flushed_ns)
            if last > self._step:
                parts = [*self._parts, *(each for _, each in (*self._newest, *self._outside))]
                self._parts = [_summed(parts)] if len(parts) > _MAX_PARTS else parts
                self._newest, self._outside, self._step = [], [], last

            middle_ns, is_outside = (self._flushed_ns + flushed_ns) // 2, outside[flushed]
            self._outside.append((middle_ns, counts[is_outside]))
            in_steps = counts[~is_outside]
            self._newest.append((middle_ns, in_steps))
            self._first = in_steps if not self._flushed_ns else None
            self._flushed_ns = flushed_ns
            if self.intervals is not None:
                self.intervals.add(last, middle_ns, in_steps)

        self._newest, self._outside = _joined(self._newest), _joined(self._outside)

    def _counts(self, rows: NDArray[np.void], flushed_ns: int) -> NDArray[np.int64]:
        """Return the counts of rows; the first ones stand for a time as the next ones do."""
        counts = _counts_of(rows, flushed_ns - self._flushed_ns if self._flushed_ns else 0)
        if self._first is not None:
            seen, stands_ns = counts[:, _SAMPLES].sum(), counts[:, -1].sum()
            self._first[:, -1] = self._first[:, _SAMPLES] * stands_ns // max(seen, 1)

        return counts

    def summed(self, end_ns: int, until_ns: int | None = None) -> NDArray[np.int64]:
        """Return the sums of those that were counted mostly before a time.

        Args:
            end_ns: of those in phases of steps.
            until_ns: of those between steps; None for all of them.
        """
        outside = (each for middle_ns, each in self._outside if until_ns is None or middle_ns <= until_ns)
        return _by_time([*self._parts, *(each for middle_ns, each in self._newest if middle_ns <= end_ns), *outside])

    def summed_after(self, end_ns: int, until_ns: int) -> NDArray[np.int64]:
        """Return the sums of the others."""
        outside = (each for middle_ns, each in self._outside if middle_ns > until_ns)
        return _by_time([_NONE, *(each for middle_ns, each in self._newest if middle_ns > end_ns), *outside])


class _Interval(NamedTuple):
    """Counts of one interval of a run."""

    first: int  # the step that was open at its begin
    last: int  # that at its end, -1 where none was, as at the end of the process
    middle_ns: int  # middle of the time in which they were counted
    counts: NDArray[np.int64]
    joins: int = 1  # intervals that were joined to it, and itself

    def joined(self, after: _Interval) -> _Interval:
        """Return this interval and the one after it as one."""
        middle_ns = (self.middle_ns + after.middle_ns) // 2
        counts, joins = _summed([self.counts, after.counts]), self.joins + after.joins
        return self._replace(last=after.last, middle_ns=middle_ns, counts=counts, joins=joins)


class _RankIntervals:
    """Rows of one rank in the phases of steps, by interval; neighbors become one where there are too many."""

    def __init__(self) -> None:
        self._intervals: list[_Interval] = []
        self._step = 0

    def add(self, last: int, middle_ns: int, counts: NDArray[np.int64]) -> None:
        """Take the counts of the next interval."""
        self._intervals.append(_Interval(self._step, last, middle_ns, counts))
        self._step = max(last, self._step)
        if len(self._intervals) > _MAX_INTERVALS:
            pairs = list(itertools.pairwise(self._intervals))
            at = min(range(len(pairs)), key=lambda at: pairs[at][0].joins + pairs[at][1].joins)
            self._intervals[at : at + 2] = [pairs[at][0].joined(pairs[at][1])]

    def divided(
        self, is_chosen: Callable[[int, int], bool], last: int, end_ns: int
    ) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
        """Return the counts of intervals that are chosen, by first and last step, and of the others up to the last."""
        inside: list[NDArray[np.int64]] = []
        outside: list[NDArray[np.int64]] = []
        for each in self._intervals:
            if each.middle_ns <= end_ns:
                until = last if each.last < 0 else each.last
                (inside if is_chosen(each.first, until) else outside).append(each.counts)

        return inside, outside


class LazyLines(Sequence[SampledLine]):
    """The lines of a run, made when a rule asks for them: a live verdict seldom does, and has many ranks.

    Args:
        ends_ns, has_ended: as of `LineCounts.lines`.
    """

    def __init__(self, counts: LineCounts, ends_ns: Sequence[int], *, has_ended: bool) -> None:
        self._counts, self._ends_ns, self._has_ended = counts, ends_ns, has_ended

    @cached_property
    def _lines(self) -> tuple[SampledLine, ...]:
        return self._counts.lines(self._ends_ns, has_ended=self._has_ended)

    def __getitem__(self, at: Any) -> Any:
        """Return a line, or some of them."""
        return self._lines[at]

    def __len__(self) -> int:
        return len(self._lines)


class LazyWorkerLines(Mapping[int, Sequence[SampledLine]]):
    """The lines of the workers of each loader, by its number, made when a rule asks for them, as `LazyLines` are."""

    def __init__(self, counts: LineCounts) -> None:
        self._counts = counts

    @cached_property
    def _lines(self) -> dict[int, tuple[SampledLine, ...]]:
        return self._counts.of_workers()

    def __getitem__(self, number: int) -> tuple[SampledLine, ...]:
        """Return the lines of one loader."""
        return self._lines[number]

    def __iter__(self) -> Iterator[int]:
        return iter(self._lines)

    def __len__(self) -> int:
        return len(self._lines)


def _of_newest_loaders(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the counts without those of the first of very many loaders; the phase of a later one is smaller."""
    phases = np.unique(counts[:, 0])
    return counts if len(phases) <= MAX_LOADERS else counts[counts[:, 0] <= phases[MAX_LOADERS - 1]]


def _counts_of(rows: NDArray[np.void], lasted_ns: int) -> NDArray[np.int64]:
    """Return (phase, line, library function, samples, times, time that the samples stand for) of each row.

    Args:
        lasted_ns: time in which all of them were counted.
    """
    counts = np.stack([rows[name] for name in (*LINE_KEYS, *LINE_SUMS)], axis=1)
    share = rows["samples"] / max(int(rows["samples"].sum()), 1)
    return np.column_stack([counts, (share * lasted_ns).astype(np.int64)])


def _joined(newest: list[tuple[int, NDArray[np.int64]]]) -> list[tuple[int, NDArray[np.int64]]]:
    """Return the first of them and the sums of the others, where they are many."""
    if len(newest) <= _MAX_PARTS:
        return newest

    first, *others = newest
    return [first, (others[0][0], _summed([each for _, each in others]))]


def _by_time(parts: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Return (phase, line, library function, samples, times), each line once, the most frequent first.

    The first samples are denser, and those on busy cores rarer. So the samples in the phases of steps are divided by
    the time that they stand for: a line that runs late in a run would have too few.
    """
    rows = _summed(parts)
    seen, stands_ns = rows[:, _SAMPLES], rows[:, -1]
    known = ~np.isin(rows[:, 0], _OUTSIDE) & (stands_ns > 0)
    scale = seen[known].sum() / max(int(stands_ns[known].sum()), 1)
    rows[known, _SAMPLES] = np.maximum(np.rint(stands_ns[known] * scale), 1)
    return rows[np.argsort(-rows[:, _SAMPLES], kind="stable"), :-1]


def _summed(parts: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Return rows of `_counts_of`, those of a line added up."""
    rows = np.concatenate(parts)
    keys, at = np.unique(rows[:, : len(LINE_KEYS)], axis=0, return_inverse=True)
    sums = np.zeros((len(keys), rows.shape[1] - len(LINE_KEYS)), np.int64)
    np.add.at(sums, at.reshape(-1), rows[:, len(LINE_KEYS) :])
    return np.column_stack([keys, sums])
