"""Real processes that stand still in a known way, with a thread that answers nobody: what a recorder has."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["Standing", "standing"]

_HEAD = """
import ctypes, os, sys, threading, time
from traceml.inspection import stack_signal

file = stack_signal.create_stack_file()
stack_signal.register(file)
asking, told = threading.Event(), threading.Event()

def ask():
    print(threading.get_native_id(), flush=True)
    told.set()
    while not asking.wait(0.5):
        pass

threading.Thread(target=ask, daemon=True).start()
told.wait()
"""


@dataclass
class Standing:
    """A process: its number, and that of the thread that waits for the GIL while somebody else holds it."""

    process: subprocess.Popen[str]
    thread: int

    @property
    def pid(self) -> int:
        """Its number."""
        return self.process.pid

    def line(self) -> str:
        """Wait for its next line of output."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


@contextmanager
def standing(code: str) -> Iterator[Standing]:
    """Run code that prints `ready` before it stands still."""
    script = _HEAD + textwrap.dedent(code)
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            found = Standing(process, int(process.stdout.readline()))
            assert found.line() == "ready"
            yield found
        finally:
            process.kill()
