"""Iterators that give batches and are no DataLoader: generators that are suspended while the training runs, and queues.

Python reports no call of a generator, so their time is `other`; samples of the stack distinguish it from other code. A
queue from which the training loop takes its batches is filled by another thread or process.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from types import CodeType, FrameType, FunctionType, GeneratorType
from typing import Any

__all__ = ["Feeding", "feeding_of"]

_MAX_DEPTH = 200
_QUEUES = (("queue", "Queue"), ("multiprocessing.queues", "Queue"), ("multiprocessing.queues", "SimpleQueue"))


@dataclass(frozen=True, slots=True)
class Feeding:
    """Code by which the training loop gets its batches.

    Attributes:
        generators: code of the generators that were suspended in the first backward pass, and of the queues' `get`.
        callers: code that had called that pass; the training loop is among it.
    """

    generators: frozenset[CodeType]
    callers: frozenset[CodeType]

    def contains(self, frame: FrameType) -> bool:
        """Return whether a frame runs for an iterator that the training loop has asked for a batch."""
        inner: FrameType | None = frame
        for _ in range(_MAX_DEPTH):
            caller = inner.f_back if inner is not None else None
            if inner is None or caller is None:
                return False

            code = inner.f_code
            if caller.f_code in self.callers and (code in self.generators or code.co_name == "__next__"):
                return True

            inner = caller

        return False


def feeding_of(objects: Iterable[Any]) -> Feeding:
    """Return the code that feeds the training, in its first backward pass.

    Args:
        objects: those of the garbage collector.
    """
    generators = {each.gi_code for each in objects if type(each) is GeneratorType and each.gi_frame is not None}
    callers = set()
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        callers.add(frame.f_code)
        frame = frame.f_back

    named = (code for code in generators - callers if not code.co_name.startswith("<"))
    return Feeding(frozenset(named) | _queue_codes(), frozenset(callers))


def _queue_codes() -> frozenset[CodeType]:
    """Return the code by which queues give their next item."""
    kinds = (getattr(sys.modules.get(module), name, None) for module, name in _QUEUES)
    gets = (getattr(kind, "get", None) for kind in kinds)
    return frozenset(get.__code__ for get in gets if isinstance(get, FunctionType))
