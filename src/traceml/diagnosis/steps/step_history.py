"""History of the usual step over the whole run, in equal bins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from traceml.diagnosis.steps.aligned_steps import AlignedSteps
from traceml.diagnosis.steps.own_work import OwnWork

__all__ = ["NO_END", "Floats", "StepHistory"]

MIN_STEPS_PER_BIN = 4
"""A bin has at least this many steps, as single ones are noise."""
NO_END = 1 << 62
"""End of what lasts: no step comes after it."""
_MAX_BINS = 64

Floats = NDArray[np.float64]


class StepHistory(msgspec.Struct, frozen=True):
    """Usual step by bin of the whole run: medians over its steps.

    The others wait for the rank that takes longest, so its work is that of the step: a mean over ranks would count most
    of it as waiting.
    """

    first_step: NDArray[np.int64]  # first step of each bin
    steps: NDArray[np.int64]
    step_ns: Floats  # step time of each bin, the mean over all ranks
    # phase -> its time on the rank that takes longest, and the rest of the step; the mean over ranks that do not wait
    # for each other
    parts_ns: Mapping[str, Floats]
    # ranks that wait for each other, one per row of `own_ns`; empty if rows represent several ranks
    ranks: NDArray[np.int64] = np.empty(0, np.int64)
    own_ns: Floats = np.empty((0, 0))  # own work of each, rank x bin
    elements: Floats = np.empty(0)  # of the batches of all ranks; empty: unknown
    # steps of the run, their step times, and own work of `ranks` in them by phase; empty if only bins are known
    single_steps: NDArray[np.int64] = np.empty(0, np.int64)
    single_ns: Floats = np.empty(0)
    single_parts_ns: Mapping[str, NDArray[np.floating[Any]]] = {}
    start: int = 1  # first step of what is compared: a training, where a run has several
    end: int = NO_END  # the first one after it
    of_run: float = 1.0  # its share of the step time of the run
    mean_ns: float = 0.0  # the mean step as it was, with all that medians or other findings leave out; 0: unknown

    @classmethod
    def of(cls, window: AlignedSteps, work: OwnWork) -> StepHistory:
        """Return the history of a window, in up to 64 bins of equal width in steps."""
        first, last = int(window.steps[0]), int(window.steps[-1])
        width = max(-(-(last - first + 1) // _MAX_BINS), -(-MIN_STEPS_PER_BIN * (last - first + 1) // len(window)))
        numbers, starts = np.unique((window.steps - first) // width, return_index=True)
        ends = [*starts[1:].tolist(), len(window.steps)]

        def usual(values: NDArray[np.floating[Any]]) -> Floats:
            return _usual(values, starts.tolist(), ends)

        parts = _of_longest(work)
        waiting = np.maximum(work.step - sum(parts.values()), 0)
        parts["comm"] = waiting + parts.get("comm", 0)
        if len(starts) > 1 and ends[-1] - starts[-1] < MIN_STEPS_PER_BIN:  # of too few steps
            numbers, starts, ends = numbers[:-1], starts[:-1], ends[:-1]

        single = work.grouped and not work.represents and not len(work.excess_of_represented)
        return cls(
            first_step=first + numbers * width,
            steps=np.diff([*starts, ends[-1]]),
            step_ns=usual(work.step),
            parts_ns=dict(zip(parts, usual(np.array(list(parts.values()))), strict=True)),
            ranks=work.ranks if single else np.empty(0, np.int64),
            own_ns=usual(work.own) if single else np.empty((0, 0)),
            elements=usual(window.elements.sum(axis=0)) if window.elements.size else np.empty(0),
            single_steps=window.steps,
            single_ns=work.step.astype(np.float64),
            single_parts_ns=work.parts if single else {},
            mean_ns=float(window.total.mean()),
        )

    def of_ranks(self, ranks: Sequence[int], part: str | None) -> StepHistory:
        """Return the history of steps that vary only as some ranks' own work does beyond that of the others.

        Args:
            part: their work in this phase; None: all of it.
        """
        late, parts = np.isin(self.ranks, ranks), self.single_parts_ns
        own = parts.get(part or "", sum(parts.values(), np.zeros((len(late), 1))))
        single = own[late].mean(axis=0, dtype=np.float64) - np.median(own[~late], axis=0)
        starts = np.searchsorted(self.single_steps, self.first_step)
        binned = _usual(single, starts.tolist(), (starts + self.steps).tolist())
        rest = float(np.median(self.step_ns - binned))
        return replace(self, step_ns=rest + binned, single_ns=rest + single)

    def of_part(self, part: str, work: OwnWork) -> StepHistory:
        """Return the history of a part of the step alone, given the own work that this is the history of."""
        return replace(self, step_ns=self.parts_ns[part], single_ns=work.parts[part].mean(axis=0, dtype=np.float64))

    def edge(self, at: int, before_ns: float, after_ns: float) -> int:
        """Return the first step after a change near the start of a bin: where single steps fit the two levels best.

        Args:
            at: the bin; its first step, where no single step can be named.
        """
        first = self.first_step
        is_near = (self.single_steps >= first[max(at - 1, 0)]) & (self.single_steps < [*first[at + 1 :], NO_END][0])
        steps, times_ns = self.single_steps[is_near], self.single_ns[is_near]
        misfit = np.cumsum(np.abs(times_ns - before_ns) - np.abs(times_ns - after_ns))
        split = int(misfit.argmin()) + 1 if len(misfit) else 0
        return int(steps[split] if 0 < split < len(steps) else first[at])


def _usual(values: NDArray[np.floating[Any]], starts: Sequence[int], ends: Sequence[int]) -> Floats:
    """Return the median by span of the last axis; spans of one length at once, since most have the same."""
    at, lengths = np.asarray(starts), np.subtract(ends, starts)
    groups = [np.flatnonzero(lengths == length) for length in np.unique(lengths)]
    medians = [
        np.median(values[..., at[group, None] + np.arange(lengths[group[0]])], axis=-1, overwrite_input=True)
        for group in groups
    ]
    return np.concatenate(medians, axis=-1)[..., np.argsort(np.concatenate(groups))]


def _of_longest(work: OwnWork) -> dict[str, Floats]:
    if not work.grouped:
        return {name: values.mean(axis=0, dtype=np.float64) for name, values in work.parts.items()}

    at, row = np.arange(work.own.shape[1]), work.own.argmax(axis=0)
    return {name: values[row, at].astype(np.float64) for name, values in work.parts.items()}
