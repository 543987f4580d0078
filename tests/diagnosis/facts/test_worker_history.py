"""Shares of time of loader workers, and copies of shared memory."""

from __future__ import annotations

import numpy as np
import pytest

from tests.diagnosis.facts.watched_workers import watched, worker_rows
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.sampled_lines import MAX_LOADERS
from traceml.diagnosis.facts.trainings.models_and_loaders import LoaderFacts
from traceml.diagnosis.facts.worker_history import WorkerHistory

MB = 1 << 20


def test_shares_are_those_of_one_worker():
    """Two of ten seconds each, and three in which there was no core."""
    use = watched(3, busy=0.2, waited=0.3, cores=2).use()

    assert use is not None
    assert (use.busy, use.waited, use.workers, use.cores) == (pytest.approx(0.2), pytest.approx(0.3), 3, 2)
    assert use.ready == pytest.approx(0.5)


def test_workers_that_start_again_and_start_up_do_not_count():
    """CPU time of other processes, and that before the first step, is no part of the sums."""
    history = WorkerHistory()
    early = worker_rows(2, busy=0.9)
    early["step"] = 0
    history.add(0, early)
    for epoch in range(1, 4):
        history.add(0, worker_rows(2, busy=0.5, pid=100 + epoch, start=60 * epoch))

    use = history.use()

    assert use is not None
    assert use.busy == pytest.approx(0.5)


@pytest.mark.parametrize("at_once", [True, False])
def test_the_time_in_which_a_job_hangs_does_not_count(*, at_once: bool) -> None:
    """Its workers are idle then, or one of them is what it waits for. Once the step ends it counts."""
    rows = worker_rows(2, busy=0.5)
    rows["step"][20:], rows["cpu_ns"][20:] = rows["step"][20], rows["cpu_ns"][20]
    history = WorkerHistory()
    for some in [rows] if at_once else np.split(rows, 6):
        history.add(0, some)

    hung = history.use()
    later = rows[-1:].copy()
    later["t_ns"] += 10**9
    later["step"] += 1
    history.add(0, later)
    ended = history.use()

    assert hung is not None
    assert ended is not None
    assert hung.busy == pytest.approx(0.5)
    assert ended.busy == pytest.approx(0.5 * 19 / 59)  # the first second is before the first step


def two_loaders() -> WorkerHistory:
    """Return the history of an idle loader 1, and a busy loader 0."""
    history = WorkerHistory()
    rows = [worker_rows(2, busy=busy) for busy in (0.01, 0.8)]
    rows[0]["loader"], rows[1]["loader"] = 1, 0
    history.add(0, np.concatenate(rows)[np.argsort(np.tile(np.arange(60), 2), kind="stable")])
    return history


def test_the_busiest_loader_counts():
    """The workers of an evaluation that stay alive are idle meanwhile."""
    use = two_loaders().use()

    assert use is not None
    assert use.busy == pytest.approx(0.8)


def test_of_many_loaders_the_newest_are_kept() -> None:
    """The first ones are forgotten; those of another rank stay."""
    history = WorkerHistory()
    history.add(1, worker_rows(2, busy=0.3))
    for number in range(MAX_LOADERS + 1):
        rows = worker_rows(2, busy=0.9 if number == 0 else 0.1)
        rows["loader"] = number
        history.add(0, rows)

    use = history.use()

    assert use is not None
    assert use.busy == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("trains", "busy"),
    [
        (LoaderFacts(length=960, num_workers=2, number=1), 0.01),  # the busy one is an evaluation's
        (LoaderFacts(length=960, num_workers=2, number=2), None),  # each epoch is too short to be watched
        (LoaderFacts(length=640, num_workers=2, number=2), 0.8),  # of one like it, made for another epoch
        (LoaderFacts(length=960, num_workers=2), 0.8),  # by an earlier version
    ],
)
def test_the_workers_of_the_training_count(trains: LoaderFacts, busy: float | None):
    """torchvision's reference evaluates for half of the run, and waits for a metric meanwhile."""
    evaluates, other = (LoaderFacts(length=640 >> at, num_workers=2, number=at) for at in (0, 1))
    facts = JobFacts(loader=trains, loaders={0: (evaluates, other, trains)}, workers=two_loaders())

    assert (facts.worker_use and facts.worker_use.busy) == (busy if busy is None else pytest.approx(busy))


def test_loaders_of_one_epoch_count_as_one():
    """A script that makes a loader for each epoch describes the first one; each is watched for less than a second."""
    history = WorkerHistory()
    for epoch in range(8):
        rows = worker_rows(2, busy=0.4, pid=100 + epoch, start=60 * epoch)[:2]
        rows["loader"] = epoch
        rows["t_ns"], rows["cpu_ns"] = rows["t_ns"] // 2, rows["cpu_ns"] // 2
        history.add(0, rows)

    trains = LoaderFacts(length=640, num_workers=2, number=0)

    assert history.use() is None
    use = JobFacts(loader=trains, loaders={0: (trains,)}, workers=history).worker_use
    assert use is not None
    assert use.busy == pytest.approx(0.4)


def test_too_short_is_not_known():
    """The kernel counts in ticks."""
    history = WorkerHistory()
    history.add(0, worker_rows(2)[:1])

    assert history.use() is None
    assert WorkerHistory().use() is None


@pytest.mark.parametrize(("anonymous", "copies"), [(0.0, True), (1.0, False)])
def test_private_memory_without_new_memory_is_copies(anonymous, copies):
    """A leak in the worker is new memory, a page that was written after the fork is not."""
    rows = worker_rows(2)
    grown = np.arange(60) * MB
    rows["private_bytes"], rows["anonymous_bytes"] = 20 * MB + grown, 300 * MB + anonymous * grown
    history = WorkerHistory()
    for part in np.array_split(rows, 6):
        history.add(0, part)

    assert history.copies(0, 0) is copies
    assert history.workers(0, 0) == 2
    assert not history.copies(1, 0)
    assert not watched(2).copies(0, 0)
