"""How durations, shares, ranks and parts of a step are said in a summary."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["factor", "lasting", "of_ranks", "part_words", "percent"]

_PARTS = {
    "input_wait": "waiting for data",
    "h2d": "copying to the device",
    "comm": "communication",
    "other": "code outside the known phases",
    "user": "code in its own phases",
    "waiting for other ranks": "waiting for other ranks",
}
_KNOWN = ("forward", "backward", "optimizer", "checkpoint")


def lasting(nanoseconds: float) -> str:
    """Return a duration with three digits: `20.4 ms`, `850 us`, `1.25 s`."""
    for unit, size in (("s", 1e9), ("ms", 1e6), ("us", 1e3)):
        if abs(nanoseconds) >= size:
            value = nanoseconds / size
            digits = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 0.995 * 10 else 2
            return f"{value:.{digits}f} {unit}"

    return f"{nanoseconds:.0f} ns"


def percent(share: float) -> str:
    """Return a share as whole percent."""
    return f"{100 * share:.0f} %"


def factor(value: float) -> str:
    """Return a speed-up: `4.7x`, `1.13x`."""
    return f"{value:.1f}x" if value >= 1.995 else f"{value:.2f}x"


def of_ranks(ranks: Sequence[int]) -> str:
    """Return `Rank 1`, `Ranks 1 and 3`, `Ranks 1, 3, 5 and 9 more`; `All ranks` for none."""
    if not ranks:
        return "All ranks"

    if len(ranks) == 1:
        return f"Rank {ranks[0]}"

    if len(ranks) > 4:
        return f"Ranks {', '.join(str(rank) for rank in ranks[:3])} and {len(ranks) - 3} more"

    return f"Ranks {', '.join(str(rank) for rank in ranks[:-1])} and {ranks[-1]}"


def part_words(part: str) -> str:
    """Return how a part of the step is called in a sentence; a user's phase in quotes."""
    return _PARTS.get(part) or (part if part in _KNOWN else f"phase '{part}'")
