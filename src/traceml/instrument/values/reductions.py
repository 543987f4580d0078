"""Backward passes of a step before its first step call, and how many of them average gradients over the ranks.

With gradient accumulation one reduction per step is enough: DistributedDataParallel leaves the others out under
`no_sync()`. Its last forward decides, and leaves that in an attribute, which is read when a backward pass begins, in
the steps whose own backward is measured.
"""

from __future__ import annotations

import weakref
from typing import Any

__all__ = ["ReductionCounter"]

_MIN_STEPS = 4
_CHANGE = 0.5


class ReductionCounter:
    """Counts backward passes and reductions of a job with one DistributedDataParallel model.

    With several, as in adversarial training, each needs a reduction in a step: nothing is counted then.
    """

    def __init__(self) -> None:
        self._wrappers: weakref.WeakSet[Any] = weakref.WeakSet()
        self._step = -1
        self._steps = self._backwards = self._reductions = 0
        self._reported: tuple[float, float] | None = None

    def watch(self, module: Any) -> None:
        """Count for the wrappers that are, or are in, a timed model."""
        found = [each for each in module.modules() if type(each).__name__ == "DistributedDataParallel"]
        self._wrappers.update(each for each in found if hasattr(each, "require_forward_param_sync"))

    def count(self, step: int) -> None:
        """Count a backward pass that begins in a step."""
        if len(self._wrappers) != 1:
            self._steps = self._backwards = self._reductions = 0
            return

        (wrapper,) = self._wrappers
        self._steps += step != self._step
        self._step = step
        self._backwards += 1
        has_run = getattr(wrapper, "_lazy_init_ran", True)  # a script may call its `module` instead
        self._reductions += bool(has_run and wrapper.require_forward_param_sync)

    def facts(self) -> dict[str, Any] | None:
        """Return the means per step; None before they are known, and while they are those that were returned."""
        if self._steps < _MIN_STEPS:
            return None

        backwards, reductions = (round(count / self._steps, 1) for count in (self._backwards, self._reductions))
        if (
            self._reported is not None
            and max(abs(backwards - self._reported[0]), abs(reductions - self._reported[1])) < _CHANGE
        ):
            return None

        self._reported = backwards, reductions
        return {"backwards_per_step": backwards, "reductions_per_step": reductions}
