"""Derived names of callables."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from traceml import NotCallableError, Runtime
from traceml.tasks.task_record import is_coroutine, name_of


def function() -> None: ...


async def coroutine() -> None: ...


class Pipeline:
    def run(self) -> None: ...

    def __call__(self) -> None: ...

    @classmethod
    def build(cls) -> None: ...


class AsyncPipeline:
    async def __call__(self) -> None: ...


class Proxy:
    """Raise for every attribute, as remote objects do."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("not connected")

    def __call__(self) -> int:
        return 1


CASES = [
    (function, "function"),
    (Pipeline().run, "Pipeline.run"),
    (Pipeline.build, "Pipeline.build"),
    (Pipeline, "Pipeline"),
    (Pipeline(), "Pipeline"),
    (lambda: None, "<lambda>"),
    (partial(function), "function"),
    (partial(partial(Pipeline().run)), "Pipeline.run"),
    (coroutine, "coroutine"),
    (len, "len"),
    ([].append, "list.append"),
]


@pytest.mark.parametrize(("fn", "name"), CASES, ids=[name for _, name in CASES])
def test_a_name_is_derived(fn: Any, name: str) -> None:
    assert name_of(fn) == name


def test_a_callable_may_refuse_its_attributes(rt: Runtime) -> None:
    handle = rt.submit(Proxy())

    assert (handle.get(), handle.name) == (1, "Proxy")


def test_nested_functions_have_their_own_names() -> None:
    def inner() -> None: ...

    class Local:
        def run(self) -> None: ...

    assert name_of(inner) == "inner"
    assert name_of(Local().run) == "Local.run"


def test_a_name_is_the_same_before_and_after_the_task(rt: Runtime) -> None:
    def inner(*_: Any) -> None: ...

    for fn in (inner, lambda *_: None, partial(inner, 1), Pipeline().run):
        handle = rt.submit(fn)
        before = handle.name
        handle.wait()
        assert handle.name == before == name_of(fn)

    assert [one["name"] for one in rt.get_progress()["tasks"]] == ["inner", "<lambda>", "inner", "Pipeline.run"]


def test_a_given_name_stays(rt: Runtime) -> None:
    handle = rt.submit(function, name="custom <locals>.name")
    handle.wait()

    assert handle.name == "custom <locals>.name"
    assert repr(handle) == "<TaskHandle 'custom <locals>.name' completed>"


@pytest.mark.parametrize("fn", [coroutine, partial(coroutine), AsyncPipeline(), AsyncPipeline().__call__])
def test_coroutine_functions_of_every_kind_are_known(fn: Any) -> None:
    assert is_coroutine(fn)


@pytest.mark.parametrize("fn", [function, Pipeline(), Pipeline, len, partial(function)])
def test_plain_callables_are_known(fn: Any) -> None:
    assert not is_coroutine(fn)


@pytest.mark.parametrize("fn", [None, 3, "f", coroutine().close() or 7])
def test_what_cannot_be_called_is_refused(rt: Runtime, fn: Any) -> None:
    with pytest.raises(NotCallableError, match=r"rt.submit\(f, x\)"):
        rt.submit(fn)

    assert rt.get_progress()["total"] == 0
