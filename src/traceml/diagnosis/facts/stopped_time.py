"""Time in which ranks did not run, from their `stopped` rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

__all__ = ["Stop", "stop_of", "without_stops"]

_PARTS = {
    "steps": ("steps", "between_epochs"),
    "startup": ("startup",),
    "outside": ("evaluation", "idle", "between_epochs"),
    # The clock of the steps does not advance while the machine is suspended.
    "suspended": ("idle", "between_epochs", "startup"),
}


class Stop(NamedTuple):
    """One stop of a rank.

    Attributes:
        part: where the rank was: in `steps`, in `startup`, or `outside` of both; `suspended` with its whole machine.
        first_step, last_step: open step at the last turn of the recorder before it, and after it; -1 without one.
        began_s: epoch seconds of its begin; None where it is not known.
    """

    seconds: float
    part: str
    first_step: int = -1
    last_step: int = -1
    began_s: float | None = None


def stop_of(row: Mapping[str, Any]) -> Stop | None:
    """Return the stop of an `info` row; None if the row is not a valid one."""
    seconds, part = row.get("seconds"), row.get("part")
    if not isinstance(seconds, int | float) or part not in _PARTS:
        return None

    last, began = row.get("step"), row.get("began_s")
    last = last if isinstance(last, int) else -1
    first = row.get("from_step")
    return Stop(
        float(seconds), part, first if isinstance(first, int) else last, last,
        began if isinstance(began, int | float) else None,
    )  # fmt: skip


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
