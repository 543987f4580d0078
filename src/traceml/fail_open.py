"""Guards of a block: log its error, count it and continue, as tracing must never fail the training; or explain it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType

from traceml.errors import TraceMLError

__all__ = ["fail_open", "failures", "is_terminal", "print_notice", "warn_once", "writing"]

_MAX_TEXTS = 1000  # remembered for `once`; beyond them, repeats are logged at debug level only

_failures: dict[str, int] = {}
_logged: set[tuple[str, str]] = set()


class fail_open:  # noqa: N801 - used like `contextlib.suppress`
    """Log an exception of the block as a warning, count it, and continue after the block.

    An `OSError` or a `TraceMLError` is logged by its text, any other exception with its type and traceback.

    Args:
        package: package whose count goes up: `recorder`, `aggregator`, ….
        what: what failed, as the first words of the warning: `tracing could not be started`.
        once: warn for the first failure with this text only; repeats are logged at debug level.

    Attributes:
        error: what was handled, after the block; None without a failure.
    """

    __slots__ = ("_level", "_log", "_once", "_package", "_reraise", "_what", "error")

    def __init__(
        self,
        log: logging.Logger,
        package: str,
        what: str,
        *,
        once: bool = False,
        reraise: type[Exception] | tuple[type[Exception], ...] = (),
        level: int = logging.WARNING,
    ) -> None:
        self._log, self._package, self._what = log, package, what
        self._once, self._reraise, self._level = once, reraise, level
        self.error: Exception | None = None

    def __enter__(self) -> fail_open:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception) or isinstance(error, self._reraise):
            return False

        self.error = error
        _failures[self._package] = _failures.get(self._package, 0) + 1
        level = logging.DEBUG if self._once and _is_repeat(self._package, self._what) else self._level
        is_clear = isinstance(error, OSError | TraceMLError)
        with suppress(Exception):  # a handler or filter of the user may raise: the failure is counted all the same
            self._log.log(level, "%s: %s", self._what, _text_of(error, is_clear), exc_info=None if is_clear else error)

        return True


def _handle(record: logging.LogRecord) -> None:
    """Pass on what we log; a handler or filter of the user that raises must not end the call that logs a value."""
    with suppress(Exception):
        type(_log).handle(_log, record)


_log = logging.getLogger("traceml")
_log.handle = _handle  # type: ignore[method-assign]


def failures() -> dict[str, int]:
    """Return the number of handled failures of this process, by package."""
    return dict(_failures)


def _text_of(error: Exception, is_clear: bool) -> str:
    try:
        return (is_clear and str(error)) or repr(error)
    except Exception as broken:  # noqa: BLE001 - a third party's __str__ may raise anything
        return f"{type(error).__name__}, whose text failed with {type(broken).__name__}"


def _is_repeat(package: str, what: str) -> bool:
    if (package, what) in _logged or len(_logged) >= _MAX_TEXTS:
        return True

    _logged.add((package, what))
    return False


def warn_once(key: str, text: str, *args: object) -> None:
    """Log a warning, unless this process has logged one with this key before."""
    if not _is_repeat("", key):
        _log.warning(text, *args)


def print_notice(line: str) -> None:
    """Print a line on standard error; a full disk, a closed terminal or a reader that has left costs only the line."""
    if sys.stderr is None:
        return

    with suppress(OSError, ValueError):
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


def is_terminal(stream: object) -> bool:
    """Whether a standard stream is a terminal; what a script has put in its place may have no method but `write`."""
    with suppress(AttributeError, ValueError):  # ValueError: it is closed
        return bool(stream.isatty())  # type: ignore[attr-defined]

    return False


@contextmanager
def writing(path: object, advice: str = "", *, kind: type[TraceMLError] = TraceMLError) -> Iterator[None]:
    """Raise the errors of the system as ours while a file or folder is written.

    Args:
        advice: a remedy, as a sentence.
        kind: the error to raise.

    Raises:
        TraceMLError: it cannot be written; the text names it, the cause and the advice.
    """
    try:
        yield
    except TraceMLError:
        raise
    except OSError as error:
        raise kind(". ".join(filter(None, (f"cannot write {path}: {error.strerror or error}", advice)))) from error
