"""Buffer of step rows of thousands of ranks, as they arrive; it returns the steps that all ranks have.

Of a long run they are a sample: blocks of consecutive steps, spread over the run, the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from traceml.database.row_arrays import rows_by
from traceml.database.schema import PHASE_COLUMNS, PHASE_LABELS, STEPS, StepFlag, unpack_bits
from traceml.diagnosis.facts.run_time import SET_UP_STEPS
from traceml.diagnosis.facts.trainings.step_numbers import StepNumbers
from traceml.diagnosis.steps.aligned_steps import AlignedSteps, Ints, block_begins
from traceml.diagnosis.steps.representatives import Representatives
from traceml.diagnosis.steps.step_split import (
    DEVICE_LABELS,
    Floats,
    fitted_user_times,
    leave_out_waiting,
    put_device_times,
    spread_device_times,
    step_times_on_device,
)

__all__ = ["MAX_CELLS", "MAX_USER_PHASES", "KeptSteps", "Rows", "SampledSteps", "SpreadSteps", "slots_for"]

Rows = NDArray[np.void]

# The durations of a step row and the size of its batch are neighbors: one slice of the row matrix holds them all.
_DURATIONS = slice(STEPS.index["total_ns"], STEPS.index["samples"] + 1)
_POSITION = {name: position for position, name in enumerate(STEPS.names[_DURATIONS])}
_BITS, _PROFILED, _CLOSURES = STEPS.index["bits"], int(StepFlag.PROFILED), int(StepFlag.CLOSURES)
_DEVICE_VALUES = (*DEVICE_LABELS, "backward_own", "total")

MAX_CELLS = 640_000
"""Most steps of all ranks together that a window has: the rules' cost grows with ranks x steps."""
_MIN_STEPS = 20
# The newest steps are those of ten seconds, 200 at least and 1,024 at most; with many ranks fewer, to cost no more.
_NEWEST_NS = 10e9
_MIN_NEWEST, _MAX_NEWEST, _MIN_NEWEST_OF_MANY, _NEWEST_CELLS = 200, 1024, 32, 65_536
_BLOCK_CELLS = 4096
_MAX_BEHIND = 0.75
"""Of ranks that have ended, one that is behind another by more than this share of its steps is not compared."""
MAX_USER_PHASES = 32
"""Names of user phases beyond these count as `other`."""
_BLOCK = 16
_MAX_SPREAD_SLOTS, _MIN_SPREAD_SLOTS, _SPREAD_CELLS = 1024, 256, 65_536
_SMALL_CHANGE = 1.1
"""A usual step that varies by less than this factor is as long as ever: a slowdown costs a tenth of the steps' time."""


def slots_for(ranks: int) -> int:
    """Return the number of steps to keep per rank: 4,096 for a few ranks, 128 for ten thousand (68 MiB)."""
    slots = 4096
    while slots > 128 and slots * max(ranks, 1) > 131_072:
        slots //= 2

    return slots


class KeptSteps:
    """The last rows of every rank: a ring of `slots` steps for each, which is added when the rank arrives.

    The rows of a rank must arrive in order. A rank that starts again from step 0 overwrites its earlier rows.
    Durations are kept as float32 (a step of ten seconds to the microsecond), 57 bytes per rank and step.

    Args:
        slots: steps kept per rank; see `slots_for`.
        ranks: ranks to allocate now; more are added as they arrive.
    """

    def __init__(self, slots: int, ranks: int = 0) -> None:
        self.slots = slots
        self.representatives = Representatives()  # ranks that represent others, where hosts are merged
        self.numbers = StepNumbers()  # numbers of the steps, whose first ones include set-up
        self.latest: Ints = np.empty(0, np.int64)  # last step of each rank by rank index, -1 before the first
        self.end_ns: Ints = np.empty(0, np.int64)  # monotonic timestamp at the end of that step
        self._capacity = 0
        self._ended = np.empty(0, bool)
        self._step = np.empty(0, np.int64)
        self._values = np.empty((0, len(_POSITION)), np.float32)
        self._user: dict[str, tuple[NDArray[np.int32], Floats]] = {}
        self._device: tuple[Ints, Floats] | None = None
        self._evaluation: tuple[Ints, Floats] | None = None
        self._profiled: set[int] = set()
        self._closures = np.empty(0, bool)
        self._grow(ranks)

    def reached(self, missing: Collection[int] = ()) -> Ints:
        """Return the last step of each rank, also of those that others represent; -1 before the first.

        Args:
            missing: ranks with rows that are not compared; see `AlignedSteps`.
        """
        return self.representatives.reached(self.latest, missing) if self.representatives else self.latest

    def scatter(self, rank_indices: Ints, rows: Rows) -> None:
        """Take step rows of many ranks at once.

        Args:
            rank_indices: the rank of each row; the rows of a rank in order, ranks in any order.
            rows: rows of `schema.STEPS`.
        """
        if not len(rows):
            return

        self.advance(rank_indices, rows["step"], rows["t_end_ns"])
        kept = self._has(rows["step"])
        rank_indices, rows = rank_indices[kept], rows[kept]
        matrix = np.ascontiguousarray(rows).view(np.int64).reshape(-1, len(STEPS.names))
        steps = matrix[:, STEPS.index["step"]]
        at = self._cells(rank_indices, steps)
        self._step[at] = steps
        self._values[at] = matrix[:, _DURATIONS]
        flags = unpack_bits(matrix[:, _BITS]).flags
        self._closures[at] = flags & _CLOSURES > 0
        self._profiled.update(steps[flags & _PROFILED > 0].tolist())

    def advance(self, rank_indices: Ints, steps: Ints, ends_ns: Ints) -> None:
        """Record the latest steps of ranks, and the monotonic timestamps of their ends."""
        self._grow(int(rank_indices.max()) + 1)
        # Of a repeated index the last value stays, which is the rank's newest row.
        self.latest[rank_indices], self.end_ns[rank_indices] = steps, ends_ns

    def scatter_user(self, rank_index: int, rows: Rows, names: Mapping[int, str]) -> None:
        """Take rows of `schema.USER_PHASES` of one rank.

        Phases beyond the first 32 names remain in the step row's sum.
        """
        self._grow(rank_index + 1)
        rows = rows[self._has(rows["step"])]
        for name_id, of_name in rows_by(rows, "name_id"):
            name = names.get(name_id, f"phase {name_id}")
            if name not in self._user and len(self._user) >= MAX_USER_PHASES:
                continue

            steps, values = self._user[name] = self._user.get(name) or self._ring(numbers=np.int32)
            at = self._cells(rank_index, of_name["step"])
            steps[at] = of_name["step"]
            values[at] = of_name["ns"]

    def scatter_device(self, rank_indices: Ints, rows: Rows) -> None:
        """Take rows of `schema.DEVICE_STEPS`; they arrive some steps later than the step rows."""
        if not len(rows):
            return

        self._grow(int(rank_indices.max()) + 1)
        kept = self._has(rows["step"])
        rank_indices, rows = rank_indices[kept], rows[kept]
        steps, values = self._device = self._device or self._ring(len(_DEVICE_VALUES))
        at = self._cells(rank_indices, rows["step"])
        steps[at] = rows["step"]
        for column, name in enumerate(_DEVICE_VALUES):
            values[at, column] = rows[f"{name}_ns"]

    def scatter_evaluation(self, rank_index: int, rows: Rows) -> None:
        """Take rows of `schema.EVALS` of one rank, in order; several may be before one step."""
        self._grow(rank_index + 1)
        rows = rows[self._has(rows["step"])]
        steps, values = self._evaluation = self._evaluation or self._ring()
        at = self._cells(rank_index, rows["step"])
        values[at[steps[at] != rows["step"]]] = 0
        steps[at] = rows["step"]
        np.add.at(values, at, rows["ns"])

    def end(self, rank_index: int) -> None:
        """Record that this rank has no further steps: the others are no longer aligned with it."""
        self._grow(rank_index + 1)
        self._ended[rank_index] = True

    def clear(self, rank_index: int) -> None:
        """Drop a rank's rows, as it starts again (a new attempt)."""
        self._grow(rank_index + 1)
        self._ended[rank_index], self.latest[rank_index] = False, -1
        for steps, _ in self._rings:
            steps[rank_index * self.slots : (rank_index + 1) * self.slots] = -1

    def aligned(self, last: int | None = None, skip_first: int = SET_UP_STEPS) -> AlignedSteps:
        """Return the newest steps that all live ranks have.

        Ranks that ended before others continued, or that are behind by more than half the ring, are left out. When all
        ranks have ended, the steps in common are returned, without ranks that made less than a quarter of the steps of
        another. Steps in which a rank was profiled are left out: they take longer, and the other ranks wait.

        Args:
            last: maximum number of steps (less for thousands of ranks); by default those of the last ten seconds, but
                200 at least and 1,024 at most.
            skip_first: number of first steps to leave out, as they include set-up. Fewer are left out if less than 20
                steps would remain, but never less than 3.
        """
        chosen, missing_ranks = self._candidates()
        if not len(chosen):
            return self._window(chosen, np.empty(0, np.int64), missing_ranks)

        newest, first = int(self.latest[chosen].min()), self.numbers.first
        last = self._newest(chosen, newest) if last is None else last
        last = min(last, self.slots, max(_MIN_STEPS, MAX_CELLS // len(chosen)))
        skip = min(skip_first, max(3, newest - first + 1 - _MIN_STEPS))
        steps = self._steps_until(newest, last)
        steps = self._unprofiled(steps[steps >= first + skip])
        found = self._step[self._cells(chosen[:, None], steps)] == steps
        # A rank that lost many rows must not remove the steps of all others.
        coverage = found.mean(axis=1) if len(steps) else np.ones(len(chosen))
        kept = coverage >= 0.5 * coverage.max()
        missing_ranks = (*missing_ranks, *chosen[~kept].tolist())
        window = self._window(chosen[kept], steps[found[kept].all(axis=0)], missing_ranks)
        if not self.representatives:
            return window

        ranks = window.ranks.tolist()
        above = self.representatives.above(ranks, window.steps)
        return replace(window, represents=self.representatives.represents(ranks), excess_of_represented=above)

    def held(self, rank_index: int) -> AlignedSteps:
        """Return all steps kept of one rank, in order."""
        mine = self._step[rank_index * self.slots : (rank_index + 1) * self.slots]
        latest = int(self.latest[rank_index])
        # Rows from before a restart at step 0 are above the latest step.
        steps = np.sort(mine[(mine >= 0) & (mine <= latest) & (mine > latest - self._reach)])
        return self._window(np.array([rank_index], np.int64), self._unprofiled(steps), ())

    def _unprofiled(self, steps: Ints) -> Ints:
        return steps[~np.isin(steps, list(self._profiled))] if self._profiled else steps

    def _newest(self, ranks: Ints, newest: int) -> int:
        """Return the number of steps up to the newest that show what happens now."""
        cells = _NEWEST_CELLS // len(ranks)
        least = max(_MIN_NEWEST_OF_MANY, min(_MIN_NEWEST, cells))
        steps = self._steps_until(newest, least)
        at = self._cells(int(ranks[0]), steps)
        times_ns = self._values[at[self._step[at] == steps], _POSITION["total_ns"]]
        wanted = int(_NEWEST_NS / max(float(times_ns.mean()), 1.0)) if len(times_ns) else least
        return max(least, min(wanted, _MAX_NEWEST, cells))

    @property
    def _reach(self) -> int:
        """Number of steps from the oldest one that may be kept to the newest."""
        return self.slots

    def _has(self, steps: Ints) -> NDArray[np.bool_]:
        """Return which of the steps are kept."""
        return np.asarray(steps >= 0)

    def _cells(self, ranks: Ints | int, steps: Ints) -> Ints:
        return np.asarray(ranks * self.slots + steps % self.slots)

    def _steps_until(self, newest: int, last: int) -> Ints:
        """Return the steps that may be kept up to the newest, at most `last`, in order."""
        return np.arange(max(newest - last + 1, 0), newest + 1, dtype=np.int64)

    def _candidates(self) -> tuple[Ints, tuple[int, ...]]:
        seen = self.latest >= 0
        if self.representatives:  # the steps of ranks whose rows are not sent end anywhere
            seen[self.representatives.unsent[self.representatives.unsent < len(seen)]] = False

        live, reach = seen & ~self._ended, self._reach // 2
        if live.any():
            # One that ends a moment before the others is compared until these have newer steps.
            live |= seen & (self.latest >= self.latest[live].max())
        else:
            live, reach = seen, min(reach, int(_MAX_BEHIND * self.latest.max(initial=0)))

        if not live.any():
            return np.empty(0, np.int64), ()

        near = live & (self.latest > self.latest[live].max() - max(reach, 1))
        if self.representatives and not np.isin(np.flatnonzero(near), self.representatives.silent).all():
            near[np.isin(np.arange(len(near)), self.representatives.silent)] = False

        return np.flatnonzero(near), tuple(np.flatnonzero(live & ~near).tolist())

    def _window(self, ranks: Ints, steps: Ints, missing_ranks: tuple[int, ...]) -> AlignedSteps:
        at = self._cells(ranks[:, None], steps)
        closures = self._closures[at]
        values = _by_column(self._values.take(at.ravel(), axis=0)).reshape(len(_POSITION), *at.shape)
        total, own = values[_POSITION["total_ns"]], values[_POSITION["backward_own_ns"]]
        own[own < 0] = np.nan
        times = {label: values[_POSITION[name]] for label, name in zip(PHASE_LABELS, PHASE_COLUMNS, strict=True)}
        device = self._replace_by_device(times, own, total, at, steps)
        np.minimum(own, times["backward"], out=own)
        if self._evaluation is not None and not device and len(ranks) > 1:
            stored, spent = self._evaluation
            leave_out_waiting(times, own, total, np.where(stored[at] == steps, spent[at], np.float32(0)))

        times["other"] = np.maximum(total - sum(times.values()), 0)
        user = {
            name: np.where(stored[at] == steps, spent[at], np.float32(0))
            for name, (stored, spent) in self._user.items()
        }
        if device and user:
            user = fitted_user_times(user, times["user"])

        return AlignedSteps(
            ranks=ranks,
            steps=steps,
            times=times,
            total=total,
            backward_own=own,
            user=user,
            missing_ranks=missing_ranks,
            device=device,
            elements=values[_POSITION["elements"]],
            samples=values[_POSITION["samples"]],
            closures=closures if closures.any() else np.empty((0, 0), bool),
        )

    def _replace_by_device(self, times: dict[str, Floats], own: Floats, total: Floats, at: Ints, steps: Ints) -> bool:
        if self._device is None or not at.size:
            return False

        found = self._device[0][at] == steps
        if not found.any(axis=1).all():
            return False

        values = dict(zip(_DEVICE_VALUES, np.moveaxis(self._device[1][at], -1, 0), strict=True))
        np.copyto(total, step_times_on_device(total, values["total"], found, block_begins(steps)))
        measured = {name: np.where(found, values[name], 0) for name in DEVICE_LABELS}
        device = spread_device_times(measured, total, 1, found)
        device["backward_own"] = np.where(found, values["backward_own"], -1)
        put_device_times(times, own, total, device, np.ones_like(found))
        return True

    @property
    def _rings(self) -> list[tuple[NDArray[Any], Floats]]:
        """Numbers of the steps and their values: of the rows of steps, and of what comes beside them."""
        beside = [pair for pair in (self._device, self._evaluation) if pair is not None]
        return [(self._step, self._values), *self._user.values(), *beside]

    def _ring(self, *shape: int, numbers: type[np.signedinteger[Any]] = np.int64) -> tuple[NDArray[Any], Floats]:
        """Return room for the numbers of all kept steps, and for their values of this shape."""
        cells = self._capacity * self.slots
        return np.full(cells, -1, numbers), np.zeros((cells, *shape), np.float32)

    def _grow(self, ranks: int) -> None:
        if ranks <= self._capacity:
            return

        # At least by half, so that ranks that arrive one by one do not copy everything each time.
        self._capacity = max(ranks, self._capacity * 3 // 2)
        cells = self._capacity * self.slots
        self.latest = _longer(self.latest, self._capacity, fill=-1)
        self._ended = _longer(self._ended, self._capacity)
        self.end_ns = _longer(self.end_ns, self._capacity)
        self._step = _longer(self._step, cells, fill=-1)
        self._values = _longer(self._values, cells)
        self._closures = _longer(self._closures, cells)
        self._user = {name: _longer_pair(pair, cells) for name, pair in self._user.items()}
        self._device = _longer_pair(self._device, cells) if self._device else None
        self._evaluation = _longer_pair(self._evaluation, cells) if self._evaluation else None


def _by_column(cells: Floats) -> Floats:
    """Return the columns of cells, each contiguous; copied by blocks that fit the cache: three times as fast."""
    columns = np.empty(cells.shape[::-1], cells.dtype)
    for first in range(0, len(cells), _BLOCK_CELLS):
        block = slice(first, first + _BLOCK_CELLS)
        columns[:, block] = cells[block].T

    return columns


def _longer(array: Any, length: int, *, fill: int = 0) -> Any:
    """Return a longer copy. Added zeros take no memory until they are written, so a rank costs it when it has rows."""
    longer = np.zeros((length, *array.shape[1:]), array.dtype)
    longer[: len(array)] = array
    if fill:
        longer[len(array) :] = fill

    return longer


def _longer_pair(pair: tuple[Any, Any], cells: int) -> tuple[Any, Any]:
    return _longer(pair[0], cells, fill=-1), _longer(pair[1], cells)


class SampledSteps(KeptSteps):
    """The rows of chosen steps of every rank; others only count for its latest step.

    Args:
        steps: the chosen steps, ascending; at least one.
    """

    def __init__(self, steps: Ints, ranks: int = 0) -> None:
        self._chosen = steps
        super().__init__(len(steps), ranks)

    def _has(self, steps: Ints) -> NDArray[np.bool_]:
        at = np.minimum(np.searchsorted(self._chosen, steps), self.slots - 1)
        return np.asarray(self._chosen[at] == steps)

    @property
    def _reach(self) -> int:
        return int(self.latest.max()) + 1

    def _cells(self, ranks: Ints | int, steps: Ints) -> Ints:
        return np.asarray(ranks * self.slots + np.searchsorted(self._chosen, steps))

    def _steps_until(self, newest: int, last: int) -> Ints:
        return self._chosen[self._chosen <= newest][-last:]


class SpreadSteps(SampledSteps):
    """The rows of blocks of 16 consecutive steps: at first of all steps, later of blocks with equal gaps.

    When all blocks are full, every second one is dropped, and the next ones are as far apart as those that stay.

    Args:
        slots: steps kept per rank, a multiple of 32.
    """

    def __init__(self, slots: int, ranks: int = 0) -> None:
        self._blocks, self._gap, self._first = slots // _BLOCK, _BLOCK, 0
        super().__init__(np.arange(slots, dtype=np.int64), ranks)

    @classmethod
    def of_run(cls, ranks: int) -> SpreadSteps | None:
        """Return what a run of some ranks keeps; None with too many for a history of each."""
        slots = min(_MAX_SPREAD_SLOTS, _SPREAD_CELLS // max(ranks, 1)) // (2 * _BLOCK) * 2 * _BLOCK
        return cls(slots, ranks) if slots >= _MIN_SPREAD_SLOTS else None

    def changed(self) -> AlignedSteps | None:
        """Return the aligned steps if the usual step of any rank varies among them; else None."""
        aligned = self.aligned(self.slots)
        blocks = len(aligned) // _BLOCK
        if not blocks:
            return None

        usual = np.median(aligned.total[:, : blocks * _BLOCK].reshape(-1, blocks, _BLOCK), axis=2)
        return aligned if (usual.max(axis=1) > _SMALL_CHANGE * usual.min(axis=1)).any() else None

    def _has(self, steps: Ints) -> NDArray[np.bool_]:
        if not self._first and self.numbers.first:  # it is known before the first row
            self._first = self.numbers.first
            self._chosen = self._first + self._chosen

        while len(steps) and int(steps.max()) >= self._first + self._blocks * self._gap:
            self._drop_every_second_block()

        return super()._has(steps)

    def _drop_every_second_block(self) -> None:
        self._gap *= 2
        self._chosen = self._first + (self._gap * np.arange(self._blocks)[:, None] + np.arange(_BLOCK)).ravel()
        for steps, values in self._rings:
            _keep_every_second_block(steps, self._blocks, empty=-1)
            _keep_every_second_block(values, self._blocks, empty=0)

        _keep_every_second_block(self._closures, self._blocks, empty=0)


def _keep_every_second_block(cells: NDArray[Any], count: int, *, empty: int) -> None:
    """Move every second block of each rank to the first half of its cells, and clear the other half."""
    blocks = cells.reshape(-1, count, _BLOCK, *cells.shape[1:])
    blocks[:, : count // 2] = blocks[:, ::2].copy()
    blocks[:, count // 2 :] = empty
