"""Losses that are not finite, and steps whose update was skipped because a gradient was not."""

from __future__ import annotations

from itertools import pairwise

import msgspec
import numpy as np
from numpy.typing import NDArray

from traceml.database.schema import StepFlag, unpack_bits

__all__ = ["LossHistory", "LossSpan", "SkippedSteps"]

MIN_READS = 2
"""Losses that are not finite, one after the other. A single one says nothing of the next 15 or 63 steps, not read."""


class LossSpan(msgspec.Struct, frozen=True):
    """Steps whose losses were not finite, one after the other, before losses that were finite again."""

    first: int
    until: int  # step of the next finite loss
    word: str  # nan or inf


class _RankLosses(msgspec.Struct):
    """The newest losses of a rank: where they stopped being finite, None while they are, and the last finite one."""

    since: int | None = None
    word: str = ""
    reads: int = 0  # losses since then
    last_finite: float | None = None
    spans: list[LossSpan] = []  # the longest that ended

    @property
    def is_broken(self) -> bool:
        return self.reads >= MIN_READS

    def recover(self, step: int) -> None:
        """Note a finite loss."""
        if self.since is not None and self.is_broken:
            spans = [*self.spans, LossSpan(self.since, step, self.word)]
            self.spans = sorted(spans, key=lambda span: span.first - span.until)[:_MAX_SPANS]

        self.since, self.reads = None, 0


_MAX_SPANS = 64


class LossHistory:
    """Losses of all ranks."""

    def __init__(self) -> None:
        self._ranks: dict[int, _RankLosses] = {}

    def add(self, rank: int, rows: NDArray[np.void]) -> None:
        """Take rows of `schema.LOSSES`, in order."""
        if not len(rows):
            return

        known, losses, steps = self._ranks.setdefault(rank, _RankLosses()), rows["loss"], rows["step"].tolist()
        finite = np.isfinite(losses)
        begins = np.flatnonzero(np.diff(finite, prepend=~finite[:1])).tolist()
        for first, end in pairwise([*begins, len(rows)]):
            if finite[first]:
                known.recover(steps[first])
                continue

            if known.since is None:
                known.since, known.word = steps[first], "nan" if np.isnan(losses[first]) else "inf"

            known.reads += end - first

        if finite.any():
            known.last_finite = float(losses[finite][-1])

    def first(self) -> tuple[int, tuple[int, ...], str, float | None] | None:
        """Return the first step whose loss is not finite, its ranks, the loss and the last finite one.

        None if the newest losses of all ranks are finite, or only the very last is not.
        """
        broken = {rank: each for rank, each in self._ranks.items() if each.is_broken}
        if not broken:
            return None

        step = min(each.since or 0 for each in broken.values())
        ranks = tuple(sorted(rank for rank, each in broken.items() if each.since == step))
        return step, ranks, broken[ranks[0]].word, broken[ranks[0]].last_finite

    @property
    def ended_spans(self) -> list[LossSpan]:
        """Longest spans of the rank that has most steps in them, in order."""
        by_rank = (known.spans for known in self._ranks.values())
        most = max(by_rank, key=lambda spans: sum(span.until - span.first for span in spans), default=[])
        return sorted(most, key=lambda span: span.first)


_MAX_KEPT = 65_536


class SkippedSteps:
    """Skipped steps of one rank, as all ranks of a data-parallel job skip alike: the lowest that has sent rows."""

    def __init__(self) -> None:
        self.rank: int | None = None
        self.rows = 0  # step rows of the rank; of a long run a sample that is spread over it
        self.first = 0  # its first step that was taken
        self.latest = -1  # its last step
        self.steps: NDArray[np.int64] = np.empty(0, np.int64)  # the skipped steps, the newest of very many

    @property
    def taken_share(self) -> float:
        """Share of the steps whose rows were taken; less than 1 where rows are a sample."""
        return min(self.rows / max(self.latest + 1 - self.first, 1), 1.0)

    def share_since(self, step: int, end: int | None = None) -> float:
        """Return the share of the steps from one on, up to `end` or the last, that were skipped."""
        end = self.latest + 1 if end is None else end
        seen = self.taken_share * (end - step)
        return min(float(((self.steps >= step) & (self.steps < end)).sum()) / seen, 1.0) if seen > 0 else 0.0

    def add(self, ranks: NDArray[np.int64], rows: NDArray[np.void]) -> None:
        """Take rows of `schema.STEPS`."""
        lowest = int(ranks.min())
        if self.rank is None or lowest < self.rank:
            self.rank, self.rows, self.steps = lowest, 0, self.steps[:0]

        mine = rows[ranks == self.rank]
        if not len(mine):
            return

        self.first = int(mine["step"][0]) if self.rows == 0 else self.first
        self.rows += len(mine)
        self.latest = int(mine["step"][-1])
        skipped = mine["step"][unpack_bits(mine["bits"]).flags & StepFlag.SKIPPED > 0]
        if len(skipped):
            self.steps = np.concatenate([self.steps, skipped])[-_MAX_KEPT:]
