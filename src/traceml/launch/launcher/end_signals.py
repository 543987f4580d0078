"""Signals that ask a launching process for its end: they end the job on all hosts first."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from traceml.process_ends import EndedBySignal

__all__ = ["EndedBySignal", "ended_by"]


@contextmanager
def ended_by(*numbers: signal.Signals) -> Iterator[None]:
    """Raise `EndedBySignal` in the block on the first of these signals; ignore later ones."""

    def end(number: int, _frame: object) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)

        raise EndedBySignal(number)

    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
