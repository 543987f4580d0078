"""Waiting for something that another thread or process does, where there is no event to wait for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

__all__ = ["eventually"]

T = TypeVar("T")


def eventually(condition: Callable[[], T], what: str = "the condition", *, timeout_s: float = 60) -> T:
    """Poll until a condition holds; return its value. The time is far above what a loaded machine needs."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s for {what}"
        time.sleep(0.005)

    return value
