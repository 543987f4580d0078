"""Progress of an export, for whoever shows it."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Progress", "no_progress"]

Progress = Callable[[int, int], object]
"""Called from time to time with the cursor in the store and its end; the end may be passed while the run is written."""


def no_progress(_: int, __: int, /) -> None:
    """Show nothing."""
