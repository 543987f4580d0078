"""Marks of our own functions for torch.compile; what they do is in `test_compile.py`."""

from __future__ import annotations

import sys
from types import CodeType, ModuleType

import pytest

from traceml.instrument import dynamo


def test_each_module_is_marked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Marks outlive `uninstall`: the next installation marks what was imported since, and nothing anew."""
    marked: list[CodeType] = []
    monkeypatch.setattr(dynamo, "_marker", lambda: lambda code, _leaf: marked.append(code))
    monkeypatch.setattr(dynamo, "_marked", set())
    dynamo.skip_own_code()
    assert dynamo.skip_own_code.__code__ in marked

    late = ModuleType("traceml.instrument.late")
    exec("def hook(): pass", vars(late))
    late.hook.__module__ = late.__name__
    monkeypatch.setitem(sys.modules, late.__name__, late)
    marked.clear()
    dynamo.skip_own_code()
    assert marked == [late.hook.__code__]


def test_without_torch_s_mark_nothing_counts_as_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may come with a later import."""
    monkeypatch.setattr(dynamo, "_marker", lambda: None)
    monkeypatch.setattr(dynamo, "_marked", set())
    dynamo.skip_own_code()

    assert not dynamo._marked
