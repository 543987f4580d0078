"""Merging of the ranks of a host: each second, the rows of a few chosen ranks, which represent all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

import msgspec
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from traceml.database.row_arrays import join_rows
from traceml.database.schema import DEVICE_STEPS, STEPS
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.steps.aligned_steps import AlignedSteps
from traceml.diagnosis.steps.kept_steps import KeptSteps, Rows
from traceml.diagnosis.steps.own_work import OwnWork, own_work_of
from traceml.diagnosis.steps.representatives import ExcessWork, HostChoice, packed_ms
from traceml.diagnosis.steps.step_split import Floats

__all__ = ["STEPS_COMPARED", "HostMerger", "HostUpdate"]

STEPS_COMPARED = 32
"""Newest steps by which the ranks of a host are compared, and that are sent of a rank that is chosen."""
_SLOTS = 128
_NO_ROWS = np.empty(0, STEPS.dtype)
MIN_DIFFERENCE = 0.02
"""A rank differs if the mean of its own work, or of a part, is this share of a step away from the host's median."""
MIN_ERRORS = 2.5
"""And if it is this many standard errors away. Both are below the limits from which rules blame a rank."""
FAR_LONGER = 6.0
"""A step of a rank is far longer than on the host's median rank from so many times its usual variation on."""


class HostUpdate(msgspec.Struct, frozen=True, eq=False):
    """Message of a host about the steps since its last update."""

    choice: HostChoice
    rows: Mapping[int, bytes]  # rank -> its new rows of `steps`; of a rank that was not sent before, the newest ones
    above: ExcessWork  # own work of the longest of the ordinary ranks beyond that of the typical one, in the new steps


class HostMerger:
    """Takes the step rows of a host's ranks, and makes the host's updates.

    Args:
        sent_rows: number of rows of each rank that were sent before; it is kept up to date.
    """

    def __init__(self, host: str, world_size: int, sent_rows: Counter[int] | None = None) -> None:
        self._host = host
        self._facts = JobFacts(world_size=world_size)
        self._index: dict[int, int] = {}
        self._held: dict[int, Rows] = {}
        self._new: dict[int, list[Rows]] = {}
        self._new_device: dict[int, list[Rows]] = {}
        self._ended: set[int] = set()
        self._sent: frozenset[int] = frozenset()
        self._sent_rows = Counter[int]() if sent_rows is None else sent_rows
        self._typical: int | None = None
        self._last_step = -1
        self._steps = KeptSteps(_SLOTS)

    def add(self, rank: int, data: bytes) -> None:
        """Take new rows of `steps` of a rank, in order."""
        self._index.setdefault(rank, len(self._index))
        self._new.setdefault(rank, []).append(np.frombuffer(data, STEPS.dtype))

    def add_device(self, rank: int, data: bytes) -> None:
        """Take new rows of `device_steps` of a rank."""
        self._index.setdefault(rank, len(self._index))
        self._new_device.setdefault(rank, []).append(np.frombuffer(data, DEVICE_STEPS.dtype))

    def end(self, rank: int) -> None:
        """Record that a rank has ended."""
        self._ended.add(rank)
        self._steps.end(self._index.setdefault(rank, len(self._index)))

    def join(self, rank: int) -> None:
        """Record that another process has begun as this rank: its steps are counted from the start."""
        self._ended.discard(rank)
        self._sent -= {rank}
        self._held.pop(rank, None)
        self._steps.clear(self._index.setdefault(rank, len(self._index)))

    def flush(self, asked: Collection[int] = ()) -> HostUpdate | None:
        """Return the update about the rows since the last one; None if no rank has a step."""
        new = {rank: join_rows(parts) for rank, parts in self._new.items()}
        new_device = {rank: join_rows(parts) for rank, parts in self._new_device.items()}
        self._new.clear()
        self._new_device.clear()
        self._take(new)
        if new_device:
            self._steps.scatter_device(self._indices(new_device), join_rows(new_device.values()))

        window = self._steps.aligned(last=STEPS_COMPARED)
        if not len(window.ranks):
            return None

        work, choice = self._chosen(window)
        far = set(self._held).difference(choice.ordinary, choice.outliers, self._ended)
        sent = frozenset({choice.typical, *choice.outliers, *far, *(rank for rank in asked if rank in self._held)})
        begun = {rank: self._held[rank][-STEPS_COMPARED:] for rank in sent - self._sent}
        rows = {rank: bytes(begun.get(rank, new.get(rank, _NO_ROWS)).tobytes()) for rank in sorted(sent)}
        above = self._above(window, work, choice)
        self._sent_rows.update({rank: len(data) // STEPS.row_bytes for rank, data in rows.items()})
        self._sent, self._typical = sent, choice.typical
        ended = tuple(sorted(self._ended))
        told = HostChoice(
            host=self._host,
            typical=choice.typical,
            ordinary=choice.ordinary,
            sent=tuple(rows),
            ended=ended,
            ended_at=tuple(int(self._steps.latest[self._index[rank]]) for rank in ended),
        )
        return HostUpdate(told, rows, above)

    def _take(self, new: dict[int, Rows]) -> None:
        for rank, rows in new.items():
            held = self._held.get(rank)
            self._held[rank] = (rows if held is None else join_rows([held, rows]))[-_SLOTS:]

        if new:
            self._steps.scatter(self._indices(new), join_rows(new.values()))

    def _indices(self, new: Mapping[int, Rows]) -> NDArray[np.int64]:
        return np.repeat([self._index[rank] for rank in new], [len(rows) for rows in new.values()])

    def _chosen(self, window: AlignedSteps) -> tuple[OwnWork, RankChoice]:
        """Return the own work of the host's ranks and the choice, in which ranks have their numbers in the job."""
        rank_of = np.array(list(self._index), np.int64)
        work = replace(own_work_of(window, self._facts), ranks=rank_of[window.ranks])
        return work, choose_ranks(work, self._kept())

    def _kept(self) -> int | None:
        """Return the rank that stays typical: at the beginning and at the end the one of which most rows are sent."""
        if self._typical is not None and self._ended < self._index.keys():
            return self._typical

        return max(self._sent_rows, key=self._sent_rows.__getitem__, default=self._typical)

    def _above(self, window: AlignedSteps, work: OwnWork, choice: RankChoice) -> ExcessWork:
        """Return the work of the longest rank beyond the typical one, from the first new step on."""
        if not len(window) or len(choice.ordinary) < 2:
            return ExcessWork()

        own = work.own
        ordinary = np.isin(work.ranks, choice.ordinary)
        above = own[ordinary].max(axis=0) - own[work.ranks == choice.typical][0]
        after = -1 if choice.typical != self._typical else self._last_step
        fresh = window.steps > after
        self._last_step = int(window.steps[-1])
        if not fresh.any():
            return ExcessWork()

        first = int(window.steps[fresh][0])
        values = np.full(int(window.steps[-1]) - first + 1, np.nan, np.float32)
        values[window.steps[fresh] - first] = above[fresh]
        return ExcessWork(first, packed_ms(values))


class RankChoice(msgspec.Struct, frozen=True):
    """The ranks of a host, divided."""

    typical: int  # the rank that represents the ordinary ones
    ordinary: tuple[int, ...]  # ranks that do not differ from it, itself among them
    outliers: tuple[int, ...]


def choose_ranks(work: OwnWork, kept: int | None = None) -> RankChoice:
    """Return the typical rank of a host and its outliers.

    Args:
        kept: the typical rank so far; it stays typical while it is an ordinary one.
    """
    if not work.own.size:  # no step that all of them have made: nobody differs yet
        ranks = work.ranks.tolist()
        return RankChoice(_typical(ranks, kept), tuple(sorted(ranks)), ())

    apart = _differs(work)
    means = work.own.mean(axis=1)
    by_work = np.argsort(means, kind="stable")
    ordinary = [row for row in by_work.tolist() if not apart[row]] or [int(by_work[(len(means) - 1) // 2])]
    ranks = work.ranks[ordinary].tolist()
    outliers = sorted(set(work.ranks.tolist()).difference(ranks))
    return RankChoice(_typical(ranks, kept), tuple(sorted(ranks)), tuple(outliers))


def _typical(ranks: list[int], kept: int | None) -> int:
    return kept if kept is not None and kept in ranks else ranks[(len(ranks) - 1) // 2]


def _differs(work: OwnWork) -> NDArray[np.bool_]:
    """Return which ranks differ in their own work, in a part of it, or in single steps that are far longer."""
    values = np.stack([work.own, *work.parts.values()])
    means = values.mean(axis=2)
    medians = _lower_median(means, axis=1)
    errors = np.median(values.std(axis=2), axis=1, keepdims=True) / values.shape[2] ** 0.5
    least = np.maximum(MIN_DIFFERENCE * work.step_ns, MIN_ERRORS * errors)
    longer = _far_longer(work.own)
    turns = (longer > 0) & (longer.sum() > MIN_DIFFERENCE * work.step_ns)
    return np.asarray((np.abs(means - medians) > least).any(axis=0) | turns)


def _far_longer(own: Floats) -> Floats:
    """Return the mean excess of each rank in steps in which it takes far longer than the others.

    Ranks that take turns are alike on average, and the others wait for each of them.
    """
    low, quarter = np.quantile(own, (0.05, 0.25), axis=1)  # short steps: also of ranks that are late in most
    excess = own - _lower_median(own, axis=0)
    return np.asarray(np.where(excess > FAR_LONGER * np.median(quarter - low), excess, 0).sum(axis=1) / STEPS_COMPARED)


def _lower_median(values: Floats, axis: int) -> Floats:
    """Return the lower median, a real rank's: where half of the ranks are late, the others are the ordinary ones."""
    ordered = np.sort(values, axis=axis)
    return np.asarray(ordered.take([(values.shape[axis] - 1) // 2], axis=axis))
