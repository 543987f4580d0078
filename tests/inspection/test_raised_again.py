"""Exceptions that are raised again as others, and those that stand for themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.installed_code import run_installed
from traceml.inspection.raised_again import raised_first


def fail() -> None:
    """Fail as a user's function does."""
    raise ValueError("bad record")


def from_cause() -> None:
    try:
        fail()
    except ValueError as error:
        raise RuntimeError("training failed") from error


def in_handler() -> None:
    try:
        fail()
    except ValueError:
        raise RuntimeError("training failed")  # noqa: B904 - as scripts do


def twice() -> None:
    try:
        from_cause()
    except RuntimeError as error:
        raise SystemError("given up") from error


def second_attempt() -> None:
    try:
        fail()
    except ValueError:
        Path("/missing/data").read_text()


def second_attempt_in_c() -> None:
    try:
        fail()
    except ValueError:
        int("data")


def hidden() -> None:
    try:
        fail()
    except ValueError:
        raise RuntimeError("no such record") from None


def empty() -> None:
    numbers: Iterator[int] = iter(())
    try:
        next(numbers)
    except StopIteration as error:
        raise RuntimeError("no data") from error


def grouped() -> None:
    raise ExceptionGroup("unhandled errors in a TaskGroup", [ValueError("bad record")])


def several() -> None:
    raise ExceptionGroup("unhandled errors in a TaskGroup", [ValueError("bad record"), KeyError("label")])


ITSELF = (fail, second_attempt, second_attempt_in_c, hidden, empty, several)


@pytest.mark.parametrize(
    ("script", "kind"),
    [
        (fail, ValueError), (from_cause, ValueError), (in_handler, ValueError), (twice, ValueError),
        (second_attempt, FileNotFoundError), (second_attempt_in_c, ValueError), (hidden, RuntimeError),
        (empty, RuntimeError), (grouped, ValueError), (several, ExceptionGroup),
    ],
)  # fmt: skip
def test_the_first_of_those_that_are_raised_again_is_found(script: Callable[[], None], kind: type[Exception]) -> None:
    """A second attempt that fails, and the end of an iterator, are not what was raised again."""
    with pytest.raises(Exception) as raised:  # noqa: PT011 - of several kinds
        script()

    first = raised_first(raised.value)
    assert type(first) is kind
    assert (first is raised.value) == (script in ITSELF)


@pytest.mark.parametrize(("is_own", "kind"), [(True, ValueError), (False, RuntimeError)])
def test_a_library_hides_only_what_the_script_has_raised(tmp_path: Path, is_own: bool, kind: type[Exception]) -> None:
    """Its own errors it explains best: a refused connection has no host, the error made of it has."""
    names = run_installed(
        tmp_path,
        "def apply(function):\n"
        "    try:\n"
        "        function() if function else int('data')\n"
        "    except ValueError as error:\n"
        "        raise RuntimeError('mapping failed') from error\n",
    )
    with pytest.raises(RuntimeError) as raised:
        names["apply"](fail if is_own else None)

    assert type(raised_first(raised.value)) is kind


def test_causes_in_a_circle_end() -> None:
    with pytest.raises(RuntimeError) as raised:
        from_cause()

    error = raised.value
    error.__cause__.__cause__ = error  # type: ignore[union-attr]
    assert raised_first(error) in (error, error.__cause__)
