"""Marks that users put into their code: `traceml.phase`, `trace_step`, `trace_data`.

Each is a no-op under 1 us while nothing is traced. They run in the rank; notes on a stored run are `traceml runs note`.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar, overload

from traceml.errors import ArgumentTypeError, UsageError
from traceml.recorder.current_recorder import state

__all__ = ["phase", "set_step", "trace", "trace_data", "trace_step"]

_log = logging.getLogger("traceml")

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


_LAST_STEP = 2**62  # leaves room for the steps that follow, in 8 bytes
_NO_OP = nullcontext()  # one object serves all calls


def phase(name: str) -> AbstractContextManager[Any]:
    """Return a context manager that times a part of the step as a phase of its own.

    Examples:
        >>> with traceml.phase("augment"):
        ...     batch = augment(batch)

    Code that `torch.compile` compiles has no phases: as `torch.profiler.record_function`, this does nothing in it.

    Args:
        name: name of the phase; use few different names.
    """
    running = state.instrumentation
    return _NO_OP if running is None or running.is_compiling() else running.phase(name)


def trace_step(model: Any = None, optimizer: Any = None) -> AbstractContextManager[Any]:
    """Return a context manager that bounds one training step.

    The first use turns off the inference of steps; the time between two blocks belongs to the later one.

    Examples:
        >>> for batch in batches:
        ...     with traceml.trace_step():
        ...         train(batch)

    Args:
        model: the trained module, timed from its first call on.
        optimizer: its optimizer.
    """
    running = state.instrumentation
    return _NO_OP if running is None else running.trace_step(model, optimizer)


def set_step(step: int) -> None:
    """Set the number of the next training step; later steps continue from it.

    A training that resumes from a checkpoint calls it before its loop, on every rank, with the number of steps trained
    before. A number below that of the last step is ignored, with a warning.

    Examples:
        >>> traceml.set_step(1000)  # a checkpoint of 1,000 steps was loaded

    Args:
        step: number of the next step, from 0.

    Raises:
        UsageError: it is not a whole number from 0, or too large to be stored.
    """
    try:
        number = -1 if isinstance(step, bool) else operator.index(step)  # checkpoints hold tensors and numpy's integers
    except TypeError:
        number = -1

    if number < 0:
        raise UsageError(f"set_step({step!r}): give the number of steps trained before, a whole number from 0")

    if number > _LAST_STEP:
        raise UsageError(f"set_step({number}): the largest number of a step is {_LAST_STEP:,}")

    running = state.instrumentation
    if running is not None and running.set_step(number) is None and number:
        _log.warning("set_step(%d) is ignored: later steps are recorded already", number)


def trace_data(loader: Iterable[T]) -> Iterable[T]:
    """Return the iterable with its waiting times recorded; for data that comes from no torch DataLoader.

    Examples:
        >>> for batch in traceml.trace_data(batches):
        ...     train(batch)

    Args:
        loader: any iterable of batches.
    """
    running = state.instrumentation
    return loader if running is None else running.trace_data(loader)


@overload
def trace(function: F, /) -> F: ...
@overload
def trace(name: str | None = None, /) -> Callable[[F], F]: ...
def trace(function: Any = None, /) -> Any:
    """Make a function a phase of its own: `@traceml.trace`, or `@traceml.trace("name")`.

    Examples:
        >>> @traceml.trace("augment")
        ... def flip(batch):
        ...     return batch[::-1]

    Args:
        function: the function, or the phase's name; by default the function's name.

    Raises:
        ArgumentTypeError: it is neither.
    """
    if function is None or isinstance(function, str):
        return lambda decorated: _traced(decorated, function)

    return _traced(function, None)


def _traced(function: Any, name: str | None) -> Any:
    if isinstance(function, staticmethod | classmethod):  # the decorators stand in the other order
        return type(function)(_traced(function.__func__, name))

    if not callable(function):
        raise ArgumentTypeError(f"trace({function!r:.100}): give a function or the name of a phase")

    from traceml.instrument.user_phases import traced

    named = function.func if isinstance(function, partial) else function
    called = name or str(getattr(named, "__name__", type(named).__name__))  # an object with `__call__` has no name
    return traced(function, lambda: phase(called))
