"""Callbacks that run once a module is imported, also where tracing starts inside its import."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

from traceml.instrument.import_hook import PostImportHook, is_imported

NAME = "begun_framework"
STARTS = "begun_framework_starts"

Import = Callable[..., None]


@pytest.fixture
def import_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Import]:
    """Import a module that has a class at its end, and call a function in its middle."""

    def run(start: Callable[[], None], *, end: str = "class Trainer: pass") -> None:
        (tmp_path / f"{NAME}.py").write_text(f"import {STARTS}\n{STARTS}.start()\n{end}\n")
        starts = ModuleType(STARTS)
        vars(starts)["start"] = start
        monkeypatch.setitem(sys.modules, STARTS, starts)
        importlib.invalidate_caches()
        importlib.import_module(NAME)

    monkeypatch.syspath_prepend(str(tmp_path))
    yield run
    sys.modules.pop(NAME, None)


def has_class() -> bool:
    return hasattr(sys.modules[NAME], "Trainer")


def test_a_module_whose_import_goes_on(import_while: Import) -> None:
    """Each callback runs once, at the end of the import, and nothing of it stays."""
    seen: list[tuple[str, bool]] = []
    hooks = [PostImportHook({NAME: lambda n=name: seen.append((n, has_class()))}) for name in ("a", "b")]

    def start() -> None:
        assert not is_imported(NAME)
        for hook in hooks:
            hook.install()

        assert seen == []

    try:
        import_while(start)
        assert seen == [("a", True), ("b", True)]
        assert is_imported(NAME)
        assert type(sys.modules[NAME].__spec__) is ModuleSpec
        assert not [name for name in vars(sys.modules[NAME].__spec__) if "traceml" in name]
    finally:
        for hook in hooks:
            hook.uninstall()


def test_an_import_that_fails(import_while: Import) -> None:
    """Nothing is called for a module that is gone again."""
    seen: list[bool] = []
    hook = PostImportHook({NAME: lambda: seen.append(has_class())})
    try:
        with pytest.raises(ZeroDivisionError):
            import_while(hook.install, end="1 / 0")

        assert seen == []
    finally:
        hook.uninstall()


def test_a_hook_that_is_uninstalled_meanwhile(import_while: Import) -> None:
    """Nothing is called."""
    seen: list[bool] = []
    hook = PostImportHook({NAME: lambda: seen.append(has_class())})

    def start() -> None:
        hook.install()
        hook.uninstall()

    import_while(start)
    assert seen == []


def test_a_module_that_is_imported_later(import_while: Import) -> None:
    """The callback runs at its end too."""
    seen: list[bool] = []
    hook = PostImportHook({NAME: lambda: seen.append(has_class())})
    hook.install()
    try:
        import_while(lambda: None)
        assert seen == [True]
    finally:
        hook.uninstall()


def test_a_module_that_is_imported_already(import_while: Import) -> None:
    """The callback runs at once, and once only."""
    seen: list[bool] = []
    hook = PostImportHook({NAME: lambda: seen.append(has_class())})
    import_while(lambda: None)
    hook.install()
    hook.run(NAME)
    assert seen == [True]
    assert hook not in sys.meta_path
