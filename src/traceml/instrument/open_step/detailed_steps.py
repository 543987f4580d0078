"""Steps that are measured in detail: own backward in a job with several ranks, and device time."""

from __future__ import annotations

__all__ = ["DetailedSteps"]

_FIRST = 16
# A step that is measured in detail takes the host some 0.1 ms longer: for 0.4 % of the time every step is measured from
# this length on, and one in 2, 4, 8 or 16 of shorter ones.
_ALL_FROM_NS, _MIN_MASK = 24_000_000, 15
_STEPS_PER_COST = 100  # or from this many times on what it takes: a step of 65 model calls took 4.4 ms longer


class DetailedSteps:
    """Numbers of the steps that are measured in detail.

    It depends on the step's number, so all ranks measure the same steps, but for a rank whose steps seem to be longer:
    that one measures these and others.

    Attributes:
        all_to: the last of the first steps, which are all measured.
        mean_ns: moving mean of step times.
        cost_ns: what measuring the device time of a step takes the host.
    """

    def __init__(self) -> None:
        self.all_to = -1
        self.mean_ns = self.cost_ns = 0

    def __contains__(self, step: int) -> bool:
        mask, mean_ns = 0, self.mean_ns
        all_from_ns = max(_ALL_FROM_NS, self.cost_ns * _STEPS_PER_COST)
        while mask < _MIN_MASK and mean_ns <= all_from_ns:
            mask, mean_ns = 2 * mask + 1, 2 * mean_ns

        return step <= self.all_to or not step & mask

    def begin_at(self, step: int) -> None:
        """Measure all of the next steps: how long they take is not known yet, and a short run has no others."""
        self.all_to = step + _FIRST

    def add_total(self, total_ns: int) -> None:
        """Take the time of a step, which decides how many of the next ones are measured."""
        self.mean_ns += (total_ns - self.mean_ns) >> 4

    def distance(self, step: int) -> int:
        """Return how many steps after this one the next is that is measured, or at whose end such a step begins."""
        ahead = range(_MIN_MASK + 1)
        return next((n for n in ahead if step + n in self or step + n + 1 in self), 0)
