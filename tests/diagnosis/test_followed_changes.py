"""Advice on batches, slow-downs, compilations and evaluation that is followed gives the promised gain."""

from __future__ import annotations

import numpy as np
import pytest

from tests.diagnosis.fabricated import Job, window_of
from tests.diagnosis.rules.slowdowns.test_slowdown import AT, history
from tests.diagnosis.rules.test_data_imbalance import steps_of, uneven
from tests.diagnosis.stalls.test_recompiles import compilations, long_forwards
from traceml.database.schema import Compiled
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.run_time import RunTime
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind
from traceml.diagnosis.rules.slowdowns.slowdown import slowdown
from traceml.diagnosis.ruleset import diagnose
from traceml.diagnosis.steps.aligned_steps import AlignedSteps

ALONE = Job(ranks=1, grouped=False)


def found(kind: Kind, of: AlignedSteps, facts: JobFacts) -> Finding:
    return next(each for each in diagnose(of, facts) if each.kind is kind)


def gain(before: AlignedSteps, after: AlignedSteps) -> float:
    return float(before.total.mean() / after.total.mean())


def test_batches_of_equal_size_give_the_promised_gain() -> None:
    """The same elements in each step, dealt evenly to the ranks; they are no finding then."""
    job = Job(ranks=4)
    sizes = uneven(4, job.steps)
    before, after = steps_of(job, sizes), steps_of(job, np.broadcast_to(sizes.mean(axis=0), sizes.shape))

    finding = found(Kind.DATA_IMBALANCE, before, JobFacts(world_size=4))

    assert gain(before, after) == pytest.approx(finding.speedup_if_fixed, rel=0.3)
    assert Kind.DATA_IMBALANCE not in [each.kind for each in diagnose(after, JobFacts(world_size=4))]


def test_compiling_for_all_sizes_gives_the_promised_gain() -> None:
    """No step compiles again."""
    before, after = window_of(ALONE, long_forwards(7)), window_of(ALONE)
    again = JobFacts(pauses=compilations(*[Compiled.AGAIN] * 7))

    finding = found(Kind.RECOMPILES, before, again)

    assert "mark_dynamic" in finding.next
    assert gain(before, after) == pytest.approx(finding.speedup_if_fixed, rel=0.3)


def test_evaluating_half_as_often_saves_what_is_promised() -> None:
    """A run of 100 s, of which 40 are evaluation, takes 80; one with little evaluation is not told so."""
    often, seldom = (
        JobFacts(time=RunTime.of(wall_s, {"startup": 5.0, "steps": 55.0, "evaluation": wall_s - 60}, times))
        for wall_s, times in ((100.0, 8), (80.0, 4))
    )
    little = JobFacts(time=RunTime.of(70.0, {"startup": 5.0, "steps": 55.0, "evaluation": 10.0}, 2))
    finding = found(Kind.EVAL_HEAVY, window_of(ALONE), often)

    assert often.time is not None
    assert seldom.time is not None
    assert "saves 20 % of the run" in finding.next
    assert often.time.wall_s / seldom.time.wall_s == pytest.approx(finding.speedup_if_fixed, rel=0.01)
    assert all(each.kind is not Kind.EVAL_HEAVY for each in diagnose(window_of(ALONE), little))


@pytest.mark.parametrize("change", [np.where(AT >= 20, 20.0, 0.0), np.where((AT >= 20) & (AT < 40), 20.0, 0.0)])
def test_steps_that_stay_short_give_the_promised_gain(change: np.ndarray) -> None:
    """The same run without the slow part, of which nothing is said."""
    before, after = history(change), history(0.0)

    (finding,) = slowdown(before, JobFacts())

    assert before.step_ns.mean() / after.step_ns.mean() == pytest.approx(finding.speedup_if_fixed, rel=0.3)
    assert not slowdown(after, JobFacts())
