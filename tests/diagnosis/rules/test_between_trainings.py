"""Set-up between folds and trials is told as such, and is neither a period nor jitter."""

from __future__ import annotations

import numpy as np
import pytest

from tests.diagnosis.fabricated import Fault, Job, adds, window_of
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.run_time import RunTime
from traceml.diagnosis.facts.sampled_lines import SampledLine
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind
from traceml.diagnosis.ruleset import diagnose

TRIALS = Job(ranks=1, steps=400, grouped=False)
REGULAR = (79, 159, 239, 319)
IRREGULAR = (90, 131, 210, 333)
LOADS = (
    SampledLine(0, "other", "/x/search.py", 7, "load_data", None, 300),
    SampledLine(0, "forward", "/x/search.py", 5, "forward", None, 300),
)


def adds_at(at: tuple[int, ...], ms: float = 1200.0, part: str = "other") -> Fault:
    """Return a fault: a part of the step, by default other code, takes longer in some steps."""

    def longer(own, _random):
        own[part][:, list(at)] += ms

    return longer


def findings(at: tuple[int, ...], begins: tuple[int, ...], ms: float = 1200.0) -> list[Finding]:
    """Return what is said of that."""
    return diagnose(window_of(TRIALS, adds_at(at, ms)), JobFacts(lines=LOADS, trainings_begin=begins))


@pytest.mark.parametrize("at", [REGULAR, IRREGULAR], ids=["regular", "with early stopping"])
@pytest.mark.parametrize("later", [0, 1], ids=["in the step before", "in the first step"])
def test_set_up_between_trainings_is_no_work_of_every_nth_step(at, later):
    """Half as often would be another search."""
    (finding,) = findings(tuple(step + later for step in at), tuple(step + 1 for step in at))

    assert (finding.kind, finding.phase, finding.evidence["trainings"]) == (Kind.RESIDUAL_HEAVY, "other", 5)
    assert finding.evidence["set_up_ms"] == pytest.approx(1200, rel=0.02)
    assert finding.headline.startswith("Set-up between 5 trainings, in search.py:7 load_data")
    assert "1.20 s pass before each of the next ones, in search.py:7 load_data" in finding.summary
    assert finding.next.startswith("If its result is the same for all trainings, run search.py:7 load_data once")
    assert finding.speedup_if_fixed == pytest.approx(1 / (1 - finding.cost_share))
    assert "Every" not in finding.summary + finding.next


@pytest.mark.parametrize(("every", "is_set_up"), [(5, False), (40, True)])
def test_the_inner_loops_of_meta_learning_are_no_trainings(every, is_set_up):
    """Each task trains a copy of the model for 5 steps, after which the weights move towards it: in every 5th step."""
    at = tuple(range(every - 1, 399, every))
    (finding,) = findings(at, tuple(step + 1 for step in at), ms=120.0)

    assert ("trainings" in finding.evidence) is is_set_up
    assert (finding.evidence.get("every_n_steps") == every) is not is_set_up


@pytest.mark.parametrize(
    ("evaluation_s", "library"), [(2.0, None), (30.0, None), (None, None), (2.0, "/lib/torch/nn/x.py:1 f")]
)
def test_set_up_that_follows_an_evaluation_is_named(evaluation_s: float | None, library: str | None) -> None:
    """Its samples are those of the evaluation, which ends where the next training begins."""
    lines = (SampledLine(0, "outside", "/x/search.py", 7, "load_data", library, 80),)
    known_s = {"steps": 90.0, "evaluation": evaluation_s or 0.0}
    time = None if evaluation_s is None else RunTime.of(100.0, known_s, 5)  # it is not known at first
    begins = tuple(step + 1 for step in REGULAR)
    known = JobFacts(lines=lines, trainings_begin=begins, time=time)
    finding = next(each for each in diagnose(window_of(TRIALS, adds_at(REGULAR)), known) if each.phase == "other")

    is_named = evaluation_s is not None and evaluation_s < 4 and library is None
    assert finding.evidence["trainings"] == 5
    assert ("pass before each of the next ones, in search.py:7 load_data" in finding.summary) is is_named


@pytest.mark.parametrize("waited", [0.0, 0.4])
@pytest.mark.parametrize("forward", [4.0, 0.3])
def test_one_set_up_passes_outside_of_the_steps(waited: float, forward: float) -> None:
    """A search for the learning rate is a training before the training: with too few cores, nothing was said of it."""
    known = JobFacts(lines=LOADS, trainings_begin=(51,), wait_of_ready_time={0: waited})
    job = Job(ranks=1, steps=200, grouped=False, own={"forward": forward, "backward": forward, "other": 0.1})
    found = diagnose(window_of(job, adds_at((50,), ms=1500.0), adds_at((80, 120, 121, 170), ms=15.0)), known)[0]

    assert " s passed between two trainings, outside of their steps, mostly in search.py:7 load_data." in found.summary
    assert "Find out what search.py:7 load_data did in the set-up" in found.next


@pytest.mark.parametrize(("waited", "told"), [(0.0, True), (0.4, False)])
def test_what_the_first_step_of_a_training_takes_is_no_set_up_outside_of_it(waited: float, told: bool) -> None:
    """Kernels are chosen for the new model; with too few cores other programs make a step as long."""
    known = JobFacts(trainings_begin=(51,), wait_of_ready_time={0: waited})
    found = diagnose(window_of(Job(ranks=1, steps=200, grouped=False), adds_at((51,), 1500.0, "forward")), known)[0]

    assert "between" not in found.summary + found.headline
    assert ("One step took 1.51 s" in found.summary) is told


def test_set_up_of_three_trainings_is_told_as_that_of_more() -> None:
    """Two pauses are no pattern, but the trainings are one."""
    (finding,) = findings((132, 265), (133, 266))

    assert (finding.kind, finding.evidence["trainings"]) == (Kind.RESIDUAL_HEAVY, 3)


def test_set_up_once_gives_the_promised_gain():
    """The same trials without loading again."""
    begins = tuple(step + 1 for step in REGULAR)
    (finding,) = findings(REGULAR, begins)

    before, after = (window_of(TRIALS, *faults).total.mean() for faults in ([adds_at(REGULAR)], []))
    assert finding.speedup_if_fixed == pytest.approx(before / after, rel=0.05)


def test_other_regular_steps_are_told_as_before():
    """Not all that is long in a run of several trainings is their set-up."""
    (finding,) = diagnose(window_of(TRIALS, adds("other", 300, every=20)), JobFacts(trainings_begin=(80, 160, 240)))

    assert finding.evidence["every_n_steps"] == 20


def test_short_set_up_is_no_finding():
    """A model is made in a millisecond."""
    assert [each.kind for each in findings(REGULAR, tuple(step + 1 for step in REGULAR), ms=3.0)] == [
        each.kind for each in findings((), ())
    ]


def test_the_steps_that_follow_are_counted_in_a_window():
    """Of a long run only some trainings are seen."""
    begins = (*np.arange(80, 400, 80).tolist(), 480, 560)
    (finding,) = findings(REGULAR, begins)

    assert finding.evidence["trainings"] == 7
