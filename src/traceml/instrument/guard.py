"""Guard for rare actions of the instrumentation: an error is logged and counted, and costs the result only."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Concatenate, ParamSpec, Protocol, TypeVar

from traceml.fail_open import fail_open

if TYPE_CHECKING:
    from traceml.instrument.step_clock import StepClock

__all__ = ["Guard", "guarded"]

_log = logging.getLogger("traceml")
P = ParamSpec("P")


class Guard:
    """Runs actions; after an error it continues without the action.

    Args:
        clock: counts the errors.
    """

    def __init__(self, clock: StepClock) -> None:
        self._clock = clock

    def __call__(self, action: Callable[P, object], /, *args: P.args, **kwargs: P.kwargs) -> None:
        """Run an action."""
        with fail_open(_log, "instrument", "a part of the instrumentation failed and is skipped"):
            action(*args, **kwargs)
            return

        self._clock.errors += 1

    def wrap(self, action: Callable[P, object]) -> Callable[P, None]:
        """Return a function that runs an action."""
        return functools.partial(self, action)


class Guarding(Protocol):
    """Owner of a guard."""

    guard: Guard


Owner = TypeVar("Owner", bound=Guarding)


def guarded(method: Callable[Concatenate[Owner, P], object]) -> Callable[Concatenate[Owner, P], None]:
    """Run a method by the guard of its object."""

    @functools.wraps(method)
    def _guarded(self: Owner, /, *args: P.args, **kwargs: P.kwargs) -> None:
        self.guard(method, self, *args, **kwargs)

    return _guarded
