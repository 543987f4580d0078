"""Whether the calls before a backward pass are each of the whole batch.

A model may be called with parts of what it trains on: with chunks of rays, with one position or one state after
another, with boundary and inner points of a field. The size of one such call is not that of the batch. Nor is the sum
over backward passes that differ, as those of an inner loop and of the outer one, which see other samples.
"""

from __future__ import annotations

from collections.abc import Callable

from traceml.instrument.step_clock import StepClock

__all__ = ["BatchCalls", "OnCalls", "Size"]

Size = tuple[int, int]
"""Samples and elements of the input of a call."""
OnCalls = Callable[[list[Size], bool, int], None]
"""Takes the sizes of the pass that has fewest, whether all passes of a step on the same batches have as many samples,
and how many samples several passes on the same batches have together, 0 if that differs."""
_PASSES = 4
_MAX_PASSES = 64


class BatchCalls:
    """Watches the calls before the first backward passes.

    Args:
        on_calls: called once.
    """

    def __init__(self, clock: StepClock, on_calls: OnCalls) -> None:
        self._clock, self._on_calls = clock, on_calls
        self._passes: list[list[Size]] = []
        self._samples: dict[tuple[int, int], list[int]] = {}  # of first calls, by step and its batches so far
        self._rows = self._backwards = -1
        self.is_over = False
        """Whether enough passes were watched."""

    def record(self, size: Size) -> None:
        """Take the size of a call with gradients."""
        if self._begins_pass():
            if self._has_enough():
                self.is_over = True
                even = all(len(set(samples)) == 1 for samples in self._samples.values())
                fewest = min(self._passes, key=lambda sizes: (len(set(sizes)), len(sizes)))
                self._on_calls(fewest, even, self._together())
                return

            self._passes.append([])
            self._samples.setdefault(self._data(), []).append(size[0])

        self._passes[-1].append(size)

    def _together(self) -> int:
        """Return the samples of all passes on the same batches; the first and the last may not be seen whole."""
        whole = list(self._samples.values())[1:-1]
        sums = {sum(samples) for samples in whole}
        return sums.pop() if len(sums) == 1 and all(len(samples) > 1 for samples in whole) else 0

    def _data(self) -> tuple[int, int]:
        """Return the step, and how many batches it has had; after its optimizer step a forward begins the next."""
        clock = self._clock
        has_ended = bool(clock.step_call) and not clock.batches
        return clock.rows + has_ended, clock.batches + clock.ended.micro_batches * (not has_ended)

    def _has_enough(self) -> bool:
        """Whether some passes were watched, and all of one step."""
        steps = len({row for row, _ in self._samples})
        return len(self._passes) >= _PASSES and (steps > 2 or len(self._passes) >= _MAX_PASSES)

    def _begins_pass(self) -> bool:
        """Whether a backward pass has ended since the call before; a step may begin after its first call is noted."""
        clock, rows, backwards = self._clock, self._rows, self._backwards
        self._rows, self._backwards = clock.rows, clock.ended.micro_batches + clock.backwards
        is_next_step = backwards > 0 and self._rows == rows + 1 and not self._backwards and not clock.batches
        return not is_next_step and (self._rows, self._backwards) != (rows, backwards)
