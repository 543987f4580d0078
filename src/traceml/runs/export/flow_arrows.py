"""Flow arrows at sync points: from the rank that arrives last to the ranks that waited for it."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

import numpy as np

from traceml.diagnosis.steps.aligned_steps import Ints

__all__ = ["FlowArrows", "SyncArrows"]


_MAX_HELD = 1_000_000  # arrivals of one kind whose sync points are not complete: 40 MB
_RANK, _STEP, _BEGAN, _ARRIVED, _LEFT = range(5)


@dataclass(frozen=True, slots=True)
class SyncArrows:
    """Arrows between slices of two ranks; both ends are inside the slices, the first not after the second.

    Attributes:
        source, target: ranks.
        from_ns, to_ns: epoch nanoseconds.
    """

    source: Ints
    from_ns: Ints
    target: Ints
    to_ns: Ints


@dataclass(slots=True)
class _Held:
    """Arrivals of one kind whose sync points are not complete, and the ranks with new ones since the last match."""

    ranks: int
    arrivals: list[Ints] = field(default_factory=list)
    count: int = 0
    newly: set[int] = field(default_factory=set)

    def match(self) -> SyncArrows:
        """Return the arrows of complete points, and keep the other arrivals: the newest, where there are too many."""
        complete, rest = _matched(np.concatenate(self.arrivals), self.ranks)
        rest = rest[-_MAX_HELD // 2 :] if len(rest) > _MAX_HELD else rest
        self.arrivals, self.count, self.newly = [rest], len(rest), set()
        return _arrows(complete)


class FlowArrows:
    """Collects the arrivals at sync points; when all ranks have arrived, returns the arrows.

    The rank that waited least arrived last: this needs no common clock.
    """

    def __init__(self) -> None:
        self._held: dict[Hashable, _Held] = {}

    def add_arrivals(self, kind: Hashable, rank: int, arrivals: Ints, ranks: int) -> SyncArrows | None:
        """Take arrivals of a rank; return arrows now and then, when all ranks have new arrivals.

        Args:
            kind: kind of sync point, of which each step has one.
            arrivals: per row the step, and in epoch nanoseconds the start of the slice that ends with the arrival, the
                end of its own work, and the end of its waiting.
        """
        held = self._held.setdefault(kind, _Held(ranks))
        held.arrivals.append(np.column_stack([np.full(len(arrivals), rank), arrivals]))
        held.count += len(arrivals)
        held.newly.add(rank)
        return held.match() if len(held.newly) == ranks or held.count > _MAX_HELD else None

    def rest(self) -> Iterator[SyncArrows]:
        """Yield the remaining arrows, at the end."""
        for held in self._held.values():
            yield held.match()


def _matched(arrivals: Ints, ranks: int) -> tuple[Ints, Ints]:
    """Return the arrivals at complete sync points, point x rank x column, and the others, oldest step first."""
    arrivals = arrivals[np.lexsort((arrivals[:, _RANK], arrivals[:, _STEP]))]
    is_last = np.ones(len(arrivals), bool)  # of a rank that repeated a step
    is_last[:-1] = (np.diff(arrivals[:, : _STEP + 1], axis=0) != 0).any(axis=1)
    arrivals = arrivals[is_last]
    _, point, counts = np.unique(arrivals[:, _STEP], return_inverse=True, return_counts=True)
    is_complete = counts[point] == ranks
    return arrivals[is_complete].reshape(-1, ranks, arrivals.shape[1]), arrivals[~is_complete]


def _arrows(points: Ints) -> SyncArrows:
    waited = points[:, :, _LEFT] - points[:, :, _ARRIVED]
    number = np.arange(len(points))
    last = waited.argmin(axis=1)
    source = points[number, last]
    to_ns = points[:, :, _LEFT] - np.minimum(1_000, (waited + 1) // 2)
    from_ns = np.minimum((source[:, _ARRIVED] - 1 + waited[number, last] // 2)[:, None], to_ns)
    drawn = (waited > 0) & (from_ns > source[:, _BEGAN, None])  # else the clocks differ by more than the wait
    drawn[number, last] = False
    sources = np.broadcast_to(source[:, _RANK, None], drawn.shape)
    return SyncArrows(sources[drawn], from_ns[drawn], points[:, :, _RANK][drawn], to_ns[drawn])
