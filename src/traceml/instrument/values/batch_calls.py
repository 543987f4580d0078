"""Whether the calls before a backward pass are each of the whole batch.

A model may be called with parts of what it trains on: with chunks of rays, with one position or one state after
another, with boundary and inner points of a field. The size of one such call is not that of the batch.
"""

from __future__ import annotations

from collections.abc import Callable

from traceml.instrument.step_clock import StepClock

__all__ = ["BatchCalls", "Size"]

Size = tuple[int, int]
"""Samples and elements of the input of a call."""
_PASSES = 4


class BatchCalls:
    """Watches the calls before the first backward passes.

    Args:
        on_calls: called once, with the sizes of the pass that has fewest.
    """

    def __init__(self, clock: StepClock, on_calls: Callable[[list[Size]], None]) -> None:
        self._clock, self._on_calls = clock, on_calls
        self._passes: list[list[Size]] = []
        self._rows = self._backwards = -1
        self.is_over = False
        """Whether enough passes were watched."""

    def note(self, size: Size) -> None:
        """Take the size of a call with gradients."""
        if self._begins_pass():
            if len(self._passes) == _PASSES:
                self.is_over = True
                self._on_calls(min(self._passes, key=lambda sizes: (len(set(sizes)), len(sizes))))
                return

            self._passes.append([])

        self._passes[-1].append(size)

    def _begins_pass(self) -> bool:
        """Whether a backward pass has ended since the call before; a step may begin after its first call is noted."""
        clock, rows, backwards = self._clock, self._rows, self._backwards
        self._rows, self._backwards = clock.rows, clock.micro_batches + clock.backwards
        is_next_step = backwards > 0 and self._rows == rows + 1 and not self._backwards and not clock.batches
        return not is_next_step and (self._rows, self._backwards) != (rows, backwards)
