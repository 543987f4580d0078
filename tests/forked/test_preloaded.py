"""Modules of ours that forked processes share: each is as its own import would have made it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forked import client, server_imports

# What a module may not ask while it is imported: the answer would be that of the process that forks.
_NOTE = """
import atexit, importlib, os, signal, sys, threading, time
asked = []

def noting(name, original):
    def call(*values, **options):
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("traceml"):
            asked.append((caller, name))
        return original(*values, **options)
    return call

for module, names in (
    (os, "getcwd getenv getpid getppid getuid gethostname cpu_count sched_getaffinity open"),
    (time, "time time_ns monotonic monotonic_ns perf_counter perf_counter_ns"),
    (signal, "signal set_wakeup_fd"),
    (atexit, "register"),
    (threading.Thread, "start"),
    (type(os.environ), "__getitem__ get __contains__ __iter__ copy"),
):
    for name in names.split():
        if hasattr(module, name):
            setattr(module, name, noting(name, getattr(module, name)))

for name in sys.argv[1:]:
    importlib.import_module(name)

print(asked)
"""


def test_shared_modules_ask_nothing_of_their_process() -> None:
    """No environment, folder, clock or id is read while they are imported, and no thread is started.

    The handler of the exit does nothing where there is no recorder.
    """
    done = subprocess.run(
        [sys.executable, "-c", _NOTE, *server_imports.OWN], capture_output=True, text=True, check=True, timeout=120
    )

    assert done.stdout == "[('traceml', 'register')]\n"


@pytest.mark.parametrize("name", ["traceml.errors", "traceml.runs.find", "traceml.display.report_files"])
def test_a_shared_module_comes_with_what_it_imports_itself(name: str) -> None:
    """The same modules are loaded, in the same order, as in a new process; packages know their modules."""
    code = f"""if True:
        import sys
        before = set(sys.modules)
        import {name}
        loaded = [each for each in sys.modules if each not in before and each.startswith("traceml")]
        parts = [each.rpartition(".") for each in loaded]
        known = [each for parent, _, each in parts if parent and hasattr(sys.modules[parent], each)]
        print(loaded, known)
    """
    forked, new = (run([sys.executable, "-c", code], stdout=subprocess.PIPE) for run in (client.run, subprocess.run))

    assert forked.stdout == new.stdout != b""


def test_a_package_that_is_elsewhere_is_imported_from_there(tmp_path: Path) -> None:
    """A process with a path of its own gets its own modules."""
    (tmp_path / "traceml").mkdir()
    (tmp_path / "traceml" / "__init__.py").write_text("")
    (tmp_path / "traceml" / "errors.py").write_text("here = __file__")
    words = [sys.executable, "-c", "import traceml.errors; print(traceml.errors.here)"]
    done = client.run(words, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)

    assert done.stdout == f"{tmp_path / 'traceml' / 'errors.py'}\n"
