"""Ranks that wait for each other have one pace; groups that are apart from each other need not."""

from __future__ import annotations

import numpy as np
import pytest
from msgspec.structs import replace

from tests.diagnosis.fabricated import Job, adds, window_of
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.run_time import RunTime
from traceml.diagnosis.kinds import Kind
from traceml.diagnosis.ruleset import diagnose
from traceml.diagnosis.steps.aligned_steps import AlignedSteps
from traceml.diagnosis.steps.own_work import by_pace

SLOW = window_of(Job(ranks=2), adds("other", 40.0, (1,)))
FAST = window_of(Job(ranks=2), seed=1)


def of_two_groups(first: AlignedSteps, second: AlignedSteps) -> AlignedSteps:
    """Return the ranks of two groups that do not wait for each other."""
    both = [(first.times[name], second.times[name]) for name in first.times]
    return replace(
        first,
        ranks=np.arange(4),
        times=dict(zip(first.times, map(np.concatenate, both), strict=True)),
        total=np.concatenate([first.total, second.total]),
        backward_own=np.concatenate([first.backward_own, second.backward_own]),
        elements=np.empty((0, 0), np.float32),
        samples=np.empty((0, 0), np.float32),
    )


def test_a_late_rank_costs_its_own_group_and_no_other() -> None:
    """Pairs of ranks that share a model each: ranks 2 and 3 go on while rank 0 waits for rank 1."""
    late = diagnose(of_two_groups(SLOW, FAST), JobFacts(world_size=4))[0]
    alone = diagnose(SLOW, JobFacts(world_size=2))[0]

    assert (late.kind, late.ranks) == (Kind.STRAGGLER, (1,))
    assert (late.cost_share, late.speedup_if_fixed) == (alone.cost_share, alone.speedup_if_fixed)
    assert "the others of the group wait" in late.headline
    assert "This is about ranks 0, 1: the steps of ranks 2, 3 take " in late.summary
    assert late.evidence["faster_ranks"] == [2, 3]


def test_ranks_of_one_group_are_compared_with_all() -> None:
    """All of them wait for rank 1."""
    late = diagnose(window_of(Job(ranks=4), adds("other", 40.0, (1,))), JobFacts(world_size=4))[0]

    assert (late.kind, late.ranks) == (Kind.STRAGGLER, (1,))
    assert late.headline.endswith(f"the others wait, {late.cost_share:.0%} of step time".replace("%", " %"))
    assert "This is about" not in late.summary


@pytest.mark.parametrize("evaluators", [(), (0,)])
def test_a_rank_that_evaluates_alone_has_the_pace_of_those_that_wait(evaluators: tuple[int, ...]) -> None:
    """Device times of the others include it; its own steps do not."""
    window = window_of(Job(ranks=3))
    waited = np.array([0.0, 8e6, 8e6])[:, None]
    times = {**window.times, "comm": window.times["comm"] + waited}
    window = replace(window, times=times, total=window.total + waited, device=True)
    time = replace(RunTime.of(100.0, {"steps": 70.0, "evaluation": 30.0}, 9), evaluators=evaluators, evaluators_s=30.0)

    found = diagnose(window, JobFacts(world_size=3, time=time, state="finished"))

    assert any("faster_ranks" in each.evidence for each in found) is not bool(evaluators)


@pytest.mark.parametrize("meets_every", [1, 8, 40])
def test_ranks_that_meet_have_one_pace(meets_every: int) -> None:
    """In local SGD a late rank is waited for in every n-th step: most steps of the others are short."""
    window = window_of(Job(ranks=3, meets_every=meets_every, comm=0.1), adds("forward", 20.0, (2,)))

    assert by_pace(window, JobFacts(world_size=len(window.ranks))) == (window, None)


@pytest.mark.parametrize("at", [-1, 0, 100])
def test_what_a_rank_does_once_is_no_pace(at: int) -> None:
    """Ranks may wait for long where a training begins or ends, or for a pause of another one outside of its steps."""
    window = replace(FAST, total=FAST.total.copy())
    window.total[0, at] += 60e9

    assert by_pace(window, JobFacts(world_size=len(window.ranks))) == (window, None)
