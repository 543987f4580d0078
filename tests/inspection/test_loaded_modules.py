"""Modules that are imported, and those that another thread is importing at this moment."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest

from traceml.inspection.loaded_modules import imports_main_again, loaded_module, multiprocessing_parent


def test_a_module_that_another_thread_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is none until its import has ended: what it defines last is missing until then."""
    begun, ending = threading.Event(), threading.Event()
    monkeypatch.setattr(threading, "begun", begun, raising=False)
    monkeypatch.setattr(threading, "ending", ending, raising=False)
    (tmp_path / "slow_to_import.py").write_text(
        "import threading\nthreading.begun.set()\nthreading.ending.wait(60)\nlast = 1\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    importing = threading.Thread(target=__import__, args=("slow_to_import",))
    importing.start()
    try:
        assert begun.wait(60)
        assert "slow_to_import" in sys.modules
        assert loaded_module("slow_to_import") is None
    finally:
        ending.set()
        importing.join()

    assert loaded_module("slow_to_import").last == 1
    del sys.modules["slow_to_import"]


def test_modules_without_an_import() -> None:
    """A module that nobody imported is none; the main module has no spec and is loaded."""
    assert loaded_module("no_such_module") is None
    assert loaded_module("__main__") is sys.modules["__main__"]


def test_multiprocessing_that_another_thread_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers nothing yet: a script's thread may import it while another one calls `init`."""
    partial = ModuleType("multiprocessing.process")
    partial.__spec__ = sys.__spec__.__class__("multiprocessing.process", None)
    partial.__spec__._initializing = True  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "multiprocessing.process", partial)

    assert multiprocessing_parent() is None
    assert not imports_main_again()
