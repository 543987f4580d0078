"""Dates that nothing sets."""

from __future__ import annotations

import ast
import time
from typing import Any

import pytest

from tests.source_tree import SOURCE, nodes_of, source_files
from traceml import clock as clock_module
from traceml.clock import SteadyClock, boot_id, clock_pair, monotonic_ns, own_time


@pytest.mark.parametrize("is_always_busy", [False, True])
def test_a_thread_that_loses_its_core_between_two_clocks_reads_again(
    monkeypatch: pytest.MonkeyPatch, is_always_busy: bool
) -> None:
    """Else all dates of a rank, and its clock against those of other hosts, are seconds off; the best pair counts."""
    now_ns, pauses_s = [0], [3, 2, *[2 if is_always_busy else 0] * 100]

    def monotonic() -> int:
        return now_ns[0]

    def wall() -> int:
        now_ns[0] += pauses_s.pop(0) * 10**9
        return 10**18 + now_ns[0]

    monkeypatch.setattr(clock_module, "monotonic_ns", monotonic)
    monkeypatch.setattr(own_time, "time_ns", wall)
    mono_ns, epoch_ns = clock_pair()

    assert (epoch_ns - 10**18) - mono_ns == (10**9 if is_always_busy else 0)


def test_a_steady_clock_goes_on_when_the_wall_clock_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SteadyClock.start()
    before = clock.now_s()
    monkeypatch.setattr(own_time, "time", lambda: 0.0)

    assert 0 <= clock.now_s() - before < 60
    assert clock.epoch_s(clock.mono_ns + 5 * 10**9) == pytest.approx(clock.epoch_ns / 1e9 + 5)


def test_the_clock_of_the_recorder_is_not_replaced_with_that_of_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    """freezegun replaces each reference to a function of `time`, in all modules: stamps of C and Python differed."""
    fakes = {id(getattr(time, name)): name for name in ("time", "monotonic", "perf_counter_ns", "time_ns", "sleep")}
    replaced = [name for name, value in {**vars(clock_module), **vars(own_time)}.items() if id(value) in fakes]
    monkeypatch.setattr(time, "perf_counter_ns", lambda: 0)

    assert replaced == []
    assert monotonic_ns() > 0


def test_no_module_reads_the_scripts_clock_in_the_scripts_process() -> None:
    """A frozen `time.monotonic` ended no wait for an aggregator; by a wrong `time.time` flight files were removed."""
    rooms = ("recorder/", "samplers/", "instrument/", "track/rank/", "session/", "launch/worker/", "database/flight/")
    found = {
        name
        for path in source_files()
        if (name := path.relative_to(SOURCE).as_posix()).startswith(rooms)
        for node in nodes_of(path, ast.Import, ast.ImportFrom)
        if "time" in (getattr(node, "module", ""), node.names[0].name)
    }

    # The ends of torch's compilations are dates of the script's clock; the other one runs in a process of its own.
    assert found == {"recorder/pauses/pause_recorder.py", "track/rank/collectors/collector_main.py"}


def test_after_another_boot_the_wall_clock_goes_on() -> None:
    """It is never before the start."""
    past = SteadyClock(monotonic_ns(), int(1e18), "another boot")
    future = SteadyClock(monotonic_ns(), int(4e18), "another boot")

    assert past.now_s() == pytest.approx(time.time(), abs=60)
    assert future.now_s() == 4e9


@pytest.mark.parametrize("facts", [None, [], [1, 2], ["a", "b", "c"], 7])
def test_facts_of_another_form_are_no_clock(facts: Any) -> None:
    assert SteadyClock.from_facts(facts) is None


def test_a_clock_is_restored_from_its_facts() -> None:
    clock = SteadyClock.start()
    assert clock.boot == boot_id()
    assert SteadyClock.from_facts(clock.facts) == clock
