"""Own work between sync points: the work of each rank, and its waiting for the others.

In data-parallel training all ranks leave backward together, so their wall times are equal; their own work between two
such points is not. Rules compare the sums of own work over a window, part by part. What an optimizer takes longer than
that of other ranks comes after the row's sync point and delays the next one, so it is counted there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.sampled_lines import SampledLine
from traceml.diagnosis.facts.sampled_shares import iterator_share
from traceml.diagnosis.facts.topology import RankGroup
from traceml.diagnosis.steps.aligned_steps import AlignedSteps
from traceml.diagnosis.steps.step_split import PHASES, Floats

__all__ = [
    "COMPUTE", "ITERATOR_SHARE", "LINE_SHARE", "UNNAMED", "UNNAMED_CODE", "LateRanks", "OwnWork", "Rows", "by_pace",
    "excess_over_others", "have_half", "is_grouped", "iterator_wait", "median_over_ranks", "own_work_of",
    "usual_excess",
]  # fmt: skip

COMPUTE = ("forward", "backward", "optimizer")
"""The parts that are computation."""
UNNAMED_CODE = ("other", "user")
"""Parts that are the script's own code, in no phase that it has named."""
UNNAMED = (*COMPUTE, "h2d", "comm", *UNNAMED_CODE)
"""Parts whose long steps need an explanation; the others (input, checkpoint, a named phase) have their own findings."""
LINE_SHARE = 0.6
"""The line of a phase is named if the long steps have this share of the phase."""
ITERATOR_SHARE = 0.5
"""Code outside the phases is waiting for an iterator if this share of its samples is."""
FASTER = 1.2
"""Ranks do not wait for those whose steps take this many times as long."""

# In a group these are split or shifted; user phases are parts by name.
_SPLIT = {"backward", "optimizer", "comm", "user"}
_MIN_MEASURED = 5
_PACE_PARTS = 8
_EDGE = 1  # steps at each end of a window, which may have what precedes and follows a training
_MANY_RANKS = 40
_LITTLE_INPUT = 0.01  # of the step
_MIN_SURPLUS_NS = 0.5e6
_FAR_LONGER = 2.0  # collectives of measured steps that take so much longer than usual are those of some steps

Rows = NDArray[np.intp]
"""Indices of ranks in the window."""


class OwnWork(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """Own work of each rank, by part of the step, between the sync points of a window."""

    ranks: NDArray[np.int64]  # the ranks, one per row
    # Phase or user phase -> own work in nanoseconds, rank x step. In a group `backward` is own work only, and
    # collectives are in no part.
    parts: Mapping[str, Floats]
    own: Floats  # the parts' sum
    step: Floats  # wall time of each step, the mean over ranks
    wait: Floats  # waiting that is left where no rank is late, in nanoseconds, of the steps that measured it
    grouped: bool  # whether the ranks wait for each other
    backward_known: bool  # whether own backward is separated from waiting
    measured: NDArray[np.bool_]  # steps in which it was measured; in the others `backward` is the rank's mean
    device: bool  # whether these are device times
    begins: NDArray[np.bool_]  # steps whose predecessor is not in the window
    sync_intervals: NDArray[np.intp]  # first step of each interval at whose end the ranks meet; mostly each step is one
    represents: Mapping[int, tuple[int, ...]] = {}  # see `AlignedSteps`
    excess_of_represented: Floats = np.empty((0, 0), np.float32)  # see `AlignedSteps`
    # what each step took beyond `step` before several trainings were made as if of one; empty without any
    leveled_ns: Floats = np.empty(0, np.float32)

    def as_measured(self, columns: NDArray[np.intp], usual_ns: float) -> tuple[Floats, float]:
        """Return the times of some steps, and what is usual for them, as the run had them."""
        if not len(self.leveled_ns):
            return self.step[columns], usual_ns

        leveled_ns = self.leveled_ns[columns]
        return self.step[columns] + leveled_ns, max(usual_ns + float(leveled_ns.mean()), 0.0)

    def in_measured(self, part: str, values: Floats) -> Floats:
        """Return the values of the steps in which a part was measured; in others backward is a mean without its noise.

        Args:
            values: of one rank or several, the steps last.
        """
        is_in_all = part != "backward" or self.measured.size != values.shape[-1]
        return values if is_in_all else values[..., self.measured]

    def named(self, has: NDArray[np.bool_]) -> tuple[int, ...]:
        """Return the ranks that a finding names, given which rows it is about: none if it is about all."""
        return () if has.all() else tuple(self.ranks_of(np.flatnonzero(has)))

    def ranks_of(self, rows: Rows) -> list[int]:
        """Return the ranks of some rows, and those that they represent."""
        ranks = self.ranks[rows].tolist()
        return sorted(each for rank in ranks for each in self.represents.get(rank, (rank,)))

    @cached_property
    def all_ranks(self) -> list[int]:
        """All ranks of the window, and those that they represent."""
        return self.ranks_of(np.arange(len(self.ranks)))

    def longest(self, own: Floats) -> Floats:
        """Return the own work of the rank that takes longest, by step."""
        return np.asarray(self._with_above(own).max(axis=0))

    @cached_property
    def longest_as_is(self) -> Floats:
        """The same as `longest_intervals` of the work as it is, which each estimate of a gain starts from."""
        return self.longest_intervals(self.own)

    def longest_intervals(self, own: Floats) -> Floats:
        """Return the own work of the rank that takes longest, by sync interval."""
        return np.asarray(self.by_sync_interval(self._with_above(own)).max(axis=0))

    def by_sync_interval(self, values: Floats) -> Floats:
        """Return the sums of values of steps, by sync interval."""
        if len(self.sync_intervals) == values.shape[-1]:  # each step is one
            return values

        return np.asarray(np.add.reduceat(values, self.sync_intervals, axis=-1))

    def _with_above(self, own: Floats) -> Floats:
        return own + self.excess_of_represented if len(self.excess_of_represented) else own

    @property
    def step_ns(self) -> float:
        """Mean wall time of a step."""
        return max(float(self.step.mean()), 1.0)

    @property
    def compute_ns(self) -> float:
        """Mean own computation of a step, over ranks."""
        return float(sum(self.parts[part].mean() for part in COMPUTE if part in self.parts))

    def of_steps(self, columns: NDArray[np.bool_]) -> OwnWork:
        """Return the work of some steps, each of which ends with a sync point."""
        optional = {"excess_of_represented": self.excess_of_represented, "leveled_ns": self.leveled_ns}
        return replace(
            self,
            parts={part: values[:, columns] for part, values in self.parts.items()},
            own=self.own[:, columns],
            step=self.step[columns],
            measured=self.measured[columns],
            begins=self.begins[columns],
            sync_intervals=np.arange(int(columns.sum())),
            **{name: values[..., columns] for name, values in optional.items() if len(values)},
        )

    def changed(self, parts: Mapping[str, Floats], step: Floats) -> OwnWork:
        """Return the window with some parts' own work and the steps' wall time replaced."""
        merged = {**self.parts, **parts}
        own = sum(merged.values(), np.zeros_like(self.own))
        return replace(self, parts=merged, own=own, step=step)


class LateRanks(msgspec.Struct, frozen=True, kw_only=True):
    """Ranks that are late for the same reason."""

    rows: Rows  # indices of them in the window
    others: Rows  # those of the others
    ranks: tuple[int, ...]  # these ranks, and those that they represent
    other_ranks: list[int]
    part: str
    excess_ns: float
    dominance: float
    everywhere: bool  # whether they are slower in everything that they compute
    only_passes: bool = False  # of these, whether in forward and backward alone
    by_part_ns: Mapping[str, float]
    group: RankGroup | None = None  # the host, switch or part of the mesh that they are; None for single ranks


def excess_over_others(values: Floats, late: Rows, others: Rows) -> Floats:
    """Return by how much the work of late ranks is longer than that of the others, the means, by step.

    Not the median: with skewed noise, the median of several ranks is below the mean of each of them.
    """
    return np.asarray(values[late].mean(axis=0) - values[others].mean(axis=0))


def usual_excess(excess: Floats) -> float:
    """Return the usual excess of steps: half of all of it is in steps with so much or more.

    Neither the steps without any nor a few very long ones decide it.
    """
    positive = np.sort(np.maximum(excess, 0))
    sums = np.cumsum(positive, dtype=np.float64)
    return float(positive[np.searchsorted(sums, sums[-1] / 2)])


def iterator_wait(work: OwnWork, lines: Sequence[SampledLine], step_ns: float) -> float:
    """Return the share of `other` that is waiting for an iterator, by samples; 0 where a DataLoader is waited for.

    Args:
        step_ns: mean time of the whole steps, also where the work of some is left out.
    """
    measured = work.parts.get("input_wait")
    is_measured = measured is not None and measured.mean() > _LITTLE_INPUT * step_ns
    return 0.0 if is_measured else iterator_share(lines)


def own_work_of(window: AlignedSteps, facts: JobFacts) -> OwnWork:
    """Return the window's own work, with or without a process group."""
    grouped = is_grouped(window, facts)
    parts = _user_parts(window)
    parts.update({name: window.times[name] for name in PHASES if name not in _SPLIT})
    parts["optimizer"] = _behind_sync(window) if grouped else window.times["optimizer"]
    measured = window.measured
    known = not grouped or int(measured.sum()) >= _MIN_MEASURED
    if not grouped:
        parts["backward"], parts["comm"] = window.times["backward"], window.times["comm"]
    elif known:
        parts["backward"] = window.own_backward
        if window.device:
            parts["other"] = _without_waiting(window)

    parts = {name: values for name, values in parts.items() if values.any()}
    own = sum(parts.values(), np.zeros_like(window.total))
    step = window.total.mean(axis=0)
    work = OwnWork(
        ranks=window.ranks,
        parts=parts,
        own=own,
        step=step,
        wait=np.empty(0, np.float32),
        grouped=grouped,
        backward_known=known,
        measured=measured,
        device=window.device,
        begins=window.begins,
        sync_intervals=_sync_intervals(window, facts),
        represents=window.represents,
        excess_of_represented=window.excess_of_represented,
    )
    return replace(work, wait=_least(_usual_wait(window), work)) if grouped and known else work


def have_half(values: NDArray[np.floating[Any]]) -> NDArray[np.bool_]:
    """Return which ranks have half of what the rank with most has, or more: a finding is about these."""
    return np.asarray(values >= 0.5 * float(np.max(values, initial=0)))


def median_over_ranks(values: Floats) -> Floats:
    """Return the median over ranks of each step, none of which is NaN."""
    if len(values) <= 2:
        return np.asarray(values.mean(axis=0))

    by_step, half = np.array(values.T, order="C"), len(values) // 2  # of a thousand ranks twice as fast as np.median
    by_step.partition(half, axis=1)
    upper = by_step[:, half]
    return upper if len(values) % 2 else (by_step[:, :half].max(axis=1) + upper) * by_step.dtype.type(0.5)


def is_grouped(window: AlignedSteps, facts: JobFacts) -> bool:
    """Return whether the ranks wait for each other."""
    if not facts.batches.group.is_grouped(max(facts.world_size, len(window.ranks))):
        return False

    # Ranks that reported no group are in one if they did what only a group does.
    collectives = window.times["comm"].any() and not facts.rpc
    return bool(not np.isnan(window.backward_own).all() or collectives)


def by_pace(window: AlignedSteps, facts: JobFacts) -> tuple[AlignedSteps, AlignedSteps | None]:
    """Return the ranks that take as long for their steps as the slowest, and the others, if there are any.

    Process groups may be apart from each other, as pairs of ranks that share a model each, and no pair waits for
    another. The rows do not tell the groups, but a rank that waits for another one takes as long for its steps as that
    one. A rank that is faster is so in all steps together, and in most parts of the window: ranks may meet in every
    n-th step only, and one may pause outside of its steps.
    """
    times = window.total[:, _EDGE:-_EDGE]
    # What some ranks evaluate is in no step of theirs, and may be in those of the ranks that wait for them.
    evaluate_alone = facts.time is not None and facts.time.evaluators
    if evaluate_alone or times.shape[1] < _PACE_PARTS or not is_grouped(window, facts):
        return window, None

    parts = np.array([part.mean(axis=1) for part in np.array_split(times, _PACE_PARTS, axis=1)])
    paces = times.mean(axis=1), np.median(parts, axis=0)
    slow = np.any([FASTER * pace >= pace.max() for pace in paces], axis=0)
    return (window, None) if slow.all() else (window.of_ranks(slow), window.of_ranks(~slow))


def _user_parts(window: AlignedSteps) -> dict[str, Floats]:
    parts = {name if name not in window.times else f"phase {name}": values for name, values in window.user.items()}
    rest = np.maximum(window.times["user"] - sum(window.user.values(), np.float32(0)), 0)
    # Rows of user phases are in a separate table and may be missing for the newest steps.
    return {**parts, "user": rest} if rest.sum() > 0.01 * max(window.times["user"].sum(), rest.size) else parts


def _without_waiting(window: AlignedSteps) -> Floats:
    """Return code outside the phases, without the waiting for late ranks in steps without device times.

    Such a step has the mean device times of its rank; a host that waits for its device longer does so in `other`. What
    a rank has there beyond its usual time is waiting, as far as another rank began the step later: after code of its
    own in the step before, or a wait for data.
    """
    other, unknown = window.times["other"], np.isnan(window.backward_own)
    usual = np.where(unknown, 0, other).sum(axis=1, keepdims=True) / np.maximum(
        (~unknown).sum(axis=1, keepdims=True), 1
    )
    surplus = np.where(unknown & (other > 2 * usual + _MIN_SURPLUS_NS), other - usual, 0).astype(np.float32)
    begun, code = window.times["input_wait"], other + window.times["checkpoint"] + window.times["user"]
    waiting = np.zeros_like(other)
    for step in np.flatnonzero(surplus.any(axis=0)).tolist():
        late = begun[:, step]
        if step and not window.begins[step]:
            late = late + code[:, step - 1] - waiting[:, step - 1]

        waiting[:, step] = np.minimum(surplus[:, step], late.max() - late)

    return np.asarray(other - waiting)


def _behind_sync(window: AlignedSteps) -> Floats:
    """Return the optimizer's work: what all ranks have in its step, and in the next one what some have beyond that.

    The others wait for it there. After a step that is not known, it is all in its own.
    """
    optimizer = window.times["optimizer"]
    of_all = optimizer.min(axis=0)
    return np.where(window.begins, optimizer, of_all + np.roll(optimizer - of_all, 1, axis=1))


def _sync_intervals(window: AlignedSteps, facts: JobFacts) -> NDArray[np.intp]:
    """Return the first step of each interval at whose end the ranks meet.

    Where no model averages gradients by itself, the ranks meet in the collectives that the script calls, which may be
    in every n-th step only, as in local SGD.
    """
    meets = (window.times["comm"] > 0).all(axis=0)
    if facts.batches.averages_gradients or not meets.any():
        return np.arange(len(window))

    return np.flatnonzero(window.begins | np.roll(meets, 1))


def _usual_wait(window: AlignedSteps) -> Floats:
    """Return the waiting in the steps that measured it, less what collectives take longer there than in others.

    Steps are measured at multiples of a power of two, as are those at whose end a script may average weights.
    """
    comm, measured = window.times["comm"], window.measured
    there, usual = np.median(comm[:, measured], axis=1), np.median(comm, axis=1)
    more = np.where(there >= _FAR_LONGER * usual, there - usual, 0.0)
    return np.asarray(window.wait[:, measured] - more[:, None])


def _least(wait: Floats, work: OwnWork) -> Floats:
    """Return the waiting that is left where no rank is late, by step: that of the rank which works longest.

    Of a few ranks it is the shortest one. Of thousands one always waits least by chance, and of merged hosts the rank
    that works longest may be none of the window's: there it is what the rank that works longest leaves of the median
    over ranks of work and waiting, and at most the 5th percentile, which is more stable than the shortest one.
    """
    if len(wait) < _MANY_RANKS and not work.represents:
        return np.asarray(wait.min(axis=0))

    by_step, low = np.array(wait.T, order="C"), len(wait) // 20  # of a thousand ranks six times as fast as np.quantile
    by_step.partition(low, axis=1)
    left = median_over_ranks(work.own[:, work.measured] + wait) - work.longest(work.own)[work.measured]
    return np.asarray(np.clip(left, 0, by_step[:, low]))
