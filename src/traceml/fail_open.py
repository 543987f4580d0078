"""Guard for work that must never fail the training: log the error, count it, and go on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from traceml.errors import TraceMLError

__all__ = ["fail_open", "failures"]

_MOST_KINDS = 1000  # texts remembered by `once`; beyond them, repeats are logged at debug level only

_failures: dict[str, int] = {}
_logged: set[tuple[str, str]] = set()


@contextmanager
def fail_open(
    log: logging.Logger,
    room: str,
    what: str,
    *,
    once: bool = False,
    reraise: type[Exception] | tuple[type[Exception], ...] = (),
) -> Iterator[None]:
    """Log an exception of the block as a warning, count it, and continue after the block.

    A traceback is logged too, except for an `OSError` or a `TraceMLError`: their texts say enough.

    Args:
        log: where the warning goes.
        room: package folder whose count goes up: `recorder`, `aggregator`, ….
        what: what failed, as the first words of the warning: `tracing could not be started`.
        once: warn for the first failure with this text only; repeats are logged at debug level.
        reraise: exceptions that are not handled here.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, reraise):
            raise

        _failures[room] = _failures.get(room, 0) + 1
        level = logging.DEBUG if once and _is_repeat(room, what) else logging.WARNING
        is_clear = isinstance(error, OSError | TraceMLError)
        log.log(level, "%s: %r", what, error, exc_info=None if is_clear else error)


def failures() -> dict[str, int]:
    """Return the number of handled failures of this process, by room."""
    return dict(_failures)


def _is_repeat(room: str, what: str) -> bool:
    if (room, what) in _logged or len(_logged) >= _MOST_KINDS:
        return True

    _logged.add((room, what))
    return False
