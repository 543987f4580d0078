"""Flow arrows at sync points: from the rank that arrives last to the ranks that waited for it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

__all__ = ["FlowArrow", "FlowArrows", "SyncArrival"]

# Arrivals kept of sync points that are not complete; beyond that, the oldest point is dropped.
_MOST_HELD = 200_000


@dataclass(frozen=True, slots=True)
class SyncArrival:
    """Arrival of a rank at a sync point, in epoch nanoseconds.

    Attributes:
        pid, tid: its process and track in the trace.
        began_ns: start of the slice that ends with its arrival.
        arrived_ns: end of its own work.
        left_ns: end of its waiting.
    """

    pid: int
    tid: int
    began_ns: int
    arrived_ns: int
    left_ns: int

    @property
    def waited_ns(self) -> int:
        """Duration of its waiting."""
        return self.left_ns - self.arrived_ns


@dataclass(frozen=True, slots=True)
class FlowArrow:
    """Arrow between slices of two ranks; both ends are inside the slices, the first not after the second."""

    source: SyncArrival
    from_ns: int
    target: SyncArrival
    to_ns: int


class FlowArrows:
    """Collects the arrivals at sync points; when all ranks have arrived, returns the arrows.

    The rank that waited least arrived last: this needs no common clock.
    """

    def __init__(self) -> None:
        self._open: OrderedDict[Hashable, dict[int, SyncArrival]] = OrderedDict()
        self._held = 0

    def add_arrival(self, point: Hashable, rank: int, arrival: SyncArrival, ranks: int) -> list[FlowArrow]:
        """Take an arrival; return the arrows of the sync point once all `ranks` ranks have arrived."""
        arrived = self._open.setdefault(point, {})
        self._held += rank not in arrived
        arrived[rank] = arrival
        if len(arrived) == ranks:
            del self._open[point]
            self._held -= ranks
            return _arrows(list(arrived.values()))

        while self._held > _MOST_HELD:
            self._held -= len(self._open.popitem(last=False)[1])

        return []


def _arrows(arrivals: list[SyncArrival]) -> list[FlowArrow]:
    last = min(arrivals, key=lambda arrival: arrival.waited_ns)
    arrows = []
    for arrival in arrivals:
        if arrival is last or arrival.waited_ns <= 0:
            continue

        to_ns = arrival.left_ns - min(1_000, (arrival.waited_ns + 1) // 2)
        from_ns = min(last.arrived_ns - 1 + last.waited_ns // 2, to_ns)
        if from_ns > last.began_ns:  # else the clocks differ by more than the wait
            arrows.append(FlowArrow(last, from_ns, arrival, to_ns))

    return arrows
