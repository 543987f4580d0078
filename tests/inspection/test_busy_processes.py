"""Real processes that use a core, by name."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Collection, Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.eventually import eventually
from traceml.inspection import busy_processes
from traceml.inspection.busy_processes import SHORT_LIVED, BusyProcesses, CoreUse
from traceml.inspection.kernel_state import ProcessInfo

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


def used(read: BusyProcesses, ranks: Collection[int] = (), apart: Collection[int] = ()) -> CoreUse:
    """Return the cores since the last reading; the time between readings is what they take."""
    threading.Event().wait(0.3)
    found = read.read(ranks, apart)
    assert found is not None
    return found


def test_a_process_that_computes_is_named(taker: int) -> None:
    """From the second reading on."""
    read = BusyProcesses()
    assert read.read(()) is None

    cores = eventually(lambda: used(read).others.get(_NAME), "some CPU time")
    assert 0 < cores <= 2 * (os.cpu_count() or 1)


def test_a_rank_is_no_process_beside_itself(taker: int) -> None:
    """Nor is a process that is left out, with its children."""
    read = BusyProcesses()
    read.read(())
    eventually(lambda: used(read).others.get(_NAME), "some CPU time")

    for found in (used(read, {taker}), used(read, apart={os.getpid()})):
        assert _NAME not in found.others | found.started


def test_what_a_rank_has_started_is_told_apart(taker: int) -> None:
    """A program that makes its samples, or a loader worker."""
    read = BusyProcesses()
    read.read({os.getpid()})

    eventually(lambda: used(read, {os.getpid()}).started.get(_NAME), "some CPU time")
    assert _NAME not in used(read, {os.getpid()}).others


class Rank:
    """A process that runs what it is told. Those beside it have other parents, as processes of other tests have."""

    def __init__(self) -> None:
        code = "import sys\nfor line in sys.stdin:\n    exec(line)\n    print(flush=True)"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pids = {self._process.pid}

    def run(self, line: str) -> None:
        """Run a line of code, and wait until it is done."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "\n"

    def close(self) -> None:
        """Let it end."""
        self._process.communicate()


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rank]:
    """A rank that starts programs. On a busy machine they take long: a second passes between two readings here."""
    monkeypatch.setattr(busy_processes, "time", SimpleNamespace(monotonic=map(float, count()).__next__))
    made = Rank()
    yield made
    made.close()


def test_a_process_that_has_ended_counts_once_its_parent_has_collected_it(rank: Rank) -> None:
    """With what it used since the last reading: a rank may start a short program for each file."""
    code = "import time\nwhile time.process_time() < 0.5: pass"
    read = BusyProcesses()
    read.read(rank.pids)

    rank.run(f"import subprocess; subprocess.run([sys.executable, '-c', {code!r}], check=True)")

    assert used(read, rank.pids).started[SHORT_LIVED] > 0
    assert SHORT_LIVED not in used(read, rank.pids).started


def test_a_process_that_has_ended_does_not_count_twice(rank: Rank) -> None:
    """Its parent gets all of its CPU time at once, most of which was counted while it ran."""
    code = "import time\nwhile time.process_time() < 0.6: pass\nprint(flush=True)\ninput()"
    read = BusyProcesses()
    read.read(rank.pids)
    pipes = "stdin=subprocess.PIPE, stdout=subprocess.PIPE"
    rank.run(f"import subprocess; begun = subprocess.Popen([sys.executable, '-c', {code!r}], {pipes})")
    rank.run("begun.stdout.readline()")
    used(read, rank.pids)
    rank.run("begun.communicate(b'\\n')")

    assert SHORT_LIVED not in used(read, rank.pids).started


def test_another_rank_of_the_same_launcher_is_no_other_process(taker: int) -> None:
    """It has not connected yet: the same parent has started it from the same program."""
    with subprocess.Popen([sys.executable, "-c", _BUSY], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        other.stdout.readline()
        read = BusyProcesses()
        read.read({taker})
        found = used(read, {taker})
        assert _NAME not in found.others | found.started

        eventually(lambda: used(read).others.get(_NAME), "some CPU time")
        other.kill()


def test_processes_of_other_users_have_no_name(taker: int) -> None:
    """What runs under another account is nobody's business; that it takes the cores is."""
    read = BusyProcesses(user=Path(f"/proc/{taker}").stat().st_uid + 1)
    read.read(())

    eventually(lambda: used(read).others.get(""), "some CPU time")
    assert _NAME not in used(read).others


def _reading(*processes: ProcessInfo) -> dict[int, ProcessInfo]:
    return {each.pid: each for each in processes}


@pytest.mark.parametrize("state", ["S", "Z"])
@pytest.mark.parametrize("orphan_s", [0.5, 7200.0])
def test_an_orphan_is_not_taken_for_work_of_who_collects_it(
    monkeypatch: pytest.MonkeyPatch, orphan_s: float, state: str
) -> None:
    """Its parent has ended: `init` gets the CPU time that it had used before, all at once; the shell lives on."""
    init, shell = ProcessInfo(1, 0, "S", cpu_s=5.0), ProcessInfo(20, 1, "S")
    orphan = ProcessInfo(30, 20, "R", cpu_s=orphan_s)
    readings = [
        _reading(init, shell, orphan),
        _reading(init._replace(cpu_s=5.5, collected_s=orphan_s + 0.25), shell._replace(state=state)),
    ]
    monkeypatch.setattr(busy_processes, "_processes", lambda: readings.pop(0))
    monkeypatch.setattr(busy_processes, "program_name", lambda pid: f"program {pid}")
    times = iter([100.0, 101.0])
    monkeypatch.setattr(busy_processes, "time", SimpleNamespace(monotonic=lambda: next(times)))
    processes = BusyProcesses(Path("/proc/1").stat().st_uid)

    assert processes.read([]) is None
    found = processes.read([])

    assert found is not None
    assert found.others == {"program 1": 0.75}
