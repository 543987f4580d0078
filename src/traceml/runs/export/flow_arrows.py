"""Flow arrows where ranks wait for each other: from the rank that came last to those that it released."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

__all__ = ["FlowArrow", "FlowArrows", "SyncArrival"]

# Ranks may be this many meetings apart, all ranks together, before an unfinished one is given up.
_MOST_HELD = 200_000


@dataclass(frozen=True, slots=True)
class SyncArrival:
    """A rank at a sync point: epoch nanoseconds.

    Attributes:
        tid: its track.
        began_ns: when the slice began that ended with its arrival.
        arrived_ns: when its own work was done.
        left_ns: when it went on.
    """

    pid: int
    tid: int
    began_ns: int
    arrived_ns: int
    left_ns: int

    @property
    def waited_ns(self) -> int:
        """How long it waited."""
        return self.left_ns - self.arrived_ns


@dataclass(frozen=True, slots=True)
class FlowArrow:
    """From one rank's slice to another's; both ends lie inside the slices, the first not after the second."""

    source: SyncArrival
    from_ns: int
    target: SyncArrival
    to_ns: int


class FlowArrows:
    """Collects ranks at their sync points; when all are there, says who released whom.

    Who waited least came last: that needs no common clock.
    """

    def __init__(self) -> None:
        self._open: OrderedDict[Hashable, dict[int, SyncArrival]] = OrderedDict()
        self._held = 0

    def meet(self, point: Hashable, rank: int, meeting: SyncArrival, ranks: int) -> list[FlowArrow]:
        """Take a rank's arrival at a sync point; return the arrows once the last of `ranks` ranks is known."""
        there = self._open.setdefault(point, {})
        self._held += rank not in there
        there[rank] = meeting
        if len(there) == ranks:
            del self._open[point]
            self._held -= ranks
            return _arrows(list(there.values()))

        while self._held > _MOST_HELD:
            self._held -= len(self._open.popitem(last=False)[1])

        return []


def _arrows(meetings: list[SyncArrival]) -> list[FlowArrow]:
    last = min(meetings, key=lambda meeting: meeting.waited_ns)
    arrows = []
    for meeting in meetings:
        if meeting is last or meeting.waited_ns <= 0:
            continue

        to_ns = meeting.left_ns - min(1_000, (meeting.waited_ns + 1) // 2)
        from_ns = min(last.arrived_ns - 1 + last.waited_ns // 2, to_ns)
        if from_ns > last.began_ns:  # else the clocks are further apart than the wait
            arrows.append(FlowArrow(last, from_ns, meeting, to_ns))

    return arrows
