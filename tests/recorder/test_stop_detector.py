"""Stopped processes are told from those that wait."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest

from traceml.clock import monotonic_ns
from traceml.database.schema import Slot
from traceml.recorder.stop_detector import StopDetector

_STOPPED_S = 2.0

# Sleeps in a thread as the recorder does, until the main thread ends.
SLEEPER = """
    import json, sys, threading, time
    from traceml.clock import monotonic_ns
    from traceml.database.schema import Slot
    from traceml.recorder.stop_detector import StopDetector

    slots = {Slot.STEP_START: monotonic_ns(), Slot.STEP: 7}
    detector = StopDetector(slots, lambda kind, **facts: print(json.dumps({"kind": kind, **facts}), flush=True))
    ended, slept = threading.Event(), threading.Event()

    def run():
        while not ended.is_set():
            detector.poll()
            began_ns = monotonic_ns()
            ended.wait(0.1)
            detector.slept(0.1, began_ns)
            slept.set()

    thread = threading.Thread(target=run)
    thread.start()
    slept.wait()
    print("ready", flush=True)
"""


@pytest.fixture
def sleeper(tmp_path: Path):
    """Start a process that sleeps and does something."""
    processes: list[Popen[str]] = []

    def start(code: str) -> Popen[str]:
        script = tmp_path / "sleeper.py"
        lines = [line.removeprefix("    ") for line in (SLEEPER + code).splitlines()]
        script.write_text("\n".join([*lines, "ended.set()", "thread.join()"]))
        process = Popen([sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.process
def test_a_stopped_process_is_noted(sleeper) -> None:
    """Its time and its step are in the row. On a busy host it may wait for a core, too, and no stop is noted."""
    rows: list[dict[str, Any]] = []
    while not rows:
        process = sleeper("    sys.stdin.readline()\n")
        began_s = time.time()
        process.send_signal(signal.SIGSTOP)
        time.sleep(_STOPPED_S)  # what is measured
        process.send_signal(signal.SIGCONT)
        out, _ = process.communicate("\n", timeout=240)
        rows = [json.loads(line) for line in out.splitlines()]

    (row,) = rows
    assert (row["kind"], row["from_step"], row["step"], row["part"]) == ("stopped", 7, 7, "steps")
    assert row["seconds"] > _STOPPED_S - 0.2
    assert began_s - 0.2 < row["began_s"] < began_s + _STOPPED_S


@pytest.mark.process
def test_a_process_that_holds_the_gil_is_not_stopped(sleeper) -> None:
    """A C function that sleeps with the GIL keeps the thread from running too, but the thread tries."""
    process = sleeper(f"    import ctypes\n    ctypes.PyDLL(None).usleep({int(_STOPPED_S * 1e6)})\n")

    assert process.communicate(timeout=240)[0] == ""


def test_a_kernel_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the wait for cores a stop cannot be told from it, so nothing is noted, and nothing raises."""
    rows: list[str] = []
    detector = StopDetector({Slot.STEP_START: 0, Slot.STEP: -1}, lambda kind, **_: rows.append(kind))
    monkeypatch.setattr(
        "traceml.recorder.stop_detector.ProcFile", lambda *_: (_ for _ in ()).throw(FileNotFoundError())
    )
    detector.poll()
    detector.slept(0.5, monotonic_ns() - 2_500_000_000)
    detector.close()

    assert rows == []


@pytest.mark.parametrize(
    ("used", "noted"),
    [
        ((0, 0, 0), True),
        ((1_900_000_000, 0, 0), False),
        ((0, 400, 0), False),
        ((0, 0, 3), False),
        ((1000, 12, 0), True),
    ],
)
def test_waiting_is_no_stop(monkeypatch: pytest.MonkeyPatch, used: tuple[int, int, int], noted: bool) -> None:
    """Who waits for a core, for the GIL or for a page was not stopped."""
    rows: list[str] = []
    detector = StopDetector(
        {Slot.STEP_START: 0, Slot.STEP: -1}, lambda kind, *, part, **_: rows.append(f"{kind} {part}")
    )
    readings = iter([(5, 5, 5), tuple(5 + each for each in used)])
    monkeypatch.setattr(StopDetector, "_used", lambda _: next(readings))
    detector.poll()
    detector.slept(0.5, monotonic_ns() - 2_500_000_000)

    assert rows == (["stopped startup"] if noted else [])


@pytest.mark.parametrize(("asleep_s", "noted"), [(1, []), (90, [("suspended", 90.0, 6, 8)])])
def test_a_suspended_machine_is_noted(
    monkeypatch: pytest.MonkeyPatch, asleep_s: int, noted: list[tuple[str, float, int, int]]
) -> None:
    """Its monotonic clock stands still, so no sleep is late; the clock since boot goes on. It is noted once."""
    rows: list[tuple[str, float, int, int]] = []
    slots = {Slot.STEP_START: 0, Slot.STEP: 6}
    readings = iter(seconds * 10**9 for seconds in (5, 5, 5 + asleep_s, 5 + asleep_s))
    monkeypatch.setattr("traceml.recorder.stop_detector._suspended_ns", lambda: next(readings))

    def note(_kind: str, *, seconds: float, step: int, part: str, from_step: int, began_s: float) -> None:
        assert began_s <= time.time() - seconds + 1
        rows.append((part, seconds, from_step, step))

    detector = StopDetector(slots, note)
    detector.poll()
    slots[Slot.STEP] = 8
    detector.slept(0.5, monotonic_ns())
    detector.poll()
    detector.close()

    assert rows == noted


def test_a_suspension_before_the_last_turn_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that ends right after it has no further cycle."""
    rows: list[str] = []
    readings = iter(seconds * 10**9 for seconds in (5, 5, 65))
    monkeypatch.setattr("traceml.recorder.stop_detector._suspended_ns", lambda: next(readings))
    detector = StopDetector({Slot.STEP_START: 0, Slot.STEP: 6}, lambda _kind, *, part, **_: rows.append(part))
    detector.poll()
    detector.close()

    assert rows == ["suspended"]
