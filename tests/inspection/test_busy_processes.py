"""Real processes that use a core, by name."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.eventually import eventually
from traceml.inspection.busy_processes import BusyProcesses

pytestmark = pytest.mark.process
_NAME = f"busy-{os.getpid()}"  # no other test's
_BUSY = f"""
open("/proc/self/comm", "w").write("{_NAME}")
print("ready", flush=True)
while True:
    pass
"""


@pytest.fixture
def taker() -> Iterator[int]:
    """A process that computes, and has a name."""
    with subprocess.Popen([sys.executable, "-c", _BUSY], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        process.kill()


def used(read: BusyProcesses, own: set[int], name: str) -> float:
    """Return the cores of a name once it has used any; the time between readings is what they take."""
    threading.Event().wait(0.3)
    return read.read(own).get(name, 0.0)


def test_a_process_that_computes_is_named(taker: int) -> None:
    """From the second reading on."""
    read = BusyProcesses()
    assert read.read(set()) == {}

    assert eventually(lambda: used(read, set(), _NAME), "some CPU time") <= 2 * (os.cpu_count() or 1)


def test_own_processes_and_their_children_are_left_out(taker: int) -> None:
    """A rank, and its loader workers."""
    read = BusyProcesses()
    read.read(set())
    eventually(lambda: used(read, set(), _NAME), "some CPU time")

    for own in ({taker}, {os.getpid()}):
        assert used(read, own, _NAME) == 0.0


def test_another_rank_of_the_same_launcher_is_no_other_process(taker: int) -> None:
    """It has not connected yet: the same parent has started it from the same program."""
    with subprocess.Popen([sys.executable, "-c", _BUSY], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        other.stdout.readline()
        read = BusyProcesses()
        read.read({taker})
        assert used(read, {taker}, _NAME) == 0.0

        eventually(lambda: used(read, set(), _NAME), "some CPU time")
        other.kill()


def test_processes_of_other_users_have_no_name(taker: int) -> None:
    """What runs under another account is nobody's business; that it takes the cores is."""
    read = BusyProcesses(user=Path(f"/proc/{taker}").stat().st_uid + 1)
    read.read(set())

    eventually(lambda: used(read, set(), ""), "some CPU time")
    assert _NAME not in read.read(set())
