"""The end of a run's last step, which no later step marks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from traceml.database.schema import PHASE_COLUMNS, STEPS, Phase

if TYPE_CHECKING:
    from traceml.database.flight.row_rings import Ring

__all__ = ["is_overdue", "usual_comm", "usual_end", "usual_saving"]

_EARLIER_STEPS = 32
_FACTOR = 2.0
"""Untimed code, or waiting in collectives, is cut off if it takes this many times as long as the longest before."""
_TOTAL = STEPS.names.index("total_ns")
_COMM = STEPS.names.index(PHASE_COLUMNS[Phase.COMM])
_CHECKPOINT = STEPS.names.index(PHASE_COLUMNS[Phase.CHECKPOINT])
_PHASES = tuple(STEPS.names.index(name) for name in PHASE_COLUMNS)


def usual_end(ring: Ring, now_ns: int, total_ns: int, timed_ns: int) -> int:
    """Return when the last step ended, monotonic: it has no more code outside the phases than those before it.

    A step ends where the next one begins. What a script does after its loop would belong to the last step.

    Args:
        ring: the rows of the steps before.
        now_ns: the end of training, monotonic.
        total_ns: time from the step's begin until then.
        timed_ns: time in its phases.
    """
    others: list[int] = [row[_TOTAL] - sum(row[at] for at in _PHASES) for row in _earlier(ring)]
    other_ns = total_ns - timed_ns
    return now_ns - other_ns + _usual(other_ns, others)


def usual_comm(ring: Ring, comm_ns: int) -> int:
    """Return the time of the last step in collectives: a script may wait in a barrier after its loop, too.

    Args:
        ring: the rows of the steps before.
        comm_ns: time from the step's begin until the end of training.
    """
    return _usual(comm_ns, [row[_COMM] for row in _earlier(ring)])


def usual_saving(ring: Ring, saving_ns: int) -> int:
    """Return the time of the last step in saving: none if no step before has saved, but the script after its loop.

    Args:
        ring: the rows of the steps before.
        saving_ns: time from the step's begin until the end of training.
    """
    has_saved = not saving_ns or not ring.appended or any(row[_CHECKPOINT] for row in _earlier(ring, ring.capacity))
    return saving_ns if has_saved else 0


def _usual(spent_ns: int, earlier: list[int]) -> int:
    """Return the time spent; the median of the earlier steps if it is far longer than in each of them."""
    is_usual = not earlier or spent_ns <= _FACTOR * max(earlier)
    return spent_ns if is_usual else sorted(earlier)[len(earlier) // 2]


def is_overdue(ring: Ring, total_ns: int) -> bool:
    """Return whether a step takes far longer than each of those before it.

    Args:
        ring: the rows of the steps before.
        total_ns: time since the step's begin.
    """
    return total_ns > _FACTOR * max((row[_TOTAL] for row in _earlier(ring)), default=total_ns)


def _earlier(ring: Ring, count: int = _EARLIER_STEPS) -> Iterator[tuple[int, ...]]:
    return STEPS.struct.iter_unpack(ring.read_from(max(ring.appended - count, 0), count).data)
