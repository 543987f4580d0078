"""CPU time of threads that are not Python's."""

from __future__ import annotations

from traceml.inspection.process_times import ProcessTimes


def test_time_of_python_threads_is_not_that_of_libraries() -> None:
    """A thread may start and end between two readings: what it used while it was not seen stays."""
    before = ProcessTimes(process_ns=1000, threads_ns={1: 400, 2: 100})
    after = ProcessTimes(process_ns=1900, threads_ns={1: 600, 3: 50})

    assert after.of_libraries_since(before) == 900 - 200 - 50


def test_readings_a_moment_apart_are_never_negative() -> None:
    """The clocks are read one after another."""
    before = ProcessTimes(process_ns=1000, threads_ns={1: 400})

    assert ProcessTimes(process_ns=1100, threads_ns={1: 501}).of_libraries_since(before) == 0


def test_this_thread_is_one_of_them() -> None:
    """All of its time is Python's."""
    seen = ProcessTimes.read()

    assert 0 < max(seen.threads_ns.values()) <= ProcessTimes.read().process_ns
