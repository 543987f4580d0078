"""A sample of a long run's steps: blocks of consecutive steps, spread over the run."""

from __future__ import annotations

import numpy as np
import pytest

from tests.diagnosis.fabricated import Job, adds, at_once, rows_of
from traceml.database.schema import DEVICE_STEPS, EVALS, USER_PHASES
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.kinds import Kind
from traceml.diagnosis.ruleset import diagnose
from traceml.diagnosis.steps.kept_steps import KeptSteps, SampledSteps
from traceml.diagnosis.steps.own_work import own_work_of

BLOCKS = [range(64), range(640, 704), range(1984, 2000)]
STEPS = np.concatenate([np.array(block) for block in BLOCKS])


def sampled(rows, steps=STEPS):
    kept = SampledSteps(steps, len(rows))
    for rank, of_rank in enumerate(rows):
        kept.scatter(np.full(len(of_rank), rank), of_rank)

    return kept


def test_only_the_chosen_steps_are_kept():
    """Of all rows the chosen ones are kept, whatever order frames come in; the newest step is known."""
    rows = rows_of(Job(steps=2000))
    kept = SampledSteps(STEPS)
    for rank, of_rank in enumerate(rows):
        for part in np.array_split(of_rank, 7):
            kept.scatter(np.full(len(part), rank), part)

    aligned = kept.aligned(last=10_000)

    assert aligned.steps.tolist() == [step for step in STEPS.tolist() if step >= 10]
    assert aligned.total[1].tolist() == pytest.approx(rows[1]["total_ns"][aligned.steps].tolist(), rel=1e-6)
    assert kept.latest.tolist() == [1999, 1999]
    assert kept.slots == len(STEPS)


def test_a_rank_that_ended_early_keeps_its_steps_and_cuts_no_others():
    """Ranks are aligned as where the newest steps are kept; one that stayed far behind is named."""
    rows = rows_of(Job(ranks=3, steps=2000))
    kept = sampled([rows[0], rows[1], rows[2][:300]])

    aligned = kept.aligned(last=10_000)

    assert aligned.ranks.tolist() == [0, 1]
    assert aligned.missing_ranks == (2,)
    assert kept.held(2).steps.tolist() == list(range(64))


def test_latest_steps_are_known_without_their_rows():
    """How far each rank came is told apart from the rows."""
    kept = sampled(rows_of(Job(steps=700)))
    kept.advance(np.arange(2), np.array([1999, 1500]), np.array([7, 8]))

    assert kept.latest.tolist() == [1999, 1500]
    assert kept.end_ns.tolist() == [7, 8]


def test_user_phases_and_device_times_of_other_steps_are_left_out():
    """Both tables are cut to the same steps."""
    rows = rows_of(Job(ranks=1, steps=2000, grouped=False))
    with_user, with_device = sampled(rows), sampled(rows)
    user, device = np.zeros(2000, USER_PHASES.dtype), np.zeros(2000, DEVICE_STEPS.dtype)
    user["step"] = device["step"] = np.arange(2000)
    user["ns"], device["forward_ns"], device["backward_own_ns"] = 1000 + user["step"], 5_000_000 + user["step"], -1
    with_user.scatter_user(0, user, {0: "augment"})
    with_device.scatter_device(np.zeros(2000, np.int64), device)

    found = with_device.aligned(last=10_000)
    assert found.times["forward"][0].tolist() == pytest.approx((5_000_000 + found.steps).tolist())
    found = with_user.aligned(last=10_000)
    assert found.user["augment"][0].tolist() == pytest.approx((1000 + found.steps).tolist())


def test_evaluation_before_other_steps_is_left_out():
    """Waiting for the evaluation before a chosen step is no time of it; one before another step changes nothing."""
    rows = rows_of(Job(steps=2000))
    for each in (300, 650):
        rows[1]["comm_ns"][each] += 500_000_000
        rows[1]["total_ns"][each] += 500_000_000

    kept, evaluation = sampled(rows), np.zeros(2, EVALS.dtype)
    evaluation["step"], evaluation["ns"] = [300, 650], 500_000_000
    kept.scatter_evaluation(0, evaluation)

    assert kept.aligned(last=10_000).total.max() < 100_000_000


def test_rules_do_not_join_the_ends_of_blocks():
    """What one optimizer takes longer counts in the next step; where a block begins, that of the step stands for it."""
    rows = rows_of(Job(steps=2000))
    rows[0]["optimizer_ns"], rows[1]["optimizer_ns"] = rows[0]["step"], 0

    window = sampled(rows).aligned(last=10_000, skip_first=0)
    optimizer = own_work_of(window, JobFacts(world_size=2, backend="nccl")).parts["optimizer"][0]

    assert np.flatnonzero(window.begins).tolist() == [0, 64, 128]
    expected = np.where(window.begins, window.steps, window.steps - 1)
    assert optimizer.tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("faults", "kind", "ranks"),
    [
        ([], Kind.HEALTHY, ()),
        ([adds("forward", 20, (1,))], Kind.COMPUTE_STRAGGLER, (1,)),
        ([adds("input_wait", 20)], Kind.INPUT_BOUND, ()),
        ([adds("other", 400, every=40)], Kind.RESIDUAL_HEAVY, ()),
        ([at_once("other", 400, 0.025)], Kind.JITTER, ()),
    ],
)
def test_the_verdict_is_that_of_all_steps(faults, kind, ranks):
    """A sample of 1,500 of 12,000 steps gives the verdict of all of them."""
    rows = rows_of(Job(steps=12_000), *faults, seed=3)
    steps = np.concatenate([np.arange(first, first + 64) for first in range(0, 12_000 - 64, 512)])
    whole = KeptSteps(16_384)
    for rank, of_rank in enumerate(rows):
        whole.scatter(np.full(len(of_rank), rank), of_rank)

    for kept in (sampled(rows, steps), whole):
        verdict = diagnose(kept.aligned(last=20_000), JobFacts(world_size=2, backend="nccl"))[0]

        assert (verdict.kind, verdict.ranks) == (kind, ranks)
