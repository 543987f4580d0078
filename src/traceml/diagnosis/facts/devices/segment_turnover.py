"""Blocks of device memory that a rank gives back to the driver and requests again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

__all__ = ["SegmentTurnover", "TurnoverHistory"]

_NEWEST = 3


class SegmentTurnover(NamedTuple):
    """A stretch of steps: the blocks that torch requested from the driver in it, and gave back to it."""

    device: int
    first_step: int
    last_step: int
    requested: int
    given_back: int

    @property
    def per_step(self) -> float:
        """Blocks that were given back and requested again, per step."""
        return min(self.requested, self.given_back) / max(self.last_step - self.first_step, 1)


class TurnoverHistory:
    """The newest stretches of each rank and device."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int], list[SegmentTurnover]] = {}

    def add(self, rank: int, row: Mapping[str, Any]) -> None:
        """Take a row `segments` of the `info` log; one that is damaged is left out."""
        values = [row.get(name) for name in ("device", "from_step", "step", "requested", "given_back")]
        if all(isinstance(value, int) for value in values):
            found = SegmentTurnover(*values)  # type: ignore[arg-type]
            self._kept.setdefault((rank, found.device), []).append(found)
            del self._kept[rank, found.device][:-_NEWEST]

    def forget(self, rank: int) -> None:
        """Forget a rank: another process of it has joined."""
        for key in [key for key in self._kept if key[0] == rank]:
            del self._kept[key]

    def steady(self, latest: int, least: float) -> dict[tuple[int, int], SegmentTurnover]:
        """Return the newest stretch of ranks and devices that turn over at least `least` blocks per step all the time.

        Args:
            latest: newest step; a stretch that ended long before it is over.
            least: blocks per step, in each of the newest stretches.
        """
        return {
            key: kept[-1]
            for key, kept in self._kept.items()
            if len(kept) > 1 and all(each.per_step >= least for each in kept) and _is_recent(kept, latest)
        }


def _is_recent(kept: list[SegmentTurnover], latest: int) -> bool:
    return latest - kept[-1].last_step <= max(2 * (kept[-1].last_step - kept[0].first_step), 1)
