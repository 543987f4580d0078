"""Slow part of a run, compared with its other steps: levels, times of phases, and ranks that alone became slower."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from traceml.diagnosis.findings import known_facts
from traceml.diagnosis.steps.change_points import LevelChange, level_change
from traceml.diagnosis.steps.own_work import have_half
from traceml.diagnosis.steps.step_history import NO_END, Floats, StepHistory

__all__ = ["DOMINANT_SHARE", "SlowSteps"]

DOMINANT_SHARE = 0.7
"""The phase, or the ranks, that have this share of the difference are blamed."""
SOME_RANKS_SHARE = 1 / 3
"""Ranks are blamed if the others' work grows by less than this share of theirs."""
MIN_ERRORS = 4.0
"""The correlation of single steps with the slow part is this many standard errors above 0."""
OF_MEAN = 0.5
"""Steps became slower only if the mean step is longer by this share of what the usual one is, by medians of bins."""


class SlowSteps(NamedTuple):
    """A run in equal bins, and the part of it whose steps are slow.

    The usual steps are those outside of it; of growth, the first third or those before, and the slow ones the last.
    """

    bins: StepHistory
    change: LevelChange

    @property
    def usual(self) -> NDArray[np.bool_]:
        """The bins of the usual steps."""
        at = np.arange(len(self.bins.steps))
        return at < self._ends_of_growth[0] if self.change.shape == "growth" else ~self.slow

    @property
    def slow(self) -> NDArray[np.bool_]:
        """The bins of the slow steps."""
        at = np.arange(len(self.bins.steps))
        if self.change.shape == "growth":
            return at >= self._ends_of_growth[1]

        return (at >= self.change.first) & (at < self.change.last)

    @property
    def _ends_of_growth(self) -> tuple[int, int]:
        """The bin at which the usual steps end, and that at which the slow ones begin: the last third."""
        third = (self.change.last - self.change.first) // 3
        return self.change.first or third, self.change.last - third

    @property
    def starts(self) -> list[int]:
        """First step of each bin, and the step after the last one."""
        return [*self.bins.first_step.tolist(), self.bins.end]

    @property
    def slow_range(self) -> tuple[int, int]:
        """First step of the slow part, and the one after it, without the first step of the run."""
        return max(self.starts[self.change.first], 1), self.starts[self.change.last]

    @property
    def compared_steps(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Ranges of steps to compare the use of the machine in: usual ones, and slow ones."""
        starts, change = self.starts, self.change
        if change.shape == "growth":
            end, begin = self._ends_of_growth
            return (self.bins.start, starts[end]), (starts[begin], self.bins.end)

        usual = (self.bins.start, starts[change.first]) if change.first else (starts[change.last], self.bins.end)
        return usual, self.slow_range

    @property
    def begins_later(self) -> bool:
        """Whether other steps of the run precede the slow ones: usual ones, or those of another training."""
        return bool(self.change.first) or self.bins.start > 1

    def levels(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return the usual time of each phase in ns, in usual steps and in slow ones."""
        return self._medians(self.usual), self._medians(self.slow)

    def _medians(self, at: NDArray[np.bool_]) -> dict[str, float]:
        return {name: float(np.median(values[at])) for name, values in self.bins.parts_ns.items()}

    def phase_ns(self, phase: str, at: NDArray[np.bool_] | slice = slice(None)) -> float:
        """Return the time of a phase in some bins, or all."""
        return float((self.bins.parts_ns[phase] * self.bins.steps)[at].sum())

    def phase_share(self, phase: str, at: NDArray[np.bool_] | slice = slice(None)) -> float:
        """Return the share of step time that a phase has in some bins, or in all."""
        return self.phase_ns(phase, at) / max(float((self.bins.step_ns * self.bins.steps)[at].sum()), 1.0)

    def mean_and_lost_ns(self) -> tuple[float, float]:
        """Return the mean step, and what a mean step would be shorter by without the slow part."""
        bins, change = self.bins, self.change
        mean = bins.mean_ns or float(np.average(bins.step_ns, weights=bins.steps))
        lost = ((bins.step_ns - change.before_ns) * bins.steps)[change.bins].sum() / bins.steps.sum()
        if len(bins.single_steps) and change.shape != "growth":  # bins at its edges have other steps, too
            lost = (change.after_ns - change.before_ns) * self.contains(bins.single_steps).mean()

        return mean, float(lost)

    def is_of_mean(self) -> bool:
        """Return whether the mean step became longer, too, by much of what the usual one did.

        Steps that wait for several workers at once may come to wait for one each, which takes no longer.
        """
        bins = self.bins
        if not len(bins.single_steps):
            return True

        until = np.concatenate([[0.0], bins.single_ns.cumsum()])
        starts = np.searchsorted(bins.single_steps, bins.first_step)
        means = (until[starts + bins.steps] - until[starts]) / bins.steps
        by_mean, by_median = (
            float(np.median(each[self.slow]) - np.median(each[self.usual])) for each in (means, bins.step_ns)
        )
        return by_mean >= OF_MEAN * by_median and self._is_of_single_steps()

    def _is_of_single_steps(self) -> bool:
        """Return whether single steps are longer in the slow part than by chance.

        Where steps are either short or long, by chance, the medians of few bins are all long now and then.
        """
        change = self.change
        if change.shape == "growth":
            return True

        longer = change.after_ns - change.before_ns
        times_ns = np.clip(self.bins.single_ns, change.before_ns - longer, change.after_ns + longer)
        inside = self.contains(self.bins.single_steps)
        if not inside.any() or inside.all():
            return True

        correlation = float(np.corrcoef(times_ns, inside)[0, 1])
        return bool(correlation * len(times_ns) ** 0.5 >= MIN_ERRORS)

    def ranks(self) -> tuple[int, ...]:
        """Return the ranks whose own work alone became longer; empty for all."""
        bins, usual, slow = self.bins, self.usual, self.slow
        if len(bins.own_ns) < 2:
            return ()

        longer = np.median(bins.own_ns[:, slow], axis=1) - np.median(bins.own_ns[:, usual], axis=1)
        return self._alone(longer, float(np.median(bins.step_ns[slow]) - np.median(bins.step_ns[usual])))

    def late_at_times(self) -> tuple[tuple[int, ...], str | None]:
        """Return the ranks whose own work alone became longer on average, and the phase of it; no rank for all.

        Of a rank that is late in every second step, and of the others, which wait in the steps between, no median has
        both.
        """
        bins, ((start, end), (slow_start, slow_end)) = self.bins, self.compared_steps
        steps = bins.single_steps
        usual, slow = (steps >= start) & (steps < end), (steps >= slow_start) & (steps < slow_end)
        if not bins.single_parts_ns or not usual.any() or not slow.any():
            return (), None

        longer = {
            name: values[:, slow].mean(axis=1, dtype=np.float64) - values[:, usual].mean(axis=1, dtype=np.float64)
            for name, values in bins.single_parts_ns.items()
        }
        whole = float(bins.single_ns[slow].mean() - bins.single_ns[usual].mean())
        ranks = self._alone(np.sum(list(longer.values()), axis=0), whole)
        of_them = {name: float(values[np.isin(bins.ranks, ranks)].sum()) for name, values in longer.items()}
        return ranks, max(of_them, key=lambda name: of_them[name]) if ranks else None

    def _alone(self, longer_ns: Floats, whole_ns: float) -> tuple[int, ...]:
        """Return the ranks that have nearly all of what the work of ranks became longer by; empty for all."""
        late = have_half(longer_ns)
        if 2 * late.sum() > len(late) or longer_ns.max() < DOMINANT_SHARE * whole_ns:
            return ()

        is_known = longer_ns[~late].max() < SOME_RANKS_SHARE * longer_ns.max()
        return tuple(self.bins.ranks[late].tolist()) if is_known else ()

    def ranks_in(self, ranks: tuple[int, ...], phase: str | None) -> tuple[int, ...]:
        """Return those of some ranks whose work in a phase became longer; others have another cause."""
        values = self.bins.single_parts_ns.get(phase or "")
        if values is None or len(ranks) < 2:
            return ranks

        steps = self.bins.single_steps
        usual, slow = (
            np.median(values[:, (steps >= since) & (steps < until)], axis=1) for since, until in self.compared_steps
        )
        longer = slow - usual
        rows = np.isin(self.bins.ranks, ranks)
        return tuple(self.bins.ranks[rows & (longer >= longer[rows].max() / 2)].tolist())

    def of_ranks(self, ranks: tuple[int, ...], phase: str | None) -> SlowSteps:
        """Return the same change by the work of these ranks alone: what else varies moves its first step."""
        alone = self.bins.of_ranks(ranks, phase)
        own = level_change(alone.step_ns)
        return self if own is None or own.shape != self.change.shape else SlowSteps(alone, own)

    def contains(self, steps: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which steps, by their numbers, are in the slow part that the evidence names."""
        named = self.evidence()
        return np.asarray((steps >= named["since_step"]) & (steps < named.get("until_step", NO_END)))

    def evidence(self) -> dict[str, Any]:
        """Return the shape and the steps in the whole run, as a finding has them."""
        bins, change = self.bins, self.change
        usual_ns, slow_ns = change.before_ns, change.after_ns
        since = int(bins.first_step[change.first])
        if change.first and change.shape != "growth":
            since = bins.edge(change.first, usual_ns, slow_ns)

        end = bins.end if bins.end < NO_END else None
        if change.last < len(bins.steps):
            end = bins.edge(change.last, slow_ns, usual_ns)

        slow_part = "first" if not self.begins_later else "stays" if end is None else "recovers"
        per_step = (slow_ns - usual_ns) / max(int(bins.first_step[-1] - bins.first_step[change.first]), 1)
        return {
            "shape": "growth" if change.shape == "growth" else slow_part,
            "since_step": since,
            **known_facts(until_step=end),
            **({"growth_ms_per_step": per_step / 1e6} if change.shape == "growth" else {}),
        }
