"""Exact figures of a long run over all of its steps, from the sums in its store, by rank and bin of steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from traceml.database.row_arrays import join_rows
from traceml.database.schema import PHASE_COLUMNS, PHASE_LABELS, STEPS, Table
from traceml.database.store.summaries import StepSums, TableSums, bin_width, sum_rows
from traceml.diagnosis.facts.run_time import SET_UP_STEPS
from traceml.diagnosis.steps.aligned_steps import Ints
from traceml.diagnosis.steps.kept_steps import MAX_USER_PHASES
from traceml.diagnosis.steps.step_split import (
    DEVICE_LABELS,
    Floats,
    fitted_user_times,
    named_times,
    put_device_times,
    split_backward,
    spread_device_times,
)

__all__ = ["SetUpSums", "StepTotals", "step_totals"]


class StepTotals(msgspec.Struct, frozen=True):
    """Sums over steps, in nanoseconds: rank x bin of equal width in steps.

    Attributes:
        ranks: the ranks, one per row of the arrays.
        first: first step of the first bin, a multiple of `width`.
        width: steps per bin, a power of two.
        latest: last step of each rank.
        count: steps.
        total: wall time of the steps.
        times: phase -> time, the user's phases by name; they add up to `total`. Where a device took part, its times
            replace the CPU's, which are cut to the time in which the device was idle in the whole bin.
        device: whether the device's times replace the CPU's; see `step_split`.
        own: own backward of the steps that measured it, `measured`: how many did.
        elements, samples: sizes of the batches, as in `schema.STEPS`.
        least_ns, most_ns: shortest and longest step of each bin; infinite and zero where there is none.
        all_steps: the sums of all ranks together, for quantiles.
    """

    ranks: Ints
    first: int
    width: int
    latest: Ints
    count: Floats
    total: Floats
    times: Mapping[str, Floats]
    device: bool
    own: Floats
    measured: Floats
    elements: Floats
    samples: Floats
    least_ns: Floats
    most_ns: Floats
    all_steps: TableSums

    def mean_split(self, *, grouped: bool) -> dict[str, Floats]:
        """Return mean nanoseconds per step by phase and rank: own work, and waiting as `comm`.

        Args:
            grouped: whether the ranks wait for each other.
        """
        count = np.maximum(self.count.sum(axis=1), 1)
        measured, own = self.measured.sum(axis=1), self.own.sum(axis=1)
        means = {name: values.sum(axis=1) / count for name, values in self.times.items()}
        return split_backward(means, np.where(measured > 0, own / np.maximum(measured, 1), np.nan), grouped=grouped)

    @property
    def starts(self) -> Ints:
        """First step of each bin."""
        return self.first + np.arange(self.count.shape[1], dtype=np.int64) * self.width

    @property
    def mean_ns(self) -> float:
        """Mean step of all ranks."""
        return float(self.total.sum() / max(float(self.count.sum()), 1.0))

    def quantiles_ns(self, shares: Sequence[float]) -> list[float]:
        """Return quantiles of the step times of all ranks, accurate to one percent."""
        return StepSums.of({STEPS.name: self.all_steps}).quantiles_ns(shares)

    def without(self, some: StepTotals) -> StepTotals:
        """Return the sums without those of some of the steps, in narrower bins; extremes stay."""
        cells = np.ix_(np.searchsorted(self.ranks, some.ranks), (some.starts - self.first) // self.width)

        def less(values: Floats, by: Floats) -> Floats:
            left = values.copy()
            np.subtract.at(left, cells, by)
            return np.maximum(left, 0)

        share = some.count / np.maximum(self.count[cells], 1)
        same_clock = self.device == some.device
        times = {
            name: less(values, some.times[name] if same_clock else values[cells] * share)
            for name, values in self.times.items()
            if name in some.times or not same_clock
        }
        return replace(
            self,
            count=less(self.count, some.count),
            total=less(self.total, some.total),
            times={**self.times, **times},
            own=less(self.own, some.own),
            measured=less(self.measured, some.measured),
            elements=less(self.elements, some.elements),
            samples=less(self.samples, some.samples),
            all_steps=_without_levels(self.all_steps, some.all_steps),
        )


def step_totals(sums: Mapping[int, StepSums], names: Mapping[int, Mapping[int, str]]) -> StepTotals:
    """Return the sums of all ranks.

    Args:
        sums: of each rank, at least one; a rank without steps is left out.
    """
    ranks = sorted(rank for rank, each in sums.items() if each.count)
    parts = [sums[rank] for rank in ranks]
    first, width, bins = _bins([part.steps for part in parts])
    steps, device, user = (
        _Cells([getattr(part, table) for part in parts], first // width, width, bins)
        for table in ("steps", "device_steps", "user_phases")
    )
    total, own, measured = (steps.matrix(name) for name in ("total_ns", "backward_own_ns", "backward_own_ns_rows"))
    times = {label: steps.matrix(name) for label, name in zip(PHASE_LABELS, PHASE_COLUMNS, strict=True)}
    has_device = bool(ranks and device.matrix("rows").any(axis=1).all())
    if has_device:
        own, measured = _put_device_times(times, total, steps.matrix("rows"), device)

    times["other"] = np.maximum(total - sum(times.values()), 0)
    by_name = _user_times(user, [names.get(rank, {}) for rank in ranks])
    if has_device and by_name:
        by_name = fitted_user_times(by_name, times["user"])

    return StepTotals(
        ranks=np.array(ranks, np.int64),
        first=first,
        width=width,
        latest=np.array([int(part.steps.bins["last_step"].max()) for part in parts], np.int64),
        count=steps.matrix("rows"),
        total=total,
        times=named_times(times, by_name),
        device=has_device,
        own=own,
        measured=measured,
        elements=steps.matrix("elements"),
        samples=steps.matrix("samples"),
        least_ns=steps.extreme("total_ns_min", np.minimum, np.inf),
        most_ns=steps.extreme("total_ns_max", np.maximum, 0.0),
        all_steps=parts[0].steps.join(*(part.steps for part in parts[1:])),
    )


def _without_levels(whole: TableSums, some: TableSums) -> TableSums:
    """Return the histogram of step times without that of some of the steps."""
    levels = whole.levels.copy()
    levels[np.searchsorted(levels[:, 0], some.levels[:, 0]), 1] -= some.levels[:, 1]
    return replace(whole, levels=levels[levels[:, 1] > 0])


def _bins(parts: Sequence[TableSums]) -> tuple[int, int, int]:
    """Return the first step, width and number of the bins that all ranks have in common."""
    first = min(int(part.bins["first_step"].min()) for part in parts)
    last = max(int(part.bins["last_step"].max()) for part in parts)
    width = bin_width(first, last, max(part.width for part in parts))
    return first // width * width, width, last // width - first // width + 1


class SetUpSums:
    """Collects the rows of the first steps of a run, which include set-up: reports leave them out.

    Args:
        first: number of its first step.
    """

    def __init__(self, first: int) -> None:
        self._end = first + SET_UP_STEPS
        self._rows: dict[str, list[NDArray[np.void]]] = {}
        self._ranks: dict[str, list[Ints]] = {}

    def take(self, table: Table, by_rank: Mapping[int, bytes]) -> None:
        """Take rows of a table with steps; other steps are ignored."""
        for rank, data in by_rank.items():
            rows = np.frombuffer(data, table.dtype)
            rows = rows[rows["step"] < self._end]
            if len(rows):
                self._rows.setdefault(table.name, []).append(rows)
                self._ranks.setdefault(table.name, []).append(np.full(len(rows), rank))

    def totals(self, names: Mapping[int, Mapping[int, str]]) -> StepTotals | None:
        """Return their sums, None if there are none."""
        if STEPS.name not in self._rows:
            return None

        summed = {
            table: sum_rows(table, join_rows(rows), np.concatenate(self._ranks[table]))
            for table, rows in self._rows.items()
        }
        return step_totals(StepSums.by_stream(summed), names)


class _Cells:
    """The bins of one table of all ranks, added up in matrices of rank x bin.

    Args:
        parts: the table's sums of each rank.
        first: number of the first bin.
        width: steps per bin; the parts' widths are not larger.
        bins: number of bins; sums of other steps are left out.
    """

    def __init__(self, parts: Sequence[TableSums], first: int, width: int, bins: int) -> None:
        self._parts = [part.bins for part in parts]
        self._shape = len(parts), bins
        self.rows = np.repeat(np.arange(len(parts)), [len(part) for part in self._parts])
        numbers = [part.bins["bin"] * part.width // width for part in parts]
        self._columns = np.concatenate([*numbers, np.empty(0, np.int64)]) - first
        self.group = self._field("group").astype(np.int64)
        self._inside = (self._columns >= 0) & (self._columns < bins)

    def matrix(self, field: str, chosen: NDArray[np.bool_] | None = None) -> Floats:
        """Return the sums of a field, of all or of the chosen bins."""
        at = self._inside if chosen is None else self._inside & chosen
        cells = self.rows[at] * self._shape[1] + self._columns[at]
        summed = np.bincount(cells, self._field(field)[at], self._shape[0] * self._shape[1])
        return np.asarray(summed.reshape(self._shape))

    def extreme(self, field: str, reduce: np.ufunc, empty: float) -> Floats:
        """Return the least or greatest value of a field of all ranks by bin."""
        found = np.full(self._shape[1], empty)
        reduce.at(found, self._columns[self._inside], self._field(field)[self._inside])
        return found

    def _field(self, name: str) -> Floats:
        """Return a field of all bins; zero where an older version did not sum it."""
        fields = [part[name] if name in (part.dtype.names or ()) else np.zeros(len(part)) for part in self._parts]
        return np.concatenate([*fields, np.empty(0)])


def _put_device_times(times: dict[str, Floats], total: Floats, steps: Floats, device: _Cells) -> tuple[Floats, Floats]:
    """Replace CPU times by device times, in place; return own backward, and the number of steps that measured it."""
    own, measured = device.matrix("backward_own_ns"), device.matrix("backward_own_ns_rows")
    by_phase = {label: device.matrix(f"{label}_ns") for label in DEVICE_LABELS}
    found = np.minimum(device.matrix("rows"), steps)
    spread = spread_device_times(by_phase, total, steps, found)
    put_device_times(times, own.copy(), total, {**spread, "backward_own": own}, np.ones(total.shape, bool))
    return own, measured


def _user_times(user: _Cells, names: Sequence[Mapping[int, str]]) -> dict[str, Floats]:
    """Return the user's phases by name; those beyond a bound are left out."""
    keys, at = np.unique(np.stack([user.rows, user.group]), axis=1, return_inverse=True)
    named = [names[row].get(number, f"phase {number}") for row, number in keys.T.tolist()]
    numbers = {name: number for number, name in enumerate(list(dict.fromkeys(named))[:MAX_USER_PHASES])}
    of_bin = np.array([numbers.get(name, -1) for name in named], np.int64)[at.reshape(-1)]
    return {name: user.matrix("ns", of_bin == number) for name, number in numbers.items()}
