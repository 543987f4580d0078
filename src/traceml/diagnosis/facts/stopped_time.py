"""Time in which ranks did not run, from their `stopped` rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

__all__ = ["Stop", "stop_of", "without_stops"]

_PARTS = {
    "steps": ("steps", "between_epochs"),
    "startup": ("startup",),
    "outside": ("evaluation", "idle", "between_epochs"),
}


class Stop(NamedTuple):
    """One stop of a rank: its seconds, and where the rank was: in `steps`, in `startup`, or `outside` of both."""

    seconds: float
    part: str


def stop_of(row: Mapping[str, Any]) -> Stop | None:
    """Return the stop of an `info` row; None if the row is not a valid one."""
    seconds, part = row.get("seconds"), row.get("part")
    return Stop(float(seconds), part) if isinstance(seconds, int | float) and part in _PARTS else None


def without_stops(parts: Mapping[str, float], stops: Iterable[Stop]) -> dict[str, float]:
    """Move stopped time out of the parts of a rank's wall time, in seconds, to the part `stopped`."""
    found = {**parts, "stopped": parts.get("stopped", 0.0)}
    for stop in stops:
        left = stop.seconds
        for part in _PARTS[stop.part]:
            moved = min(left, max(found.get(part, 0.0), 0.0))
            found[part] = found.get(part, 0.0) - moved
            found["stopped"] += moved
            left -= moved

    return found
