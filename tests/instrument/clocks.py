"""Another clock than the monotonic one, for hooks in Python and in C."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest

from traceml.instrument import backward, divided_step, forward, loader, optimizer, phase_timer, step_clock
from traceml.instrument.native.extension import use_time

__all__ = ["use_clock"]

_CLOCKED = (phase_timer, divided_step, backward, forward, loader, optimizer, step_clock)


def use_clock(patch: pytest.MonkeyPatch, now_ns: Callable[[], int], *more: ModuleType) -> None:
    """Have the modules that each step runs, and more of them, take the time from `now_ns`."""
    use_time(now_ns)
    for module in (*_CLOCKED, *more):
        patch.setattr(module, "monotonic_ns", now_ns)
