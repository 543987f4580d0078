"""The two forms in which `Launcher.run` takes a call, and what separates them."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

import pytest

import traceml
from tests.launch import jobs
from traceml.errors import UsageError
from traceml.launch.launcher.launch_options import FunctionCall, read_call


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        ((), {}, ((), {}, "auto")),
        (((1, 2),), {}, ((1, 2), {}, "auto")),
        (([1, 2], {"key": 3}), {}, ([1, 2], {"key": 3}, "auto")),
        (((1,), None, []), {}, ((1,), {}, [])),
        ((None, {"key": 3}), {"log_handlers": None}, ((), {"key": 3}, None)),
        ((), {"func_args": (1,), "func_kwargs": {"key": 2}}, ((1,), {"key": 2}, "auto")),
        (([[1, 2]],), {}, ([[1, 2]], {}, "auto")),
        # the function's own arguments
        ((1,), {}, ((1,), {}, "auto")),
        ((1, 2), {"key": 3}, ((1, 2), {"key": 3}, "auto")),
        ((), {"key": 3}, ((), {"key": 3}, "auto")),
        (((1, 2), 3), {}, (((1, 2), 3), {}, "auto")),
        (((1, 2),), {"key": 3}, (((1, 2),), {"key": 3}, "auto")),
        (((1,), {}, 3, 4), {}, (((1,), {}, 3, 4), {}, "auto")),
        (({"lr": 1},), {"log_handlers": []}, (({"lr": 1},), {}, [])),
    ],
)
def test_each_form_is_reported_by_its_arguments(args: Any, kwargs: Any, expected: Any) -> None:
    """A sequence first, and nothing but a dict and log handlers after it, is our form; all else is its own."""
    assert read_call(print, args, kwargs) == FunctionCall(print, *expected)


@pytest.mark.parametrize(
    ("func", "kwargs", "words"),
    [
        (3, {}, "func=3: it is not callable"),
        (asyncio.sleep, {}, "is a coroutine function"),
        (functools.partial(asyncio.sleep, 1), {}, "Launch a function that runs it by asyncio.run"),
        (print, {"func_args": "one"}, "func_args is a str: give a tuple"),
        (print, {"func_kwargs": ["one"]}, "func_kwargs is a list"),
    ],
)
def test_wrong_types_are_reported(func: Any, kwargs: dict[str, Any], words: str) -> None:
    """What is given by the names of the first form must fit it."""
    with pytest.raises(UsageError, match=words):
        read_call(func, (), kwargs)


def test_both_forms_run() -> None:
    """The worker gets the same arguments."""
    launcher = traceml.Launcher(hostnames=["localhost"], workers_per_host=1, backend=None)

    own = launcher.run(jobs.who, (1, "two"), {"three": 3}, log_handlers=None).rank(0)
    theirs = launcher.run(jobs.who, 1, "two", three=3, log_handlers=None).rank(0)

    assert own["args"] == theirs["args"] == (1, "two")
    assert own["kwargs"] == theirs["kwargs"] == {"three": 3}
