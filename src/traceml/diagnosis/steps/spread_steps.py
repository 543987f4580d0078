"""Blocks of steps that stay spread over a run while it is in progress."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from traceml.diagnosis.steps.aligned_steps import AlignedSteps, Ints
from traceml.diagnosis.steps.kept_steps import SampledSteps
from traceml.diagnosis.steps.step_split import Floats

__all__ = ["SpreadSteps"]

_BLOCK = 16
_MAX_SLOTS, _MIN_SLOTS, _MAX_CELLS = 1024, 256, 65_536
_SMALL_CHANGE = 1.1
"""A usual step that varies by less than this factor is as long as ever: a slowdown costs a tenth of the steps' time."""


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
        slots = min(_MAX_SLOTS, _MAX_CELLS // max(ranks, 1)) // (2 * _BLOCK) * 2 * _BLOCK
        return cls(slots, ranks) if slots >= _MIN_SLOTS else None

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
        pairs: list[tuple[NDArray[Any], Floats]] = [(self._step, self._values), *self._user.values()]
        pairs += [pair for pair in (self._device, self._evaluation) if pair is not None]
        for steps, values in pairs:
            _keep_every_second_block(steps, self._blocks, empty=-1)
            _keep_every_second_block(values, self._blocks, empty=0)


def _keep_every_second_block(cells: NDArray[Any], count: int, *, empty: int) -> None:
    """Move every second block of each rank to the first half of its cells, and clear the other half."""
    blocks = cells.reshape(-1, count, _BLOCK, *cells.shape[1:])
    blocks[:, : count // 2] = blocks[:, ::2].copy()
    blocks[:, count // 2 :] = empty
