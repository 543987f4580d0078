"""Exceptions that a script has raised again as others: `except ValueError as error: raise RuntimeError from error`."""

from __future__ import annotations

from types import TracebackType

from traceml.inspection.user_files import is_user_file

__all__ = ["raised_first"]

_RAISE = "RAISE_VARARGS"  # CPython's instruction of a `raise` with an exception
_NO_ERRORS = (StopIteration, StopAsyncIteration, GeneratorExit, SystemExit)
"""The end of an iterator or of the script."""


def raised_first(error: BaseException) -> BaseException:
    """Return the exception that was raised again as `error`, or `error` itself.

    A library that raises another one for an error of its own knows best what to say. So only exceptions count that the
    user's code has raised, first or again. What fails while an exception is handled, as a second attempt, is an error
    of its own.
    """
    seen = {id(error)}
    while (first := _replaced(error)) is not None and id(first) not in seen:
        seen.add(id(error := first))

    return error


def _replaced(error: BaseException) -> BaseException | None:
    """Return the exception that one has replaced; None if it stands for itself."""
    if isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:  # as of asyncio.TaskGroup
        return error.exceptions[0]

    last = _last(error.__traceback__)
    if last is None:
        return None

    explicit, is_users = error.__cause__, is_user_file(last.tb_frame.f_code.co_filename)
    if explicit is not None:
        origin = _last(explicit.__traceback__)  # None for one that only has the text of another process
        is_told = origin is not None and (is_users or is_user_file(origin.tb_frame.f_code.co_filename))
        return explicit if is_told and not isinstance(explicit, _NO_ERRORS) else None

    handled = None if error.__suppress_context__ or isinstance(error.__context__, _NO_ERRORS) else error.__context__
    caught = None if handled is None else handled.__traceback__
    is_raised_there = caught is not None and caught.tb_frame is last.tb_frame and _is_raise(last)
    return handled if is_users and is_raised_there else None


def _last(trace: TracebackType | None) -> TracebackType | None:
    """Return the innermost entry of a traceback: the frame that raised."""
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next

    return trace


def _is_raise(trace: TracebackType) -> bool:
    from opcode import opmap  # only at the end of a script

    return trace.tb_frame.f_code.co_code[trace.tb_lasti] == opmap[_RAISE]
