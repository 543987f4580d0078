"""The phase that is open now, by the flight file's open slots."""

from __future__ import annotations

from collections.abc import Sequence

from traceml.database.schema import LINE_OTHER, LINE_OUTSIDE, LINE_STARTUP, Phase, Slot

__all__ = ["open_phase"]

_PHASES = len(Phase)
_STEP_START, _EXIT_START = int(Slot.STEP_START), int(Slot.EXIT_START)


def open_phase(slots: Sequence[int] | memoryview[int], has_steps: bool) -> tuple[int, int]:
    """Return the innermost open phase, as in `schema.LINE_PHASES`, and the time at which it, or its step, was opened.

    Args:
        has_steps: whether a step has ended in this process.
    """
    began = 0 if slots[_EXIT_START] else slots[_STEP_START]  # an exit is in no step, though it may close one
    opened = list(slots[:_PHASES])  # read once, as another process may write them
    latest = max(opened)
    if latest > 0:
        return opened.index(latest), latest

    return LINE_OTHER if began else LINE_OUTSIDE if has_steps else LINE_STARTUP, began
