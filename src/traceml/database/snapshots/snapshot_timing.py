"""Time without progress after which a rank takes its first snapshot. Light, as each rank imports it.

Process: rank and aggregator.
"""

from __future__ import annotations

__all__ = ["first_snapshot_s"]

_SHORTEST_S = 5.0
_LONGER = 1.5


def first_snapshot_s(longest_quiet_s: float, hang_timeout_s: float) -> float:
    """Return after how many seconds without progress the first snapshot is taken.

    Args:
        longest_quiet_s: longest pause so far that ended with progress: it is usual.
        hang_timeout_s: time without progress that is a hang; there are snapshots well before it.
    """
    return min(max(_SHORTEST_S, _LONGER * longest_quiet_s), hang_timeout_s / 2)
