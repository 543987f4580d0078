"""Samples of the training thread's line: where it is, in which phase, and what the script's own settings become."""

from __future__ import annotations

import _thread
import asyncio
import collections
import hashlib
import importlib
import itertools
import json
import math
import os
import selectors
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch

from tests.eventually import eventually
from traceml.clock import monotonic_ns
from traceml.database.flight.flight import FlightFile
from traceml.database.flight.postmortem import FlightSnapshot
from traceml.database.schema import IMPORTING, LINE_OTHER, LINE_OUTSIDE, LINE_STARTUP, LINE_THREADS, LINES, Phase, Slot
from traceml.inspection.switch_interval import LONGEST_S, SHORT_S, OtherThreads, switch_interval
from traceml.inspection.user_files import PACKAGE_FOLDERS
from traceml.recorder.lines import line_sampler
from traceml.recorder.lines.line_sampler import LineSampler
from traceml.recorder.user_code import UserCode

SAMPLES = 40


class Training:
    """A thread that runs a function until it is told to end."""

    def __init__(self, work: collections.abc.Callable[[], object]) -> None:
        self._ends, self._work = threading.Event(), work
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        self._begun.set()
        while not self._ends.is_set():
            self._work()

    def __enter__(self) -> Training:
        self._thread.start()
        self._begun.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()

    def ident(self) -> int:
        return self._thread.ident or 0


def holds_the_lock() -> int:
    return sum(number * number for number in range(50_000))


def releases_the_lock() -> None:
    time.sleep(0.002)


def alternates() -> None:
    holds_the_lock()
    releases_the_lock()


def holds_for_30_ms() -> None:
    until = time.perf_counter() + 0.03
    while time.perf_counter() < until:
        sum(range(200))


def sleeps_for_10_ms() -> None:
    time.sleep(0.01)


def dumps() -> None:
    json.dumps(list(range(20_000)), indent=1)


def rows_of(flight: FlightFile) -> list[tuple[int, str, str, int]]:
    """Return (phase, line, library function, samples) of each row."""
    names = {number: name for name, number in flight.names._ids.items()}
    taken = np.frombuffer(flight.ring(LINES.name).read_from(0).data, LINES.dtype)
    return [
        (int(row["phase"]), names.get(int(row["line_id"]), ""), names.get(int(row["library_id"]), ""), row["samples"])
        for row in taken
    ]


def sampled(flight: FlightFile, training: Training, samples: int = SAMPLES) -> list[tuple[int, str, str, int]]:
    sampler = LineSampler(flight, training.ident)
    for _ in range(samples):
        sampler.sample(time.sleep)

    sampler.flush()
    return rows_of(flight)


def test_code_that_holds_the_lock_is_seen(flight: FlightFile) -> None:
    """Blocks of some milliseconds that hold the GIL, between sleeps that release it."""
    with Training(alternates) as training:
        rows = sampled(flight, training)

    functions = collections.Counter[str]()
    for _, line, _, samples in rows:
        functions[line.rpartition(" ")[2].split(".")[0]] += samples

    assert functions["holds_the_lock"] >= 2
    assert functions["releases_the_lock"] >= 2
    assert sum(functions.values()) == SAMPLES
    assert all(line.startswith(__file__ + ":") for _, line, _, _ in rows)


def loops() -> None:
    rows = [[0.0] * 64 for _ in range(64)]
    for row in rows:
        for at in range(64):
            if row[at] > 1:
                row[at] = 0.0


def test_a_jump_in_a_loop_has_the_line_before_it(flight: FlightFile) -> None:
    """It has none of its own in Python 3.11: a third of the samples of nested loops were of libraries only."""
    with Training(loops) as training:
        rows = sampled(flight, training)

    places = [line.rpartition(" ")[0].rpartition(":")[2] for _, line, _, _ in rows]
    assert all(map(str.isdecimal, places)), places


def holds_for_300_us() -> None:
    until = time.perf_counter() + 0.0003
    while time.perf_counter() < until:
        pass


def test_short_blocks_are_seen_by_costly_samples(flight: FlightFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set computes for less than a millisecond between two calls that release the lock."""
    monkeypatch.setattr(line_sampler, "SHORT_S", LONGEST_S)

    def fetches() -> None:
        holds_for_300_us()
        torch.rand(1, 28, 28)

    seen = [0]

    def are_seen() -> bool:
        rows = sampled(flight, training, 200)
        seen.append(sum(samples for _, line, _, samples in rows if "holds_for_300_us" in line))
        return seen[-1] - seen[-2] >= 20

    # 85 % of them; a fifth on a host with four programs for each core, and 4 % if the lock is never asked for
    with Training(fetches) as training:
        assert any(are_seen() for _ in range(5)), seen


def waited_for_a_core_s() -> float:
    """Return how long this thread has been ready to run without a core."""
    path = Path("/proc/thread-self/schedstat")
    return int(path.read_text().split()[1]) / 1e9 if path.exists() else 0.0


@pytest.mark.long
def test_long_blocks_have_their_share(flight: FlightFile) -> None:
    """Blocks of 30 ms that hold the lock are seen as often as they run, also if a sleep is among them."""
    ran = collections.Counter[str]()

    def turns() -> None:
        for name, work in (("held", holds_for_30_ms), ("free", sleeps_for_10_ms)):
            began = time.monotonic()
            work()
            ran[name] += int((time.monotonic() - began) * 1e6)

    with Training(turns) as training:
        sampler = LineSampler(flight, training.ident, interval_s=0.1)
        began_s, waited_s = time.monotonic(), waited_for_a_core_s()
        for _ in range(120):
            time.sleep(max(0.0, sampler.due_s - time.monotonic()))
            sampler.sample(time.sleep)

        waited = (waited_for_a_core_s() - waited_s) / (time.monotonic() - began_s)
        sampler.close()
        sampler.flush()

    seen = collections.Counter[str]()
    for _, line, _, samples in rows_of(flight):
        seen[line.rpartition(" ")[2].split(".")[0]] += samples

    share = seen["holds_for_30_ms"] / (seen["holds_for_30_ms"] + seen["sleeps_for_10_ms"])
    # A sampler that waits for a core rather runs while the other thread sleeps.
    assert share == pytest.approx(ran["held"] / ran.total(), abs=0.2 + waited)


def test_an_iterators_code_is_a_wait_for_data(flight: FlightFile) -> None:
    """Where other code runs for an iterator that gives batches, the phase of the sample is that of waiting for data.

    It is watched as other code is: whether it computes decides what would make it faster.
    """
    with Training(releases_the_lock) as training:
        flight.open_slots[Slot.STEP_START] = 1
        sampler = LineSampler(flight, training.ident, gives_batches=lambda _stack: True)
        sampler.sample(time.sleep)
        flight.open_slots[Phase.FORWARD] = 2
        sampler.sample(time.sleep)
        sampler.flush()

    assert [row[0] for row in rows_of(flight)] == [Phase.INPUT_WAIT, Phase.FORWARD]
    assert (np.frombuffer(flight.ring(LINES.name).read_from(0).data, LINES.dtype)["watched_ns"] > 0).all()


class Weight:
    grad = 1.0


def updates() -> None:
    weight = Weight()
    for _ in range(20_000):
        weight.grad *= 0.5


@pytest.mark.parametrize(
    ("runs", "phase", "reported"),
    [(updates, None, ["updates"]), (updates, Phase.BACKWARD, []), (holds_the_lock, None, [])],
)
def test_code_that_reads_gradients_is_reported_once(
    flight: FlightFile, runs: Callable[[], object], phase: Phase | None, reported: list[str]
) -> None:
    """Of a training without an optimizer it may be the update; a hook in backward is none."""
    seen: list[str] = []
    with Training(runs) as training:
        flight.open_slots[Slot.STEP_START] = 1
        if phase is not None:
            flight.open_slots[phase] = 2

        sampler = LineSampler(flight, training.ident, on_gradients=lambda _file, function: seen.append(function))
        for _ in range(SAMPLES):
            sampler.sample(time.sleep)

        sampler.flush()

    assert sorted(set(seen)) == reported


@pytest.mark.parametrize(("phase", "counts_as"), [(Phase.FORWARD, LINE_OUTSIDE), (Phase.CHECKPOINT, Phase.CHECKPOINT)])
def test_evaluation_is_in_no_step(flight: FlightFile, phase: Phase, counts_as: int) -> None:
    """Its forward is not training's; what it saves is measured as saving."""
    with Training(releases_the_lock) as training:
        flight.open_slots[Slot.STEP_START] = 1
        sampler = LineSampler(flight, training.ident, is_evaluating=lambda: True)
        sampler.sample(time.sleep)
        flight.open_slots[phase] = 2
        sampler.sample(time.sleep)
        sampler.flush()

    assert {row[0] for row in rows_of(flight)} == {LINE_OUTSIDE, counts_as}
    watched = np.frombuffer(flight.ring(LINES.name).read_from(0).data, LINES.dtype)["watched_ns"]
    assert (watched > 0).all()  # whether it computes is known in an evaluation, too


@pytest.mark.parametrize("evaluates", [True, False])
@pytest.mark.parametrize(("may_be_done", "counts_as"), [(True, LINE_OUTSIDE), (False, Phase.INPUT_WAIT)])
def test_the_wait_for_the_first_batch_of_an_evaluation_is_its_own(
    flight: FlightFile, may_be_done: bool, counts_as: int, evaluates: bool
) -> None:
    """That it is one is known after that batch; the step may also go on, and wait for a batch of another loader."""
    evaluating: list[bool] = []
    with Training(releases_the_lock) as training:
        flight.open_slots[Slot.STEP_START], flight.open_slots[Phase.INPUT_WAIT] = 1, 2
        sampler = LineSampler(
            flight, training.ident, is_evaluating=lambda: bool(evaluating), may_be_done=lambda: may_be_done
        )
        sampler.sample(time.sleep)
        sampler.flush()
        evaluating += [True] * evaluates
        flight.ring("steps").append(*range(len(flight.ring("steps")._table.columns)))
        sampler.flush()

    assert {row[0] for row in rows_of(flight)} == {counts_as if evaluates else Phase.INPUT_WAIT}


def test_an_evaluation_that_is_over_has_its_first_wait(flight: FlightFile) -> None:
    """Its other batches may have come between two samples."""
    with Training(releases_the_lock) as training:
        flight.open_slots[Slot.STEP_START], flight.open_slots[Phase.INPUT_WAIT] = 1, 2
        sampler = LineSampler(flight, training.ident, may_be_done=lambda: True)
        sampler.sample(time.sleep)
        for name in ("evals", "steps"):
            flight.ring(name).append(*range(len(flight.ring(name)._table.columns)))

        sampler.flush()

    assert {row[0] for row in rows_of(flight)} == {LINE_OUTSIDE}


@pytest.mark.parametrize(("phase", "rows"), [(None, 0), (Phase.BACKWARD, 1)])
def test_a_hook_between_phases_is_no_sample(flight: FlightFile, phase: Phase | None, rows: int) -> None:
    """The line that it interrupted does nothing then; in a phase, it may have been seen late."""
    runs: list[bool] = []
    ends: list[bool] = []
    hook = compile("runs.append(True)\nwhile not ends: pass", f"{PACKAGE_FOLDERS[0]}instrument/some_hook.py", "exec")
    flight.open_slots[Slot.STEP_START] = 1
    if phase is not None:
        flight.open_slots[phase] = 2

    with Training(lambda: exec(hook, {"runs": runs, "ends": ends})) as training:
        eventually(lambda: bool(runs), "the hook to run")
        taken = sampled(flight, training, samples=3)
        ends.append(True)

    assert len({row[1] for row in taken}) == rows


def test_library_frames_are_skipped_and_reported(flight: FlightFile) -> None:
    """The line is the user's; the library's function is beside it."""
    with Training(dumps) as training:
        rows = sampled(flight, training)

    line = dumps.__code__.co_firstlineno + 1
    of_line = [row for row in rows if row[1] == f"{__file__}:{line} dumps"]
    assert sum(row[3] for row in of_line) >= SAMPLES // 2
    assert any("json/encoder.py" in row[2] for row in of_line)


async def requests() -> None:
    await asyncio.sleep(0.01)


async def trains() -> None:
    await requests()


async def trains_beside_another() -> None:
    await asyncio.gather(requests(), requests())


@pytest.mark.parametrize(
    ("training_of", "suspended"), [(trains, requests), (trains_beside_another, trains_beside_another)]
)
def test_a_coroutine_that_is_awaited_has_its_line(flight: FlightFile, training_of: Any, suspended: Any) -> None:
    """Only the event loop is on the stack then; the line of `asyncio.run()` is that of all that is awaited.

    Which of several tasks the training needs is not known.
    """
    with Training(lambda: asyncio.run(training_of())) as training:
        rows = sampled(flight, training)

    line = suspended.__code__.co_firstlineno + 1
    of_line = [row for row in rows if row[1] == f"{__file__}:{line} {suspended.__name__}"]
    assert sum(row[3] for row in of_line) >= SAMPLES // 2
    assert any(row[2].endswith(" EpollSelector.select") for row in of_line)


def waits_for_a_pipe() -> None:
    with selectors.DefaultSelector() as selector:
        selector.select(0.01)


def test_a_selector_without_an_event_loop_has_its_own_line(flight: FlightFile) -> None:
    """As in `subprocess.run()`, or in the script's own code."""
    with Training(waits_for_a_pipe) as training:
        rows = sampled(flight, training)

    assert sum(row[3] for row in rows if row[1].endswith(" waits_for_a_pipe")) >= SAMPLES // 2


def test_a_generator_that_yields_meanwhile_has_its_caller(
    flight: FlightFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training goes on while a sample is counted, as on busy cores: the line that called a library's generator."""
    packages = tmp_path / "site-packages"
    packages.mkdir()
    monkeypatch.syspath_prepend(str(packages))
    body = "def items():\n    while True:\n        sum(range(100_000))\n        yield\n"
    (packages / "library_of_items.py").write_text(body)
    items = importlib.import_module("library_of_items").items()

    def takes() -> None:
        next(items)
        time.sleep(0.01)

    def read_late(_thread: int) -> int:
        time.sleep(0.005)
        return 0

    monkeypatch.setattr(line_sampler, "thread_cpu_ns", read_late)
    with Training(takes) as training:
        rows = sampled(flight, training)

    assert {row[1].rpartition(".")[2] for row in rows} == {"takes"}


@pytest.mark.parametrize(
    ("qualname", "function"),
    [
        ("stats.<locals>.<listcomp>.<genexpr>", "stats"),
        ("features.<locals>.<lambda>", "features"),
        ("Metric.update.<locals>.<lambda>.<locals>.<dictcomp>", "Metric.update"),
        ("Model.<lambda>", "Model"),
        ("<setcomp>.<genexpr>", "<module>"),
        ("<lambda>", "<module>"),
        ("main.<locals>.step", "main.<locals>.step"),
    ],
)
def test_an_expression_is_of_the_function_around_it(flight: FlightFile, qualname: str, function: str) -> None:
    """Else what a function does in a comprehension or a lambda is not counted as its own."""
    work = releases_the_lock.__code__.replace(co_qualname=qualname)

    with Training(lambda: exec(work)) as training:
        rows = sampled(flight, training, samples=10)

    assert {row[1].rpartition(" ")[2] for row in rows} >= {function}


def imports() -> None:
    sys.modules.pop("slow_module", None)
    __import__("slow_module")


def test_an_import_is_reported_as_such(flight: FlightFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the function that the module runs meanwhile; the line is that of the import."""
    packages = tmp_path / "site-packages"
    packages.mkdir()
    monkeypatch.syspath_prepend(str(packages))
    (packages / "slow_module.py").write_text("total = sum(number * number for number in range(300_000))")
    with Training(imports) as training:
        rows = sampled(flight, training)

    line = imports.__code__.co_firstlineno + 2
    of_line = [row for row in rows if row[1] == f"{__file__}:{line} imports"]
    told = [row for row in of_line if row[2].startswith(f"{IMPORTING}:")]
    assert sum(row[3] for row in told) >= SAMPLES // 2
    assert all("slow_module" not in row[2] for row in of_line)


def test_nothing_is_asked_of_the_import_system(
    flight: FlightFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five of six frames of an import are its own: a sample of a deep one would take four times as long."""
    (tmp_path / "slow_module.py").write_text("total = sum(number * number for number in range(300_000))")
    monkeypatch.syspath_prepend(str(tmp_path))
    asked = set()

    class Asked(UserCode):
        def contains(self, frame: FrameType) -> bool:
            asked.add(frame.f_code.co_filename)
            return False

    with Training(imports) as training:
        sampler = LineSampler(flight, training.ident, Asked())
        for _ in range(SAMPLES):
            sampler.sample(time.sleep)

        sampler.close()

    assert str(tmp_path / "slow_module.py") in asked
    assert not [path for path in asked if path.startswith("<frozen importlib")]


@pytest.mark.parametrize(
    ("slots", "phase"),
    [
        ({}, LINE_STARTUP),
        ({Slot.STEP_START: 5, Slot.STEP: 0}, LINE_OTHER),
        ({Slot.STEP_START: 5, Slot.STEP: 0, Slot.EXIT_START: 6}, LINE_STARTUP),
        ({Slot.STEP_START: 5, Slot.STEP: 0, Phase.FORWARD: 6}, Phase.FORWARD),
        ({Slot.STEP_START: 5, Slot.STEP: 0, Phase.OPTIMIZER: 6, Phase.FORWARD: 7}, Phase.FORWARD),  # LBFGS
    ],
)
def test_the_innermost_open_phase_counts(flight: FlightFile, slots: dict[int, int], phase: int) -> None:
    """Startup before the first step; other code in a step without an open phase, until the process ends."""
    for slot, value in slots.items():
        flight.open_slots[slot] = value

    with Training(releases_the_lock) as training:
        rows = sampled(flight, training, samples=2)

    assert {row[0] for row in rows} == {phase}


def test_between_steps_is_not_startup(flight: FlightFile) -> None:
    """Once a step was recorded."""
    flight.ring("steps").append(*range(len(flight.ring("steps")._table.columns)))

    with Training(releases_the_lock) as training:
        assert {row[0] for row in sampled(flight, training, samples=2)} == {LINE_OUTSIDE}


def test_samples_since_the_end_of_the_last_step_have_a_later_time(flight: FlightFile) -> None:
    """The next step may never end: a rank that hangs is sampled, too."""
    with Training(releases_the_lock) as training:
        sampler = LineSampler(flight, training.ident)
        sampler.sample(time.sleep)
        flight.ring("steps").append(*range(len(flight.ring("steps")._table.columns)))
        ended_ns = monotonic_ns()
        for _ in range(3):
            sampler.sample(time.sleep)

        sampler.flush()

    rows, seen = np.frombuffer(flight.ring(LINES.name).read_from(0).data, LINES.dtype), collections.Counter[int]()
    for row in rows:
        seen[int(row["t_ns"])] += int(row["samples"])

    (before_ns, before), (since_ns, since) = sorted(seen.items())
    assert (before, since) == (1, 3)
    assert before_ns <= ended_ns < since_ns


def test_rows_have_the_time_of_their_samples_and_not_of_a_late_flush(flight: FlightFile) -> None:
    """An interpreter that waits at its prompt has no stack: what was seen in the last step before is not after it."""
    with Training(releases_the_lock) as training:
        sampler = LineSampler(flight, training.ident)
        sampler.sample(time.sleep)
        flight.ring("steps").append(*range(len(flight.ring("steps")._table.columns)))
        ended_ns = monotonic_ns()

    sampler.flush()

    (row,) = np.frombuffer(flight.ring(LINES.name).read_from(0).data, LINES.dtype)
    assert row["t_ns"] <= ended_ns


def test_start_up_and_training_have_first_samples_of_their_own(
    flight: FlightFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long start-up leaves the training its samples, which come more often."""
    monkeypatch.setattr("traceml.recorder.lines.line_sampler.PACES", ((1, 8), (2, 3)))
    paces = []
    with Training(releases_the_lock) as training:
        sampler = LineSampler(flight, training.ident)
        for at in range(6):
            paces.append(sampler.pace)
            if at == 3:
                flight.ring("steps").append(*range(len(flight.ring("steps")._table.columns)))

            sampler.sample(time.sleep)

    assert [*paces, sampler.pace] == [8, 3, 1, 1, 3, 1, 1]


@pytest.mark.parametrize("paces", [((4, 2),), ((4, 3), (100, 2))])
def test_every_other_late_sample_is_without_the_second_sleep(
    flight: FlightFile, monkeypatch: pytest.MonkeyPatch, paces: tuple[tuple[int, int], ...]
) -> None:
    """It has a line, and no CPU time. The first ones have both, at the pace at which there are few."""
    monkeypatch.setattr("traceml.recorder.lines.line_sampler.PACES", paces)
    monkeypatch.setattr(OtherThreads, "are_busy", False)  # threads that other tests have left may be
    sleeps, slept = [], []

    def sleep(seconds: float) -> None:
        sleeps.append(seconds)
        time.sleep(seconds)

    with Training(releases_the_lock) as training:
        sampler = LineSampler(flight, training.ident)
        for _ in range(8):
            before = len(sleeps)
            sampler.sample(sleep)
            slept.append(len(sleeps) - before)

        sampler.close()

    assert slept == [1, 1, 1, 1, 1, 0, 1, 0]
    assert sampler.samples == 8


def test_samples_come_at_random_times(flight: FlightFile) -> None:
    """Samples at regular times would meet steps of the same period in the same place."""
    sampler = LineSampler(flight, lambda: 0, interval_s=100.0)
    sampler.samples = 10**6
    times = [sampler.due_s]
    for _ in range(200):
        sampler.sample(lambda _seconds: None)
        times.append(sampler.due_s)

    gaps = np.diff(times)
    assert 50 <= gaps.min() < 55
    assert 145 < gaps.max() <= 150.01


def test_samples_that_were_taken_before_a_stop_are_appended(flight: FlightFile) -> None:
    """None is due any more, and those taken are not lost."""
    with Training(releases_the_lock) as training:
        sampler = LineSampler(flight, training.ident)
        sampler.sample(time.sleep)

        sampler.stop()

    assert sampler.due_s == math.inf
    sampler.flush()
    assert sum(row[3] for row in rows_of(flight)) == 1


def test_counts_are_appended_once(flight: FlightFile) -> None:
    """A flush takes the samples since the last one."""
    with Training(releases_the_lock) as training:
        sampler = LineSampler(flight, training.ident)
        for samples in (3, 2):
            for _ in range(samples):
                sampler.sample(time.sleep)

            sampler.flush()

    sampler.flush()
    assert sum(row[3] for row in rows_of(flight)) == 5 == sampler.samples


@pytest.fixture(autouse=True)
def usual() -> Iterator[float]:
    """The switch interval, which is the same afterwards."""
    interval = sys.getswitchinterval()
    yield interval
    switch_interval.restore()
    sys.setswitchinterval(interval)


def test_the_switch_interval_stays_short_between_samples(flight: FlightFile, usual: float) -> None:
    """So that the next sample does not begin where the lock is released; at the end it is restored."""
    with Training(releases_the_lock) as training:
        sampler = LineSampler(flight, training.ident)
        sampler.sample(time.sleep)
        between = sys.getswitchinterval()
        sampler.close()

    assert between < usual / 10
    assert sys.getswitchinterval() == usual


def computes_for(seconds: float) -> None:
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def test_costly_samples_take_the_lock_less_eagerly(flight: FlightFile) -> None:
    """A thread that wants the lock wakes once in a switch interval: on busy hosts that is often."""
    sampler = LineSampler(flight, lambda: 0, interval_s=1.0)
    intervals = []
    for cost_s, samples in ((0.01, 40), (0.0, 120)):
        for _ in range(samples):
            sampler.sample(lambda _seconds, cost_s=cost_s: computes_for(cost_s))

        intervals.append(sys.getswitchinterval())

    sampler.close()
    assert intervals == [pytest.approx(LONGEST_S), pytest.approx(SHORT_S)]


def test_costly_samples_come_less_often(flight: FlightFile) -> None:
    """After the first ones, three times: a sample of 2 ms is then 0.7 % of a core and not 2 %."""
    sampler = LineSampler(flight, lambda: 0, interval_s=0.1)
    sampler.samples = 10**6
    for _ in range(40):
        sampler.sample(lambda _seconds: computes_for(0.002))

    assert sampler._next_s() == pytest.approx(0.3)


def test_threads_that_compute_have_the_usual_switch_interval(flight: FlightFile, usual: float) -> None:
    """With a short one they would take the lock from each other all the time."""
    with Training(holds_the_lock) as training, Training(holds_the_lock):
        sampler = LineSampler(flight, training.ident)
        intervals = []
        while usual not in intervals and len(intervals) < 1000:  # the other thread may wait for a core of a busy host
            sampler.sample(time.sleep)
            intervals.append(sys.getswitchinterval())

    assert intervals[-1] == usual


@pytest.mark.parametrize("began", [0, 1], ids=["start-up", "training"])
def test_threads_that_compute_are_seen_in_training(flight: FlightFile, began: int) -> None:
    """The busiest one has its line, with the time that all of them computed."""
    flight.open_slots[Slot.STEP_START] = began
    with Training(releases_the_lock) as training, Training(holds_the_lock):
        sampler = LineSampler(flight, training.ident)
        for _ in range(20_000):  # the threads may wait for a core of a busy host
            sampler.sample(time.sleep)
            if sampler._others.are_busy:
                break

        sampler.flush()

    rows = np.frombuffer(flight.ring(LINES.name).read_from(0).data, LINES.dtype)
    seen = rows[rows["phase"] == LINE_THREADS]
    assert len(seen) == began
    for line_id, passed_ns, cpu_ns in seen[["line_id", "watched_ns", "cpu_ns"]].tolist():
        names = {number: name for name, number in flight.names._ids.items()}
        assert names[line_id].split()[1] in ("holds_the_lock", "Training._run")
        assert 0 < cpu_ns <= 1.5 * passed_ns  # other tests may have left threads


def test_the_sampling_thread_waits_precisely(flight: FlightFile) -> None:
    """Other threads keep their timer slack."""
    slack = Path("/proc/self/timerslack_ns")
    before = slack.read_text()

    def samples() -> None:
        LineSampler(flight, lambda: 0).sample(time.sleep)
        found.append(int(Path(f"/proc/{threading.get_native_id()}/timerslack_ns").read_text()))

    found: list[int] = []
    thread = threading.Thread(target=samples)
    thread.start()
    thread.join()

    assert found == [1000]
    assert slack.read_text() == before


@pytest.mark.process
def test_a_forked_child_has_the_usual_switch_interval(flight: FlightFile, usual: float) -> None:
    """A worker of a DataLoader has threads of its own."""
    with Training(releases_the_lock) as training:
        sampler = LineSampler(flight, training.ident)
        sampler.sample(time.sleep)
        child = os.fork()
        if child == 0:
            os._exit(0 if sys.getswitchinterval() == usual else 1)

        sampler.close()

    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_the_switch_interval_of_the_script_stays(flight: FlightFile, usual: float) -> None:
    """It is restored after an error; one that the script sets during a sample stays."""
    sampler = LineSampler(flight, lambda: 0)

    def fails(_seconds: float) -> None:
        raise OSError("the sleep failed")

    with pytest.raises(OSError, match="the sleep"):
        sampler.sample(fails)

    assert sys.getswitchinterval() == usual
    sampler.sample(lambda _seconds: sys.setswitchinterval(0.001))
    sampler.close()
    assert sys.getswitchinterval() == pytest.approx(0.001)


def test_a_thread_that_is_gone_is_no_sample(flight: FlightFile) -> None:
    """The training thread may have ended."""
    sampler = LineSampler(flight, lambda: 0)

    sampler.sample(time.sleep)
    sampler.flush()

    assert (sampler.samples, rows_of(flight)) == (0, [])


@pytest.mark.parametrize(("work", "computes"), [(holds_the_lock, True), (lambda: time.sleep(1), False)])
def test_cpu_time_tells_computing_from_waiting(
    flight: FlightFile, work: collections.abc.Callable[[], object], *, computes: bool
) -> None:
    """While one phase stays open, the training thread's CPU time in it is counted, and no other time."""
    flight.open_slots[Slot.STEP_START], flight.open_slots[Phase.INPUT_WAIT] = 1, 2

    def rows() -> np.ndarray[Any, Any]:
        return np.frombuffer(flight.ring(LINES.name).read_from(0).data, LINES.dtype)

    def has_computed() -> bool:
        sampled(flight, training, 10)
        return bool(rows()["cpu_ns"].any())

    with Training(work) as training:
        sampled(flight, training, 10)
        if computes:
            eventually(has_computed)  # a busy machine may give it no core during some samples

        used_ns = time.clock_gettime_ns(time.pthread_getcpuclockid(training.ident()))

    assert rows()["watched_ns"].sum() > 10 * 2_000_000
    assert rows()["cpu_ns"].sum() <= used_ns


class Pooled(torch.utils.data.Dataset[int]):
    """Samples that threads of a library make, for which the training thread waits."""

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> int:
        time.sleep(0.2)
        return index


@pytest.fixture
def library_thread() -> Iterator[None]:
    """A thread that computes, and that Python's `threading` does not know."""
    ends, ended = threading.Event(), threading.Lock()

    def compute() -> None:
        with ended:
            begun.set()
            while not ends.is_set():
                hashlib.sha256(bytes(1 << 20)).digest()  # without the lock

    begun = threading.Event()
    _thread.start_new_thread(compute, ())
    begun.wait()
    yield
    ends.set()
    ended.acquire()


@pytest.mark.usefixtures("library_thread")
@pytest.mark.parametrize("makes_batches", [True, False])
def test_threads_of_a_library_compute_for_the_batch_that_waits_for_them(
    flight: FlightFile, *, makes_batches: bool
) -> None:
    """Tokenizers, Arrow and decoders have pools of their own; beside other waits they work for somebody else."""
    flight.open_slots[Slot.STEP_START], flight.open_slots[Phase.INPUT_WAIT] = 1, 2
    batches = itertools.cycle(torch.utils.data.DataLoader(Pooled()))

    def exceeds_the_thread() -> bool:
        sampled(flight, training, 10)
        counted = np.frombuffer(flight.ring(LINES.name).read_from(0).data, LINES.dtype)["cpu_ns"].sum()
        return bool(counted > time.clock_gettime_ns(time.pthread_getcpuclockid(training.ident())))

    with Training((lambda: next(batches)) if makes_batches else (lambda: time.sleep(0.2))) as training:
        if makes_batches:
            eventually(exceeds_the_thread)
        else:
            assert not exceeds_the_thread()


def test_a_phase_that_ends_meanwhile_is_not_watched(flight: FlightFile) -> None:
    """The time would be that of two phases."""
    flight.open_slots[Slot.STEP_START] = flight.open_slots[Phase.INPUT_WAIT] = 1
    with Training(releases_the_lock) as training:
        sampler = LineSampler(flight, training.ident)

        def next_phase(_seconds: float) -> None:
            flight.open_slots[Phase.INPUT_WAIT] += 1

        sampler.sample(next_phase)
        sampler.flush()

    rows = np.frombuffer(flight.ring(LINES.name).read_from(0).data, LINES.dtype)
    assert (int(rows["samples"].sum()), int(rows["watched_ns"].sum())) == (1, 0)


def test_the_last_line_is_left_for_others(flight: FlightFile) -> None:
    """Without a flush: a process that is killed has no time for one."""
    flight.open_slots[Slot.STEP_START] = 1
    with Training(releases_the_lock) as training:
        LineSampler(flight, training.ident).sample(time.sleep)

    assert flight.path is not None
    image = FlightSnapshot(flight.path, flight.path.read_bytes())
    names = {row["id"]: row["name"] for row in image.log_rows("names")}
    assert "releases_the_lock" in names[image.line_id]
