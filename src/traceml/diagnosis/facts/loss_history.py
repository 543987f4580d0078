"""Losses of all ranks: since when they are not finite, and on which rank first."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["LossHistory"]


@dataclass(slots=True)
class _RankLosses:
    """The newest losses of a rank: where they stopped being finite, None while they are, and the last finite one."""

    since: int | None = None
    word: str = ""
    last_finite: float | None = None


class LossHistory:
    """Losses of all ranks."""

    def __init__(self) -> None:
        self._ranks: dict[int, _RankLosses] = {}

    def add(self, rank: int, rows: NDArray[np.void]) -> None:
        """Take rows of `schema.LOSSES`, in order."""
        if not len(rows):
            return

        known, losses = self._ranks.setdefault(rank, _RankLosses()), rows["loss"]
        finite = np.flatnonzero(np.isfinite(losses))
        first = 0
        if len(finite):
            first = int(finite[-1]) + 1
            known.since, known.last_finite = None, float(losses[finite[-1]])

        if first < len(rows) and known.since is None:
            known.since, known.word = int(rows["step"][first]), "nan" if np.isnan(losses[first]) else "inf"

    def first(self) -> tuple[int, tuple[int, ...], str, float | None] | None:
        """Return the first step whose loss is not finite, its ranks, the loss and the last finite one.

        None where the newest losses of all ranks are finite.
        """
        broken = {rank: each for rank, each in self._ranks.items() if each.since is not None}
        if not broken:
            return None

        step = min(each.since or 0 for each in broken.values())
        ranks = tuple(sorted(rank for rank, each in broken.items() if each.since == step))
        return step, ranks, broken[ranks[0]].word, broken[ranks[0]].last_finite
