"""Samples of real worker processes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from itertools import count

import numpy as np
import pytest

from tests.eventually import eventually
from traceml.database.schema import LOADER_WORKERS
from traceml.inspection.kernel_state import process_info
from traceml.samplers import worker_sampler
from traceml.samplers.worker_sampler import EAGER, EARLY_PARTS, MEMORY_SHARE, LoaderWorkersSampler

pytestmark = pytest.mark.process
SECOND = 10**9


def spin(queue) -> None:
    """Compute until told to end."""
    while queue.empty():
        sum(range(10_000))


@pytest.fixture(params=["fork", "forkserver"])
def worker(request: pytest.FixtureRequest) -> Iterator[multiprocessing.Process]:
    context = multiprocessing.get_context(request.param)
    queue = context.Queue()
    process = context.Process(target=spin, args=(queue,), daemon=True)
    process.start()
    yield process
    process.kill()
    process.join()


def sampled(sampler: LoaderWorkersSampler, t_ns: int) -> list[dict[str, float]]:
    return [dict(zip(LOADER_WORKERS.names, row, strict=True)) for row in sampler.sample(t_ns, 5)]


def test_a_worker_is_seen_with_its_cpu_time_cores_and_memory(worker):
    """CPU time grows; memory follows one sample later, as it is read after the row."""
    sampler = LoaderWorkersSampler(lambda: [(3, (worker.pid,))])
    os.sched_setaffinity(worker.pid, {min(os.sched_getaffinity(0))})
    (first,) = sampled(sampler, 0)
    rows = (sampled(sampler, t * SECOND)[0] for t in count(1000, 1000))
    eventually(lambda: next(rows)["cpu_ns"] > first["cpu_ns"])
    last = next(row for row in rows if row["private_bytes"] > 0)

    assert (first["loader"], first["pid"], first["workers"], first["step"]) == (3, worker.pid, 1, 5)
    assert first["private_bytes"] == first["anonymous_bytes"] == -1
    assert last["cores"] == 1
    assert 0 < last["private_bytes"] <= last["anonymous_bytes"] + (64 << 20)


def test_the_budget_bounds_how_often_workers_are_read(worker):
    """Right after a sample the next is left out."""
    sampler = LoaderWorkersSampler(lambda: [(0, (worker.pid,))])

    assert len(sampled(sampler, SECOND)) == 1
    assert sampled(sampler, SECOND + 1) == []
    assert len(sampled(sampler, 100 * SECOND)) == 1


def test_memory_is_read_often_at_first(worker, monkeypatch):
    """A run of any length has enough readings to judge; later, each of 100 ms allows none for 50 s."""
    clock_ns = 0
    read = worker_sampler._memory

    def slow(pid: int):
        nonlocal clock_ns
        clock_ns += SECOND // 10
        return read(pid)

    monkeypatch.setattr(worker_sampler, "_memory", slow)
    monkeypatch.setattr(worker_sampler.time, "thread_time_ns", lambda: clock_ns)
    sampler = LoaderWorkersSampler(lambda: [(0, (worker.pid,))])
    rows = [row for second in range(700) for row in sampled(sampler, second * SECOND)]

    usual_s = 0.1 / MEMORY_SHARE
    read_at = np.array([row["t_ns"] for row in rows if row["private_bytes"] >= 0]) / SECOND - 1
    assert np.diff(read_at).min() >= usual_s / EAGER
    assert np.diff(read_at[read_at > EARLY_PARTS * usual_s]) == pytest.approx(usual_s, abs=2)
    for run_s in (60, 120, 240):
        assert np.count_nonzero((read_at >= run_s / 4) & (read_at < run_s)) >= 9


def test_fast_growth_is_seen_between_readings(worker, monkeypatch):
    """A worker that grew to 4 GiB in a minute had 14 readings, 24 s apart, and was no leak."""
    resident = iter([100 << 20, 101 << 20, 110 << 20, 140 << 20])
    monkeypatch.setattr(worker_sampler, "_memory", lambda pid: worker_sampler._WorkerMemory(50, 60, next(resident)))
    monkeypatch.setattr(worker_sampler, "_resident_bytes", lambda pid: next(resident))
    monkeypatch.setattr(worker_sampler._Budget, "allows", lambda budget, t_ns: budget is sampler._state or t_ns == 0)
    sampler = LoaderWorkersSampler(lambda: [(0, (worker.pid,))])
    rows = [sampled(sampler, second * SECOND)[0] for second in range(4)]

    assert [row["private_bytes"] for row in rows] == [-1, 50 + (1 << 20), -1, 50 + (40 << 20)]
    assert rows[3]["anonymous_bytes"] == 60 + (40 << 20)


def test_other_processes_and_ended_ones_are_no_workers(worker):
    """A number that was given to another process, a zombie, and none at all."""
    groups = [(0, (os.getppid(),))]
    sampler = LoaderWorkersSampler(lambda: groups)
    assert sampled(sampler, SECOND) == []

    groups[:] = [(0, (worker.pid,))]
    os.kill(worker.pid, 9)
    eventually(lambda: not (info := process_info(worker.pid)) or info.state == "Z")
    assert sampled(sampler, 1000 * SECOND) == []

    groups.clear()
    assert sampled(sampler, 2000 * SECOND) == []
