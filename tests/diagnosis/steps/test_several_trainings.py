"""Several trainings in one run: their models are not compared, the rest of the loop is."""

from __future__ import annotations

import numpy as np
import pytest
from msgspec.structs import replace

from tests.diagnosis.fabricated import Job, window_of
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.kinds import Kind
from traceml.diagnosis.ruleset import diagnose
from traceml.diagnosis.steps.own_work import own_work_of
from traceml.diagnosis.steps.several_trainings import as_one_training, trainings_of

OWN = {"input_wait": 0.5, "forward": 16.0, "backward": 32.0, "optimizer": 6.0, "other": 0.8}
ALONE = Job(ranks=1, steps=600, grouped=False, own=OWN)
STARTS = (200, 400)


def sweep(*factors, parts=("forward", "backward", "optimizer")):
    """Return a fault: from step 200 and from step 400 on, other models."""

    def fault(own, _) -> None:
        for part in parts:
            for start, factor in zip(STARTS, factors, strict=True):
                own[part][:, start:] *= factor

    return fault


def kinds(job: Job, fault, starts=STARTS, seed=0) -> set[Kind]:
    window = window_of(job, fault, seed=seed)
    return {each.kind for each in diagnose(window, JobFacts(world_size=job.ranks, other_models=starts))}


@pytest.mark.parametrize("factors", [(2, 2), (0.5, 4), (1, 3), (4, 0.25)])
def test_the_models_of_a_sweep_are_no_slowdown(factors):
    """Larger ones take longer; where nothing is known of them, that is a slowdown."""
    assert kinds(ALONE, sweep(*factors)) == {Kind.COMPUTE_BOUND}
    assert Kind.SLOWDOWN in kinds(ALONE, sweep(*factors), ())


def test_a_few_steps_of_a_larger_model_are_no_jitter():
    """The last tenth of the run has another model."""

    def last(own, _) -> None:
        for part in ("forward", "backward"):
            own[part][:, 540:] *= 5

    assert kinds(ALONE, last, (540,)) == {Kind.COMPUTE_BOUND}
    assert kinds(ALONE, last, ()) & {Kind.JITTER, Kind.SLOWDOWN}


def test_the_rest_of_the_loop_is_still_compared():
    """Code that is slower in the second training is not the model."""

    def slower(own, random) -> None:
        sweep(2, 2)(own, random)
        own["other"][:, 300:] += 60

    window = window_of(ALONE, slower)
    found = diagnose(window, JobFacts(other_models=STARTS))

    assert (found[0].kind, found[0].phase) == (Kind.SLOWDOWN, "other")
    assert abs(found[0].evidence["since_step"] - 300) <= 20


def test_a_rank_that_is_late_from_some_step_on_is_told_once():
    """From step 182 on, 11 steps after the second model begins and 62 before the third: what it costs is of the run."""
    starts = (171, 244)

    def late(own, _) -> None:
        for part in ("forward", "backward", "optimizer"):
            for start in starts:
                own[part][:, start:] *= 0.25

        own["other"][0, 182:] += 45

    window = window_of(Job(ranks=4, steps=600, own=OWN), late)
    found = diagnose(window, JobFacts(world_size=4, other_models=starts))

    (told,) = (each for each in found if each.phase == "other")
    assert (told.kind, told.ranks, told.evidence["since_step"]) == (Kind.STRAGGLER, (0,), pytest.approx(182, abs=5))


def test_a_slowdown_within_a_training_is_found():
    """From step 500 on, 100 steps after the last model."""

    def slower(own, random) -> None:
        sweep(2, 2)(own, random)
        for values in own.values():
            values[:, 500:] *= 2

    assert Kind.SLOWDOWN in kinds(ALONE, slower)


@pytest.mark.parametrize(
    ("slow", "says", "when"),
    [
        ((0, 80), "Until step 80 a step takes ", "until step 80"),
        ((120, 200), "From step 120 to step 200 a step takes ", "since step 120, until step 200"),
        ((200, 280), "From step 200 to step 280 a step takes ", "since step 200, until step 280"),
        ((320, 400), "From step 320 to step 400 a step takes ", "since step 320, until step 400"),
        ((400, 480), "From step 400 to step 480 a step takes ", "since step 400, until step 480"),
        ((520, 600), "Since step 520 a step takes ", "since step 520"),
    ],
)
def test_a_slowdown_within_a_training_is_told_by_the_steps_of_the_run(slow, says, when):
    """What is at the first or last steps of a training is not at those of the run, and has ended with its training."""

    def slower(own, _) -> None:
        own["forward"][:, slice(*slow)] *= 8

    facts, window = JobFacts(other_models=STARTS), window_of(ALONE, slower)
    found = next(each for each in diagnose(window, facts) if each.kind is Kind.SLOWDOWN)
    live = {each.kind for each in diagnose(window, facts, window)}

    assert found.summary.startswith(says)
    assert found.headline.endswith(f" as long {when}")
    assert (Kind.SLOWDOWN in live) is ("until" not in when)


@pytest.mark.parametrize(
    ("first", "last", "says"),
    [(0, 200, "Steps grow by 1.5"), (200, 400, "Since step 200 steps grow by 1.5"), (400, 600, "Since step 400 steps")],
)
def test_growth_within_a_training_ends_with_it(first, last, says):
    """A graph of all steps so far that each training begins anew."""

    def grows(own, _) -> None:
        own["backward"][:, first:last] += np.linspace(0, 300, 200)

    facts, window = JobFacts(other_models=STARTS), window_of(ALONE, grows)
    found = next(each for each in diagnose(window, facts) if each.kind is Kind.SLOWDOWN)
    has_ended = last < 600

    assert found.summary.startswith(says)
    assert (f" ms each until step {last}, from " in found.summary) is has_ended
    assert (f" by step {last} they take " in found.headline) is has_ended
    assert (Kind.SLOWDOWN in {each.kind for each in diagnose(window, facts, window)}) is not has_ended


def test_parts_keep_their_sums():
    """So the shares of the step are true."""
    window = window_of(ALONE, sweep(2, 2))
    work = own_work_of(window, JobFacts())
    even = as_one_training(window, work, STARTS)

    assert even.step_ns == pytest.approx(work.step_ns, rel=1e-3)
    for part, values in work.parts.items():
        assert even.parts[part].mean() == pytest.approx(float(values.mean()), rel=1e-3)

    assert np.median(even.step[:150]) == pytest.approx(float(np.median(even.step[-150:])), rel=0.05)


def test_ranks_that_wait_for_each_other_are_evened_too():
    """Their communication grows with the model."""
    job = Job(ranks=2, steps=600, own=OWN)

    assert not kinds(job, sweep(2, 2)) & {Kind.SLOWDOWN, Kind.JITTER}


def test_one_training_is_left_alone():
    """Also where the others are outside the window."""
    window = window_of(ALONE)
    work = own_work_of(window, JobFacts())

    assert as_one_training(window, work, ()) is work
    assert as_one_training(window, work, (0, 5, 10_000)) is work


@pytest.mark.parametrize("seed", range(4))
def test_noisy_steps_of_larger_models_are_no_slowdown(seed):
    """On a busy host the steps of a large model vary more than those of a small one: its usual step is less clear."""

    def busy(own, random) -> None:
        sweep(4, 16)(own, random)
        for values in own.values():
            values[:, 400:] *= random.lognormal(0, 0.6, 200)

    assert Kind.SLOWDOWN not in kinds(ALONE, busy, seed=seed)


def test_a_host_that_became_busier_is_told_by_its_cores():
    """In a run of several trainings what took longer may be the model, too: that is not told beside the cores."""

    def slower(own, random) -> None:
        sweep(2, 2)(own, random)
        for values in own.values():
            values[:, 500:] *= 2

    def found(starts) -> set[Kind]:
        facts = JobFacts(other_models=starts, cores={"": 1}, wait_of_ready_time={0: 0.5}, wait_of_wall_time={0: 0.5})
        return {each.kind for each in diagnose(window_of(ALONE, slower), facts)}

    assert found(()) == {Kind.CPU_CONTENTION, Kind.SLOWDOWN}
    assert found(STARTS) == {Kind.CPU_CONTENTION}


def with_sizes(window, sizes):
    return replace(window, elements=np.broadcast_to(np.asarray(sizes, np.float32), window.total.shape))


def test_larger_images_are_no_slowdown():
    """Progressive resizing: also what is outside of the model takes longer, and not in proportion."""
    window = window_of(ALONE, sweep(2.5, 7, parts=tuple(OWN)))
    sizes = np.repeat([1e5, 2e5, 4e5], 200)[window.steps]

    assert Kind.SLOWDOWN not in {each.kind for each in diagnose(with_sizes(window, sizes), JobFacts())}
    assert Kind.SLOWDOWN in {each.kind for each in diagnose(window, JobFacts())}


def test_sizes_divide_a_run_where_they_are_new_and_last():
    """Not batches of all sizes, the last batch of an epoch, or a size that comes back."""
    window = window_of(ALONE)
    first = int(window.steps[0])

    def starts(sizes) -> list[int]:
        return [first + int(part.argmax()) for part in trainings_of(with_sizes(window, sizes[window.steps]), ())][1:]

    assert starts(np.repeat([100, 200, 400], 200)) == [200, 400]
    assert starts(np.repeat([100, 200, 100], 200)) == [200]
    assert starts(np.where(np.arange(600) % 50 == 49, 60, 100)) == []
    assert starts(np.random.default_rng(0).integers(50, 100, 600)) == []
    assert starts(np.zeros(600)) == []


def again(own, _) -> None:
    """Change the model in steps 200 to 399."""
    for part in ("forward", "backward", "optimizer"):
        own[part][:, 200:400] *= 3


def test_a_model_that_is_trained_again_is_no_slowdown():
    """A search that compares models on each fold: the large one is between two trainings of the small one."""
    window = window_of(ALONE, again)

    def found(starts, returns) -> set[Kind]:
        return {each.kind for each in diagnose(window, JobFacts(other_models=starts, same_models=returns))}

    assert Kind.SLOWDOWN not in found(STARTS, {400: 0})
    assert Kind.SLOWDOWN in found((), {})
    first, second = trainings_of(window, STARTS, {400: 0})
    assert set(window.steps[second].tolist()) == set(range(200, 400))
    assert not (first & second).any()


def test_a_batch_size_that_is_taken_again_is_no_slowdown():
    """A search over batch sizes."""
    window = window_of(ALONE, again)
    sizes = np.repeat([1e5, 4e5, 1e5], 200)[window.steps]

    assert Kind.SLOWDOWN not in {each.kind for each in diagnose(with_sizes(window, sizes), JobFacts())}


def test_a_model_that_is_slower_when_trained_again_is_found():
    """Its second training is compared with its first one."""

    def slower(own, random) -> None:
        again(own, random)
        for part in ("forward", "backward"):
            own[part][:, 400:] *= 2

    facts = JobFacts(other_models=STARTS, same_models={400: 0})
    slow = next(each for each in diagnose(window_of(ALONE, slower), facts) if each.kind is Kind.SLOWDOWN)

    assert slow.evidence["shape"] == "stays"
    assert abs(slow.evidence["since_step"] - 400) <= 20


def frozen(own, random) -> None:
    """Train the head first: backward is short until step 300. All steps are delayed alike, by other programs."""
    own["backward"][:, :300] = 0.4
    for part in ("forward", "backward", "optimizer"):
        own[part] += random.exponential(12.0, own[part].shape)


@pytest.mark.parametrize("seed", range(3))
def test_delays_of_a_part_that_takes_no_time_are_no_jitter(seed):
    """They are as long as those of the same part in the other training, which are no finding."""
    facts = JobFacts(other_models=(300,), wait_of_ready_time={0: 0.8}, wait_of_wall_time={0: 0.8}, cores={"": 1})
    found = {each.kind for each in diagnose(window_of(ALONE, frozen, seed=seed), facts)}

    assert found == {Kind.CPU_CONTENTION}


def test_long_steps_are_told_as_they_were():
    """Not as they would be with a model of the mean size."""

    def long(own, random) -> None:
        sweep(1, 8)(own, random)
        own["other"][:, [30, 77, 120, 131, 170, 181]] += 3000

    window = window_of(ALONE, long)
    found = next(each for each in diagnose(window, JobFacts(other_models=STARTS)) if each.kind is Kind.JITTER)
    real = window.total.mean(axis=0)[np.isin(window.steps, [30, 77, 120, 131, 170, 181])] / 1e6

    assert found.evidence["mean_long_ms"] == pytest.approx(float(real.mean()), rel=0.01)
    assert found.evidence["usual_ms"] == pytest.approx(56, abs=10)


def test_a_slowdown_in_the_last_training_has_the_times_of_its_steps() -> None:
    """The second model takes 50 ms, the first 14 ms: no step took 32 ms, the mean, before its data became slower."""

    def faults(own, random):
        own["forward"][:, 400:] += 12.0
        own["backward"][:, 400:] += 24.0
        own["other"][:, 600:] += 30.0

    job = Job(ranks=1, grouped=False, steps=800)
    found, *_ = diagnose(window_of(job, faults), JobFacts(other_models=(400,), trainings_begin=(400,)))

    assert (found.kind, found.phase) == (Kind.SLOWDOWN, "other")
    assert found.evidence["before_ms"] == pytest.approx(50, abs=1)
    assert found.evidence["after_ms"] == pytest.approx(80, abs=1)
    assert found.summary.startswith("Since step 600 a step takes 1.60x as long (8")
