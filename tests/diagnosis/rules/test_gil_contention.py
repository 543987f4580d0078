"""Waits for the GIL, while other threads run Python code."""

from __future__ import annotations

import numpy as np
import pytest

from tests.diagnosis.fabricated import Fault, Job, adds, window_of
from tests.diagnosis.rules.test_cpu_contention import rows_of
from traceml.database.schema import PROCESS
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.machine_use import MachineSamples
from traceml.diagnosis.facts.sampled_lines import SampledLine
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind, Severity
from traceml.diagnosis.ruleset import diagnose

COMPUTING = {"input_wait": 0.5, "forward": 30.0, "backward": 30.0, "optimizer": 38.0, "other": 1.5}
JOB = Job(ranks=1, steps=200, grouped=False, own=COMPUTING)
SECOND = 10**9
FORWARD = (SampledLine(0, "forward", "/me/train.py", 30, "main", None, 100),)


def samples(*, ran: float, waited: float = 0.05, seconds: int = 20, pace: int = 10) -> MachineSamples:
    """Return samples of a rank with some steps per second, whose main thread ran and waited for a core."""
    at, made = np.arange(seconds), MachineSamples()
    times = {
        "cpu_ns": at * (ran + 0.9) * SECOND,
        "main_run_ns": at * ran * SECOND,
        "main_wait_ns": at * waited * SECOND,
    }
    made.add(PROCESS.name, 0, rows_of(PROCESS, seconds, step=at * pace, **times))
    return made


def monitor(cores: float, count: int = 60) -> SampledLine:
    """Return what was seen of the busiest other thread in 20 s."""
    return SampledLine(0, "threads", "/me/train.py", 9, "monitor", None, count, 20 * SECOND, int(cores * 20 * SECOND))


def found(use: MachineSamples, *threads: SampledLine, faults: tuple[Fault, ...] = (), **facts: object) -> list[Finding]:
    """Return the findings of a run of one rank."""
    return diagnose(window_of(JOB, *faults), JobFacts(samples=use, thread_lines=threads, **facts))


def test_waiting_for_a_thread_that_runs_python_code_is_reported():
    """Nine tenths of the time in which the training only computes, it is on no core, and needs none."""
    first, *_ = found(samples(ran=0.1), monitor(0.9))

    assert (first.kind, first.severity) == (Kind.GIL_CONTENTION, Severity.CRITICAL)
    assert first.cost_share == pytest.approx(0.83, abs=0.03)  # 0.85, and 2 % of the step do not compute
    assert first.speedup_if_fixed == pytest.approx(1 / (1 - first.cost_share))
    assert first.summary.startswith("Other threads of the script use 0.9 cores")
    assert "all of it in train.py:9 monitor" in first.summary
    assert "train.py:9 monitor into another process" in first.next
    assert (first.evidence["line"], first.evidence["function"]) == (9, "monitor")


@pytest.mark.parametrize(
    ("ran", "cores", "told"),
    [(0.1, 0.9, "with one, steps are at most 1.11x faster."), (0.1, 1.1, "one alone gains nothing."), (0.5, 0.4, None)],
)
def test_one_process_gains_no_more_than_what_the_threads_compute(ran: float, cores: float, told: str | None) -> None:
    """A thread that fills a queue: each step needs a batch, so steps take as long as one process takes for it."""
    first, *_ = found(samples(ran=ran), monitor(cores))

    assert first.kind is Kind.GIL_CONTENTION
    assert ("where steps need it, as batches, divide it among several processes" in first.next) is (told is not None)
    assert first.next.endswith(told or "takes the interpreter from the training.")


def test_the_thread_is_not_named_without_samples():
    """What it does is for other tools."""
    first, *_ = found(samples(ran=0.1), monitor(0.95, count=3))

    assert first.kind is Kind.GIL_CONTENTION
    assert "py-spy dump" in first.next
    assert "function" not in first.evidence


@pytest.mark.parametrize(
    ("use", "threads"),
    [
        (samples(ran=0.95), (monitor(0.9),)),  # beside it, in C
        (samples(ran=0.1), ()),  # it sleeps on its own
        (samples(ran=0.1), (monitor(0.1),)),  # for longer than a thread computed
        (samples(ran=0.4, waited=0.55), (monitor(0.9),)),  # for a core
    ],
    ids=["computes", "no thread", "idle thread", "no core"],
)
def test_other_waiting_is_not_for_the_lock(use: MachineSamples, threads: tuple[SampledLine, ...]) -> None:
    """One of the signs is missing."""
    assert Kind.GIL_CONTENTION not in [each.kind for each in found(use, *threads)]


def test_waiting_outside_the_computing_phases_may_be_of_any_kind():
    """Half of the step sleeps in other code, as in a simulator, while a thread computes."""
    assert found(samples(ran=0.6), monitor(0.9))[0].kind is Kind.GIL_CONTENTION

    sleeping = found(samples(ran=0.6, pace=5), monitor(0.9), faults=(adds("other", 100),))

    assert Kind.GIL_CONTENTION not in [each.kind for each in sleeping]


def test_a_training_thread_that_computes_waits_for_nothing():
    """The main thread only waits for it."""
    lines = tuple(
        SampledLine(0, part, "/me/train.py", 5, "train", None, 50, SECOND, int(0.98 * SECOND))
        for part in ("forward", "backward", "optimizer")
    )

    assert Kind.GIL_CONTENTION not in [each.kind for each in found(samples(ran=0.0), monitor(0.9), lines=lines)]


@pytest.mark.parametrize(
    ("library", "waits"), [("/usr/lib/python3.11/threading.py:295 Condition.wait", True), (None, False)]
)
def test_threads_that_train_are_awaited_not_their_lock(library: str | None, *, waits: bool) -> None:
    """Replicas in a pool: the main thread waits for their results in forward and backward."""
    lines = tuple(
        SampledLine(0, part, "/me/train.py", 16, "train", library, 50, SECOND, 0) for part in ("forward", "backward")
    )

    kinds = [each.kind for each in found(samples(ran=0.1), monitor(0.9), lines=lines)]

    assert (Kind.GIL_CONTENTION in kinds) is not waits


def test_uneven_steps_are_not_reported_beside_it():
    """Who gets the lock when is chance."""
    faults = (adds("other", 300, chance=0.04),)
    kinds = [each.kind for each in found(samples(ran=0.1), monitor(0.9), faults=faults)]

    assert Kind.JITTER in [each.kind for each in found(samples(ran=0.95), faults=faults)]
    assert (kinds[0], Kind.JITTER in kinds) == (Kind.GIL_CONTENTION, False)


def test_computation_that_is_slower_at_times_is_not_reported_beside_it():
    """Also where samples show a line of it: in some steps the training gets the lock at once."""

    def at_first(own, _random) -> None:
        own["forward"][:, :100] += 200

    threads, faults = (monitor(0.9),), (at_first,)
    kinds = [each.kind for each in found(samples(ran=0.1), *threads, faults=faults, lines=FORWARD)]

    assert Kind.SLOWDOWN in [each.kind for each in found(samples(ran=0.95), faults=faults, lines=FORWARD)]
    assert (kinds[0], Kind.SLOWDOWN in kinds) == (Kind.GIL_CONTENTION, False)


@pytest.mark.parametrize(
    ("cores", "torch_threads", "is_told"),
    [(0.2, 1, True), (0.2, 8, False), (0.04, 1, False)],
    ids=["has the lock without a core", "torch's threads may be waited for", "seldom runs"],
)
def test_a_thread_has_the_lock_while_it_waits_for_a_core(cores: float, torch_threads: int, is_told: bool) -> None:
    """On a busy host the threads run for a quarter of the time in which they could: both causes are told."""
    use = samples(ran=0.1, waited=0.3)
    facts = {"wait_of_ready_time": {0: 0.75}, "wait_of_wall_time": {0: 0.3}, "threads": torch_threads}

    kinds = [each.kind for each in found(use, monitor(cores), **facts)]

    assert Kind.CPU_CONTENTION in kinds
    assert (Kind.GIL_CONTENTION in kinds) is is_told
