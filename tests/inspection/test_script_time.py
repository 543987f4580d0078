"""Age of the process as the time since its script began."""

from __future__ import annotations

import os
import sys
import time
from types import ModuleType

import psutil
import pytest

from traceml.inspection import script_time
from traceml.inspection.script_time import note_end_of_run, note_script, script_age_ms


@pytest.fixture(autouse=True)
def main(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The main module of a script, in place of pytest's."""
    made = ModuleType("__main__")
    made.__file__ = "/home/me/train.py"
    monkeypatch.setitem(sys.modules, "__main__", made)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    monkeypatch.setattr(script_time, "_pid_of_ended", 0)
    monkeypatch.setattr(script_time, "_pid_of_script", 0)
    return made


def test_it_is_the_age_of_the_process() -> None:
    """In a script."""
    created_s = psutil.Process().create_time()
    before_s = time.time()
    age_s = script_age_ms() / 1000

    assert before_s - created_s - 2 <= age_s <= time.time() - created_s + 2


def test_a_script_may_not_be_the_main_module_yet(main: ModuleType) -> None:
    """With a tracker, a rank of `traceml run` or `launch` often connects before."""
    main.__file__ = None
    assert script_age_ms() == 0

    note_script()
    assert script_age_ms() > 0


def test_another_process_may_have_its_number_in_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """`unshare --pid` without a /proc of its own: start-up was told to have taken since the machine's boot."""
    monkeypatch.setattr(os, "getpid", lambda: 2**30)

    assert script_age_ms() > 0


def test_it_is_unknown_where_the_process_was_there_before(main: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker of a pool that an installed program started, an interactive session, a notebook."""
    main.__file__ = "/usr/lib/python3/site-packages/ray/default_worker.py"
    assert script_age_ms() == 0
    main.__file__ = None
    assert script_age_ms() == 0

    main.__file__ = "/home/me/train.py"
    assert script_age_ms() > 0
    with monkeypatch.context() as patch:
        patch.setattr(sys, "ps1", ">>> ", raising=False)
        assert script_age_ms() == 0
    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    assert script_age_ms() == 0


def test_a_second_run_of_a_process_began_later() -> None:
    """After the first one has ended."""
    note_end_of_run()
    assert script_age_ms() == 0
