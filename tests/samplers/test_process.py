"""Process samples, compared with psutil and resource."""

from __future__ import annotations

import resource
import threading
import time

import psutil

from tests.eventually import eventually
from traceml.database.schema import PROCESS
from traceml.samplers.process import ProcessSampler


def sample() -> dict[str, float]:
    """Return one sample as a dict by column."""
    sampler = ProcessSampler()
    (row,) = sampler.sample(5, 7)
    sampler.close()
    assert len(row) == len(PROCESS.columns)
    return dict(zip((column.name for column in PROCESS.columns), row, strict=True))


def test_figures_are_those_of_the_system() -> None:
    """Memory, CPU time, switches and faults agree with psutil and resource."""
    process = psutil.Process()
    threads = process.num_threads()
    before = resource.getrusage(resource.RUSAGE_SELF)
    row = sample()
    after = resource.getrusage(resource.RUSAGE_SELF)

    assert (row["t_ns"], row["step"]) == (5, 7)
    assert abs(row["rss_bytes"] - process.memory_info().rss) < 8 << 20
    assert process.num_threads() <= row["threads"] <= threads  # those that other tests have left may end
    cpu_ns = sum(process.cpu_times()[:2]) * 1e9
    assert abs(row["cpu_ns"] - cpu_ns) < 0.5e9
    for column, field in (
        ("voluntary_switches", "ru_nvcsw"),
        ("involuntary_switches", "ru_nivcsw"),
        ("minor_faults", "ru_minflt"),
        ("major_faults", "ru_majflt"),
    ):
        assert getattr(before, field) <= row[column] <= getattr(after, field)


def test_threads_are_counted() -> None:
    """A new thread adds one to the sample."""

    def added() -> float:
        before = sample()["threads"]
        stop = threading.Event()
        thread = threading.Thread(target=stop.wait)
        thread.start()

        during = sample()["threads"]
        stop.set()
        thread.join()
        return during - before

    eventually(lambda: added() == 1, "the threads that other tests have left to end")


def test_the_main_thread_ran() -> None:
    """The main thread's time on a core is part of the process's CPU time."""
    row = sample()

    assert 0 < row["main_run_ns"] <= row["cpu_ns"] + 1e9
    assert row["main_wait_ns"] >= 0


def test_memory_growth_is_seen() -> None:
    """64 MiB of written memory are resident."""
    before = sample()["rss_bytes"]
    ballast = bytearray(b"\x01") * (64 << 20)

    grown = sample()["rss_bytes"] - before

    assert len(ballast) == 64 << 20
    assert 56 << 20 < grown < 80 << 20


def test_the_figures_are_those_of_the_thread_that_trains() -> None:
    """A script trains in a thread of a pool while the main thread waits for its result; the thread ends before it."""
    computes, ends, started = threading.Event(), threading.Event(), threading.Event()

    def train() -> None:
        started.set()
        computes.wait()
        until = time.thread_time() + 0.2
        while time.thread_time() < until:
            pass

        ends.wait()

    thread, trains = threading.Thread(target=train), threading.main_thread()
    sampler = ProcessSampler(lambda: trains.ident)
    ran_ns = [_main_run_ns(sampler)]
    thread.start()
    started.wait()
    trains = thread
    ran_ns.append(_main_run_ns(sampler))
    computes.set()
    until = time.monotonic() + 60
    while (last := _main_run_ns(sampler)) < ran_ns[-1] + 2e8 and time.monotonic() < until:
        time.sleep(0.01)

    ends.set()
    thread.join()
    ran_ns += [last, _main_run_ns(sampler)]
    sampler.close()

    assert 2e8 <= ran_ns[2] - ran_ns[1] < 4e8
    assert 0 <= ran_ns[1] - ran_ns[0] < 1e8, "it goes on from there"
    assert 0 <= ran_ns[3] - ran_ns[2] < 1e8, "an ended thread has run as long as it had"


def _main_run_ns(sampler: ProcessSampler) -> int:
    return sampler.sample(5, 7)[0][9]
