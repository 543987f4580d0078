"""Updates that are skipped: for good, or at first only."""

from __future__ import annotations

import numpy as np
import pytest

from tests.diagnosis.fabricated import Job, window_of
from traceml.database.schema import STEPS, StepFlag, pack_bits
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.numerics import SkippedSteps
from traceml.diagnosis.kinds import Kind
from traceml.diagnosis.rules.correctness import steps_skipped
from traceml.diagnosis.ruleset import diagnose


def skipped(steps: list[int], total: int = 300) -> SkippedSteps:
    """Return what rows of two ranks tell, in frames of 50."""
    rows = np.zeros(total, STEPS.dtype)
    rows["step"] = np.arange(total)
    rows["bits"] = pack_bits(1, 0)
    rows["bits"][steps] = pack_bits(1, StepFlag.SKIPPED)
    facts = SkippedSteps()
    for part in np.array_split(rows, total // 50):
        facts.add(np.repeat([1, 0], len(part)), np.concatenate([part, part]))

    return facts


def test_steps_that_are_skipped_for_good_are_reported_with_the_first():
    """200 of 300 steps, all since step 100."""
    facts = JobFacts(skipped=skipped(list(range(100, 300))))

    finding = diagnose(window_of(Job(ranks=1, grouped=False)), facts)[0]

    assert finding.kind is Kind.STEPS_SKIPPED
    assert finding.evidence == {"skipped": 200, "steps": 300, "since_step": 100}
    assert finding.severity == "critical"
    assert "200 of 300 steps" in finding.summary


def test_the_first_step_is_that_of_the_dense_part():
    """Two skips of the calibration at first are not the beginning."""
    finding = steps_skipped(JobFacts(skipped=skipped([0, 1, *range(150, 300)])))

    assert finding.evidence["since_step"] == 150


def test_a_part_of_all_steps_is_skipped_since_the_first_one():
    """Each second batch, also the last one: the end of the run is no dense part."""
    finding = steps_skipped(JobFacts(skipped=skipped(list(range(1, 300, 2)))))

    assert finding.evidence["since_step"] == 1
    assert "skipped 150 of 300 steps (50 %), since step 1, and still does" in finding.summary

    finding = steps_skipped(JobFacts(skipped=skipped(list(range(1, 300, 2))), state="finished"))
    assert "since step 1, up to the end: their gradients" in finding.summary


@pytest.mark.parametrize(
    "steps", [[], [0, 1, 2, 3, 4, 5, 6], list(range(10, 60)), list(range(0, 300, 40)), [297, 298, 299]]
)
def test_skips_that_end_or_are_rare_are_no_finding(steps):
    """The scaler's calibration, a bad part of the data, single overflows."""
    assert steps_skipped(JobFacts(skipped=skipped(steps))) is None


def test_without_rows_there_is_nothing_to_say():
    """A run that has not made a step."""
    assert steps_skipped(JobFacts()) is None


def test_a_sample_of_the_steps_tells_the_same():
    """Of a long run blocks of steps are taken: the share of skipped ones counts, and the step since which."""
    rows = np.zeros(20_000, STEPS.dtype)
    rows["step"] = np.arange(20_000)
    rows["bits"] = np.where(rows["step"] < 9_000, pack_bits(1, 0), pack_bits(1, StepFlag.SKIPPED))
    sample = rows[rows["step"] // 64 % 8 == 0]
    steps = SkippedSteps()
    steps.add(np.zeros(len(sample), np.int64), sample)

    finding = steps_skipped(JobFacts(skipped=steps))

    assert finding.cost_share == pytest.approx(0.55, abs=0.02)
    assert finding.evidence["since_step"] == pytest.approx(9_000, abs=1_000)
