"""Steps of a run in a bounded number of bins of equal width, for charts of the whole run.

Bins are those of `database.summaries`: bin = step // width, and the width is a power of two that doubles when a step
does not fit. Step times are kept as histograms, whose percentiles are accurate to one percent for any number of steps.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from traceml.database.store.summaries import LEVELS, level_middle_ns, level_of
from traceml.diagnosis.steps.aligned_steps import AlignedSteps, Ints
from traceml.diagnosis.steps.step_split import split_backward
from traceml.runs.rows.step_totals import StepTotals

__all__ = ["StepBins"]

Floats = NDArray[Any]

_BINS = 256
_BINS_OF_MANY = 64
_MANY_RANKS = 1024
_PER_RANK = ("total", "comm", "backward", "own", "measured", "count")


class StepBins:
    """Sums of aligned steps by bin, over all ranks and per rank.

    Args:
        ranks: expected number of ranks; with many, there are fewer bins.
    """

    def __init__(self, ranks: int = 1) -> None:
        self.grouped = True
        """Whether the ranks wait for each other."""
        self.bins = _BINS if ranks <= _MANY_RANKS else _BINS_OF_MANY
        self.width = 1
        self.first = 0
        """First step of the first bin."""
        self.latest = -1
        """Last step taken."""
        self.sampled = False
        """Whether percentiles are of a sample of the steps."""
        self.ranks: Ints = np.empty(0, np.int64)
        """Rank of each row of the sums per rank."""
        self._times: dict[str, Floats] = {}
        self._histogram: Floats = np.zeros((self.bins, LEVELS), np.int32)
        self._least: Floats = np.full(self.bins, np.inf)
        self._most: Floats = np.zeros(self.bins)
        self._by_rank: dict[str, Floats] = {name: np.zeros((0, self.bins), np.float32) for name in _PER_RANK}

    @property
    def used(self) -> int:
        """Number of bins up to the last that has steps."""
        return (self.latest - self.first) // self.width + 1 if self.latest >= 0 else 0

    def take(self, window: AlignedSteps) -> bool:
        """Take the steps of a window after the last one taken; return whether there were any."""
        new = window.select(window.steps > self.latest)
        if not len(new) or not len(new.ranks):
            return False

        self._cover(int(new.steps[0]), int(new.steps[-1]))
        self._take_histogram(new)
        self._take_ranks(new)
        self._take_times(new)
        return True

    def take_totals(self, totals: StepTotals, sample: AlignedSteps) -> None:
        """Take all steps of a long run, as the first ones: means and extremes of all, percentiles of a sample."""
        self.sampled, self.width = True, totals.width
        self._cover(totals.first, int(totals.latest.max()))
        self._take_histogram(sample)
        rows, bins = self._rows_of(totals.ranks), self._bins_of(totals.starts)
        summed = {"total": totals.total, "own": totals.own, "measured": totals.measured, "count": totals.count}
        for name, values in (summed | {name: totals.times[name] for name in ("comm", "backward")}).items():
            np.add.at(self._by_rank[name], np.ix_(rows, bins), values)

        for name, values in totals.times.items():
            np.add.at(self._times.setdefault(name, np.zeros(self.bins)), bins, values.sum(axis=0))

        np.minimum.at(self._least, bins, totals.least_ns)
        np.maximum.at(self._most, bins, totals.most_ns)

    def steps(self, joined: int) -> Ints:
        """Return the first step of each bin, with `joined` bins as one."""
        return self.first + np.arange(-(-self.used // joined), dtype=np.int64) * (self.width * joined)

    def counts(self, joined: int) -> Ints:
        """Return the number of step times in each bin."""
        return self._joined(self._histogram.sum(axis=1), joined).astype(np.int64)

    def percentiles_ns(self, shares: tuple[float, ...], joined: int) -> list[Floats]:
        """Return percentiles of the step times by bin, for each share; NaN if a bin is empty."""
        histogram = self._joined(self._histogram, joined).astype(np.int64)
        reached, count = np.cumsum(histogram, axis=1), histogram.sum(axis=1)
        least = self._joined(self._least, joined, np.minimum)
        most = self._joined(self._most, joined, np.maximum)
        found = []
        for share in shares:
            level = (reached >= np.maximum(np.ceil(share * count), 1)[:, None]).argmax(axis=1)
            value = np.clip(level_middle_ns(level), least, most)
            found.append(np.where(count > 0, value, np.nan))

        if not self.sampled or not count.any():
            return found

        return [np.clip(self._filled(values, joined), least, most) for values in found]

    def _filled(self, values: Floats, joined: int) -> Floats:
        """Return percentiles in which bins without sampled steps have the nearest one's, in the ratio of the means."""
        mean = _ratio(*(self._joined(self._by_rank[name].sum(axis=0), joined) for name in ("total", "count")))
        known = np.flatnonzero(~np.isnan(values))
        nearest = known[np.abs(np.arange(len(values))[:, None] - known).argmin(axis=1)]
        filled: Floats = np.where(np.isnan(values), values[nearest] * mean / mean[nearest], values)
        return filled

    def longest_ns(self, joined: int) -> Floats:
        """Return the longest step of each bin."""
        most = self._joined(self._most, joined, np.maximum)
        return np.where(most > 0, most, np.nan)

    def phases_ns(self, joined: int) -> dict[str, Floats]:
        """Return the mean of each phase by bin; backward is own work, comm includes the waiting inside it."""
        count = self._joined(self._by_rank["count"].sum(axis=0), joined)
        times = {**self._times}
        if times:
            times |= {name: values.sum(axis=0) for name, values in self._split().items()}

        per_step = {name: _ratio(self._joined(values, joined), count) for name, values in times.items()}
        return {name: values for name, values in per_step.items() if np.nansum(values) > 0}

    def work_ns(self, joined: int) -> Floats:
        """Return own work per step, rank x bin: the step without waiting for others; NaN if a rank has none.

        In data-parallel training the steps of all ranks are equally long, as all wait for the slowest; only own work
        differs.
        """
        kept = self._by_rank
        work = kept["total"] - self._split()["comm"]
        return _ratio(self._joined(work.T, joined).T, self._joined(kept["count"].T, joined).T)

    def _split(self) -> dict[str, Floats]:
        """Return own backward and `comm`, rank x bin; bins without a measured step use the rank's mean of the run."""
        kept = self._by_rank
        overall = _ratio(kept["own"].sum(axis=1), kept["measured"].sum(axis=1))[:, None]
        mean = np.where(kept["measured"] > 0, _ratio(kept["own"], kept["measured"]), overall)
        times = {name: kept[name] for name in ("backward", "comm")}
        return split_backward(times, mean, kept["count"], grouped=self.grouped)

    def _joined(self, values: NDArray[Any], joined: int, by: np.ufunc = np.add) -> Floats:
        used = self.used
        found: Floats = by.reduceat(values[:used], np.arange(0, used, joined), axis=0) if used else values[:0]
        return found

    def _cover(self, first: int, last: int) -> None:
        """Make room for steps up to the last; the first ones decide where the bins begin."""
        if self.latest < 0:
            self.first = first // self.width * self.width

        self.latest = last
        while self.used > self.bins:
            self._join()

    def _join(self) -> None:
        """Make each bin twice as wide."""
        # A bin with an odd number is the second half of the wider one.
        odd = self.first // self.width % 2
        self.first -= odd * self.width
        self.width *= 2
        self._histogram = _halved(self._histogram, 0, odd)
        self._least = _halved(self._least, np.inf, odd, np.minimum)
        self._most = _halved(self._most, 0, odd, np.maximum)
        self._times = {name: _halved(values, 0, odd) for name, values in self._times.items()}
        self._by_rank = {name: _halved(values.T, 0, odd).T.copy() for name, values in self._by_rank.items()}

    def _bins_of(self, steps: Ints) -> Ints:
        return (steps - self.first) // self.width

    def _take_histogram(self, new: AlignedSteps) -> None:
        bins = self._bins_of(new.steps)
        total = np.maximum(new.total.astype(np.float64), 1.0)
        levels = level_of(total)
        np.add.at(self._histogram, (np.broadcast_to(bins, levels.shape), levels), 1)
        np.minimum.at(self._least, bins, total.min(axis=0))
        np.maximum.at(self._most, bins, total.max(axis=0))

    def _take_ranks(self, new: AlignedSteps) -> None:
        rows = self._rows_of(new.ranks)
        measured = ~np.isnan(new.backward_own)
        values = {
            "total": new.total,
            "comm": new.times["comm"],
            "backward": new.times["backward"],
            "own": np.where(measured, new.backward_own, 0),
            "measured": measured.astype(np.float32),
            "count": np.ones_like(new.total),
        }
        bins, starts = np.unique(self._bins_of(new.steps), return_index=True)
        for name, each in values.items():
            self._by_rank[name][np.ix_(rows, bins)] += np.add.reduceat(each, starts, axis=1)

    def _take_times(self, new: AlignedSteps) -> None:
        bins = self._bins_of(new.steps)
        for name, values in new.named_times().items():
            kept = self._times.setdefault(name, np.zeros(self.bins))
            np.add.at(kept, bins, values.sum(axis=0, dtype=np.float64))

    def _rows_of(self, ranks: Ints) -> Ints:
        if missing := sorted(set(ranks.tolist()) - set(self.ranks.tolist())):
            self.ranks = np.concatenate([self.ranks, np.array(missing, np.int64)])
            room = np.zeros((len(missing), self.bins), np.float32)
            self._by_rank = {name: np.concatenate([values, room]) for name, values in self._by_rank.items()}

        order = np.argsort(self.ranks)
        return order[np.searchsorted(self.ranks, ranks, sorter=order)]


def _halved(values: NDArray[Any], empty: float, odd: int, by: np.ufunc = np.add) -> NDArray[Any]:
    """Join pairs of bins; the first one is alone if its number is odd."""
    room = np.full_like(values, empty)
    shifted = np.concatenate([room[:odd], values, room[:odd]])
    joined = by(shifted[::2], shifted[1::2])
    return np.concatenate([joined, room])[: len(values)]


def _ratio(above: Floats, below: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(below > 0, above / below, np.nan)
