"""A loss that is no longer finite: since when, on which rank, and when it is nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from msgspec.structs import replace

from tests.diagnosis.fabricated import Job, window_of
from tests.diagnosis.rules.test_skipped_updates import skipped
from traceml.database.schema import LOSSES
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.numerics import LossHistory
from traceml.diagnosis.kinds import Kind, Severity
from traceml.diagnosis.rules.correctness import loss_not_finite, trainings_not_finite
from traceml.diagnosis.ruleset import diagnose

NAN, INF = math.nan, math.inf


def history(*ranks: list[float]) -> LossHistory:
    """Return losses of every 10th step of some ranks, in two parts."""
    found = LossHistory()
    for rank, losses in enumerate(ranks):
        rows = np.zeros(len(losses), LOSSES.dtype)
        rows["step"], rows["loss"] = np.arange(len(losses)) * 10, losses
        for part in np.array_split(rows, 2):
            found.add(rank, part)

    return found


def test_the_first_step_and_its_rank_are_named():
    """Rank 1 had an infinite loss first, and rank 0 followed."""
    losses = history([3.0, 2.0, 1.5, NAN, NAN, NAN], [3.0, 2.0, INF, NAN, NAN, NAN])
    facts = JobFacts(world_size=2, losses=losses, latest=(79, 79))

    finding = diagnose(window_of(Job(ranks=2)), facts)[0]

    assert finding.kind is Kind.NUMERIC
    assert finding.ranks == (1,)
    assert finding.evidence == {
        "since_step": 20,
        "wasted_steps": 60,
        "steps": 80,
        "loss": "inf",
        "last_finite_loss": 2.0,
        "checkpoint_before_step": 19,
    }
    assert finding.headline == "The loss has not been finite since step 20: first inf on rank 1"


@pytest.mark.parametrize("losses", [[], [2.0] * 6, [2.0, NAN, 2.0, INF, INF, 1.0], [NAN, 2.0]])
def test_losses_that_are_finite_again_are_no_finding(losses):
    """Single overflows, as GradScaler skips them."""
    assert loss_not_finite(JobFacts(losses=history(losses), latest=(100,))) is None


def test_the_newest_steps_may_still_recover():
    """A loss that was not finite in the last steps only is no finding yet."""
    losses = history([2.0, NAN])
    losses.add(0, np.array([(0, 11, NAN)], LOSSES.dtype))
    assert loss_not_finite(JobFacts(losses=losses, latest=(11,))) is None
    assert loss_not_finite(JobFacts(losses=losses, latest=(12,))).evidence["since_step"] == 10


def test_a_single_loss_that_is_not_finite_says_nothing_of_the_steps_that_are_not_read():
    """On CUDA every 16th step is read: the others may have been finite, as after an overflow that GradScaler skips."""
    losses = history([2.0, 2.0, NAN])
    facts = JobFacts(losses=losses, latest=(39,))

    assert loss_not_finite(facts) is None

    losses.add(0, np.array([(0, 30, NAN)], LOSSES.dtype))
    finding = loss_not_finite(facts)
    assert (finding.evidence["since_step"], finding.evidence["wasted_steps"]) == (20, 20)


def test_a_single_loss_at_the_end_of_a_fold_is_no_lost_fold():
    """The fold that follows has finite losses again; a second such loss tells that the first fold was lost."""
    facts = {"latest": (199,), "trainings_begin": (105,)}

    assert trainings_not_finite(JobFacts(losses=history([2.0] * 10 + [NAN] + [2.0] * 9), **facts)) is None
    assert trainings_not_finite(JobFacts(losses=history([2.0] * 9 + [NAN] * 2 + [2.0] * 9), **facts)) is not None


@pytest.mark.parametrize(("resumes_at", "goes_back"), [(0, False), (4000, True)])
def test_a_loss_that_is_never_finite_has_no_checkpoint_from_before(resumes_at: int, goes_back: bool) -> None:
    """It is one of the initial weights or the learning rate, unless the training goes on from a checkpoint."""
    losses = history([2.0] + [NAN] * 20)

    finding = loss_not_finite(JobFacts(losses=losses, latest=(209,), resumes_at=resumes_at))

    assert ("Go back to a checkpoint from before step 9" in finding.next) is goes_back
    assert finding.next.startswith("Start again with a lower learning rate") is not goes_back


@pytest.mark.parametrize(
    ("begins", "where", "goes_back"),
    [((), "since: 200 of", True), ((100,), "since: 200 of", False), ((100, 300), "since, in 2 trainings one", False)],
)
def test_a_checkpoint_of_another_training_is_no_way_back(begins, where, goes_back):
    """The last trials of a search diverge, each at once."""
    losses = history([2.0] * 20 + [NAN] * 20)

    finding = loss_not_finite(JobFacts(losses=losses, latest=(399,), trainings_begin=begins))

    assert where in finding.summary
    assert ("Go back to a checkpoint" in finding.next) is goes_back
    assert ("Stop such a training at once" in finding.next) is not goes_back


@pytest.mark.parametrize(("ranks", "whose"), [(1, "The run"), (2, "All ranks")])
def test_no_rank_is_named_where_all_have_it(ranks, whose):
    """The only rank, or all of them in the same step."""
    losses = history(*[[3.0, NAN, NAN, NAN]] * ranks)

    finding = loss_not_finite(JobFacts(losses=losses, latest=(39,) * ranks, world_size=ranks))

    assert finding.ranks == ()
    assert finding.summary.startswith(f"{whose} had a loss of nan in step 10,")
    assert finding.headline == "The loss has not been finite since step 10: first nan"


def test_steps_that_the_scaler_skips_did_no_harm():
    """The loss is infinite and its updates are skipped: that is told, with the loss, and no checkpoint is needed."""
    losses, steps = history([2.0] * 10 + [INF] * 20), skipped(list(range(100, 300)))

    findings = diagnose(window_of(Job(ranks=1, grouped=False)), JobFacts(losses=losses, skipped=steps, latest=(299,)))

    assert [finding.kind for finding in findings] == [Kind.STEPS_SKIPPED]
    assert findings[0].evidence["loss"] == "inf"
    assert "their loss (inf), and so their gradients, were not finite" in findings[0].summary
    assert "checkpoint" not in findings[0].next


def test_a_loss_that_is_not_finite_without_skips_is_reported_beside_a_few():
    """The scaler skipped some steps at first, and the updates of the rest broke the model."""
    losses, steps = history([2.0] * 10 + [INF] * 20), skipped([0, 1, 2, 3, 4])

    finding = loss_not_finite(JobFacts(losses=losses, latest=(299,), skipped=steps))

    assert finding.kind is Kind.NUMERIC
    assert "checkpoint" in finding.next


@pytest.mark.parametrize("unread", [False, True])
def test_nobody_goes_back_where_a_fused_optimizer_skips_on_a_device(unread):
    """The scaler has its kernel skip such steps, which are not read: the model is as it was."""
    losses = history([2.0] * 10 + [NAN] * 20)

    finding = loss_not_finite(JobFacts(losses=losses, latest=(299,), unread_skips=unread))

    assert ("Go back to a checkpoint" in finding.next) is not unread
    assert ("GradScaler has the fused optimizer skip a step" in finding.next) is unread


def test_a_fold_that_was_lost_among_good_ones_is_reported():
    """The second of four folds has no finite loss from its tenth step on; the third begins a new model."""
    losses = history([2.0] * 10 + [2.0] + [NAN] * 9 + [2.0] * 20)
    facts = JobFacts(losses=losses, latest=(399,), trainings_begin=(100, 200, 300))

    finding = next(f for f in diagnose(window_of(Job(ranks=1, grouped=False)), facts) if f.kind is Kind.NUMERIC)

    assert (finding.severity, finding.is_urgent) == (Severity.WARNING, False)
    assert finding.headline == "Losses were not finite in 22 % of the steps, first in step 110: nan"
    assert "it was no longer finite until the next training began at step 200: 90 of 400 steps" in finding.summary
    assert (finding.evidence["until_step"], finding.evidence["trainings"]) == (200, 1)


def test_trials_that_were_lost_are_counted():
    """Every second of six trials is lost, and their last is still told as the newest loss."""
    losses = history(([2.0] * 10 + [INF] * 10) * 3 + [2.0] * 10)

    finding = trainings_not_finite(JobFacts(losses=losses, latest=(699,), trainings_begin=tuple(range(100, 700, 100))))

    assert finding.evidence["trainings"] == 3
    assert finding.evidence["wasted_steps"] == 300
    assert "; the same happened in 2 more trainings: 300 of 700 steps (43 %)" in finding.summary


@pytest.mark.parametrize(
    ("losses", "begins"),
    [
        ([2.0] * 10 + [NAN] * 9 + [2.0] * 20, (100, 300)),
        ([2.0] * 10 + [NAN] * 9 + [2.0] * 20, ()),
        ([2.0] * 20 + [NAN] * 20, (100, 200, 300)),
        ([2.0] * 40, (100, 200, 300)),
    ],
)
def test_losses_that_recover_within_a_training_are_no_lost_training(losses, begins):
    """Nor is the newest training one of the earlier ones."""
    assert trainings_not_finite(JobFacts(losses=history(losses), latest=(399,), trainings_begin=begins)) is None


def test_steps_that_the_scaler_skipped_in_an_earlier_training_did_no_harm():
    """The updates of those steps were skipped."""
    losses, steps = history([2.0] * 10 + [INF] * 10 + [2.0] * 20), skipped(list(range(100, 200)))
    facts = JobFacts(losses=losses, latest=(399,), trainings_begin=(200,), skipped=steps)
    assert trainings_not_finite(facts) is None
    assert trainings_not_finite(replace(facts, skipped=skipped([0, 1])))
