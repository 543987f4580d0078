"""Waiting for something that another thread or process does, where there is no event to wait for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

__all__ = ["eventually"]

T = TypeVar("T")
_SHORTEST_S, _LONGEST_S = 0.005, 0.25


def eventually(condition: Callable[[], T], what: str = "the condition", *, timeout_s: float = 120) -> T:
    """Poll until a condition holds; return its value. The time is far above what a loaded machine needs.

    A condition that takes long, by starting a process or reading a store, is checked less often: what it waits for
    needs the processor, too.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        begin = time.monotonic()
        if value := condition():
            return value

        end = time.monotonic()
        assert end < deadline, f"waited {timeout_s:.0f} s for {what}"
        time.sleep(min(max(4 * (end - begin), _SHORTEST_S), _LONGEST_S))
