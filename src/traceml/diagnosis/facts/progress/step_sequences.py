"""Collectives that each rank has called by the end of each step: since when ranks are apart."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import msgspec
import numpy as np
from numpy.typing import NDArray

from traceml.database.schema import unpack_bits
from traceml.formatting import count_text, plural, ranks_text

__all__ = ["DivergedRanks", "StepSequences"]

_FIRST_RANKS = 16
_LISTED = 3  # different numbers of collectives that a sentence lists
_MAX_SLOTS, _MIN_SLOTS, _CELLS = 1024, 64, 262_144


class DivergedRanks(msgspec.Struct, frozen=True):
    """Ranks whose numbers of collectives differ, in all steps from one on."""

    agreed: int  # last step at whose end all ranks had called as many
    since: int  # first step at whose end they had not; the next one, unless the steps between are not known
    collectives: Mapping[int, int]  # rank -> its number at the end of that step
    backwards: Mapping[int, int]  # rank -> its backward passes in that step

    @property
    def text(self) -> str:
        """A sentence: since which step ranks are apart, and what they had called at its end."""
        by_number: dict[int, list[int]] = defaultdict(list)
        for rank, number in self.collectives.items():
            by_number[number].append(rank)

        (least, fewest), *more = sorted(by_number.items())
        called = [f"{ranks_text(fewest)} had called {plural(least, 'collective')}"]
        called += [f"{ranks_text(ranks)} {count_text(number)}" for number, ranks in more]
        without = [rank for rank, count in self.backwards.items() if count == 0]
        passes = ""
        if without and len(without) < len(self.backwards):
            passes = f", in which {ranks_text(without)} ran no backward pass"

        when = f"since step {count_text(self.since)}" + (" at the latest" if self.since > self.agreed + 1 else "")
        listed = ", ".join(called[:_LISTED]) + (", …" if len(called) > _LISTED else "")
        return f"The ranks have been out of step {when}{passes}: at its end {listed}."


class StepSequences:
    """Compares the ranks step by step, as their rows arrive.

    Ranks that never agree, as the stages of a pipeline, are not apart.
    """

    def __init__(self) -> None:
        self.diverged: DivergedRanks | None = None  # ranks that are apart now; None if they agree, or nothing is known
        self._ranks = 0
        self._checked = self._agreed = -1
        self._cells: NDArray[np.int64] = np.empty((3, 0, 0), np.int64)  # step, collectives, backward passes
        self._latest: NDArray[np.int64] = np.empty(0, np.int64)

    def forget(self) -> None:
        """Start over, because a rank has."""
        self.diverged = None
        self._checked = self._agreed = -1
        self._cells[0] = -1
        self._latest[:] = -1

    def add(self, ranks: NDArray[np.int64], rows: NDArray[np.void]) -> None:
        """Take rows of `schema.STEPS`, at least one; those of one rank in order."""
        self._grow(int(ranks.max()) + 1)
        steps, bits = rows["step"], unpack_bits(rows["bits"])
        self._cells[:, ranks, steps % self._cells.shape[2]] = steps, bits.sequence, bits.micro_batches
        self._latest[ranks] = steps
        common = int(self._latest[: self._ranks].min())
        first = max(self._checked + 1, common - self._cells.shape[2] + 1)
        if common >= first:
            self._check(np.arange(first, common + 1))
            self._checked = common

    @property
    def micro_batches(self) -> float:
        """Batches of a step, in the middle of the newest steps; at least 1."""
        steps, _, batches = self._cells[:, : self._ranks]
        known = batches[steps >= 0]
        return max(float(np.median(known)), 1.0) if len(known) else 1.0

    def _check(self, steps: NDArray[np.int64]) -> None:
        """Compare the ranks in steps that all of them have ended; a sample of steps may lack some."""
        slots = steps % self._cells.shape[2]
        known, numbers, backwards = (self._cells[part, : self._ranks, slots].T for part in range(3))
        whole = (known == steps).all(axis=0) & (numbers > 0).all(axis=0)
        steps, numbers, backwards = steps[whole], numbers[:, whole], backwards[:, whole]
        if not len(steps):
            return

        agreeing = np.flatnonzero(numbers.min(axis=0) == numbers.max(axis=0)).tolist()
        at = agreeing[-1] + 1 if agreeing else 0
        if agreeing:
            self._agreed, self.diverged = int(steps[at - 1]), None

        if at < len(steps) and self.diverged is None and self._agreed >= 0:
            self.diverged = DivergedRanks(
                self._agreed,
                int(steps[at]),
                dict(enumerate(numbers[:, at].tolist())),
                dict(enumerate(backwards[:, at].tolist())),
            )

    def _grow(self, ranks: int) -> None:
        """Make room for more ranks and start over with them; with many ranks, the steps so far are lost."""
        if ranks <= self._ranks:
            return

        self._ranks = ranks
        self._checked, self._agreed, self.diverged = -1, -1, None
        if ranks > len(self._latest):
            capacity = max(ranks, 2 * len(self._latest), _FIRST_RANKS)
            slots = min(max(_CELLS // capacity, _MIN_SLOTS), _MAX_SLOTS)
            latest = np.full(capacity, -1, np.int64)
            latest[: len(self._latest)] = self._latest
            self._latest, self._cells = latest, np.full((3, capacity, slots), -1, np.int64)
