"""Iterators that give batches and are no DataLoader: generators that are suspended while the training runs, and queues.

Python reports no call of a generator, so their time is `other`; samples of the stack distinguish it from other code. A
queue from which the training loop takes its batches is filled by another thread or process.

A generator may also give the losses of a step, as Pyro's does for each sample of its ELBO. It has ended when the
optimizer steps, where one that gives batches is suspended.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from itertools import pairwise
from types import CodeType, FrameType, FunctionType, GeneratorType
from typing import Any, NamedTuple
from weakref import WeakSet

from traceml.inspection.thread_frames import stack_frames

__all__ = ["BatchSource", "batch_source_of"]

_QUEUES = (
    ("queue", "Queue", "get"),
    ("multiprocessing.queues", "Queue", "get"),
    ("multiprocessing.queues", "SimpleQueue", "get"),
    ("multiprocessing.pool", "IMapIterator", "next"),  # results of a pool's processes
)


class BatchSource(NamedTuple):
    """Code by which the training loop gets its batches."""

    # Code of the generators that were suspended in the first backward pass, and of the queues' `get`.
    generators: frozenset[CodeType]
    callers: frozenset[CodeType]  # code that had called that pass; the training loop is among it
    # These generators, until the optimizer steps for the first time.
    suspended: WeakSet[GeneratorType[Any, Any, Any]] | None = None

    def as_optimizer_steps(self) -> BatchSource:
        """Return it without the generators that have ended; those that end later have given the last batch."""
        if self.suspended is None:
            return self

        going_on = frozenset(each.gi_code for each in self.suspended if each.gi_frame is not None)
        return self._replace(generators=going_on | _queue_codes(), suspended=None)

    def contains(self, stack: Iterable[FrameType]) -> bool:
        """Return whether a stack, the innermost frame first, runs for an iterator that the training loop has asked."""
        for inner, caller in pairwise(stack):
            code = inner.f_code
            if caller.f_code in self.callers and (code in self.generators or code.co_name == "__next__"):
                return True

        return False


def batch_source_of(generators: Iterable[GeneratorType[Any, Any, Any]]) -> BatchSource:
    """Return the code that feeds the training, in its first backward pass.

    Args:
        generators: all that are alive.
    """
    callers = {frame.f_code for frame in stack_frames(sys._getframe())}
    suspended = WeakSet(each for each in generators if _gives(each, callers))
    return BatchSource(frozenset(each.gi_code for each in suspended) | _queue_codes(), frozenset(callers), suspended)


def _gives(generator: GeneratorType[Any, Any, Any], callers: set[CodeType]) -> bool:
    """Return whether a generator may give batches: it is suspended, and no expression."""
    code = generator.gi_code
    return generator.gi_frame is not None and code not in callers and not code.co_name.startswith("<")


def _queue_codes() -> frozenset[CodeType]:
    """Return the code by which queues give their next item."""
    gets = (getattr(getattr(sys.modules.get(module), kind, None), name, None) for module, kind, name in _QUEUES)
    return frozenset(get.__code__ for get in gets if isinstance(get, FunctionType))
