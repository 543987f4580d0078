"""Rare long steps name their line where the samples tell it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from msgspec.structs import replace

from tests.diagnosis.fabricated import MS, Fault, Job, adds, at_once, takes_turns, window_of
from traceml.database.schema import IMPORTING
from traceml.database.snapshots.rank_snapshot import FrameSnapshot, RankSnapshot
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.progress.rank_progress import JobProgress
from traceml.diagnosis.facts.run_time import RunTime
from traceml.diagnosis.facts.sampled_lines import SampledLine
from traceml.diagnosis.facts.trainings.models_and_loaders import LoaderFacts
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind, Severity
from traceml.diagnosis.ruleset import diagnose

ALONE = Job(ranks=1, steps=400, grouped=False)
FILE = "/home/me/train.py"


def jitter(job: Job, *faults, lines: tuple[SampledLine, ...]) -> Finding:
    found = diagnose(window_of(job, *faults), JobFacts(world_size=job.ranks, lines=lines))
    return next(each for each in found if each.kind is Kind.JITTER)


def sampled(job: Job) -> tuple[SampledLine, ...]:
    """Return samples of a function in the loop, and of forward, on each rank."""
    each = [
        (rank, *place) for rank in range(job.ranks) for place in (("other", "rebuild", 60), ("forward", "main", 140))
    ]
    return tuple(SampledLine(rank, part, FILE, 70, name, None, count) for rank, part, name, count in each)


def test_the_line_of_rare_long_steps_is_named():
    """Nearly all other code is in them: in summary, advice and evidence."""
    found = jitter(ALONE, at_once("other", 200, 0.03), lines=sampled(ALONE))

    assert "mostly in train.py:70 rebuild" in found.summary
    assert "train.py:70 rebuild" in found.next
    assert (found.evidence["file"], found.evidence["line"], found.evidence["function"]) == (FILE, 70, "rebuild")
    assert 0.2 < found.evidence["line_share"] < 0.4


@pytest.mark.parametrize("workers", [0, 4])
def test_workers_that_the_loader_has_are_no_advice(workers: int) -> None:
    """They read ahead already."""
    loader = LoaderFacts(num_workers=workers)
    window = window_of(Job(steps=400), adds("input_wait", 200, (1,), chance=0.02))

    found = next(each for each in diagnose(window, JobFacts(loader=loader)) if each.kind is Kind.JITTER)

    assert found.phase == "input_wait"
    assert ("num_workers" in found.next) is (not workers)


@pytest.mark.parametrize(("samples", "named"), [(60, True), (15, False)])
def test_imports_in_long_steps_are_named(samples: int, named: bool) -> None:
    """They take as long at the start of the script, so no gain is promised."""
    lines = (
        SampledLine(0, "other", FILE, 70, "metrics", f"{IMPORTING}:1207 _handle_fromlist", samples),
        SampledLine(0, "forward", FILE, 90, "main", None, 140),
    )
    found = jitter(ALONE, at_once("other", 200, 0.03), lines=lines)

    assert ("mostly in imports of train.py:70 metrics: " in found.summary) is named
    assert found.next.startswith("Import these modules at the start") is named
    assert (found.speedup_if_fixed == 1.0) is named


@pytest.mark.parametrize(("step", "is_known"), [(200, True), (120, False)])
def test_a_long_step_in_which_its_rank_was_stuck_has_its_line(step: int, is_known: bool) -> None:
    """Samples show code that gives up the GIL, and nothing else."""
    frame = FrameSnapshot(file=FILE, line=8, function="main", is_user=True)
    stuck = RankSnapshot(at_ns=1, rank=0, quiet_s=15.0, step=step, in_step=True, phase="other", frames=(frame,))
    faults = (adds("other", 100, every=150), adds("other", 30_000, every=ALONE.steps))
    facts = JobFacts(lines=sampled(ALONE), progress=JobProgress(longest_pauses={0: stuck}))
    found = next(each for each in diagnose(window_of(ALONE, *faults), facts) if each.kind is Kind.JITTER)

    assert ("mostly in train.py:8 main" in found.summary) is is_known


def test_long_steps_are_no_steady_cost():
    """An asynchronous save makes the next steps long, too: 8 % of them. All steps together are not what is slow."""
    found = diagnose(window_of(ALONE, at_once("other", 200, 0.08)), JobFacts(lines=sampled(ALONE)))

    assert [each.kind for each in found] == [Kind.JITTER]
    assert "mostly in train.py:70 rebuild" in found[0].summary


def test_a_steady_cost_beside_long_steps_is_told_without_them():
    """Its bar on the card includes them."""
    job = Job(ranks=1, steps=400, grouped=False, own={"forward": 8.0, "backward": 7.0, "optimizer": 1.0, "other": 6.0})
    found = diagnose(window_of(job, at_once("other", 200, 0.08)), JobFacts())

    steady = next(each for each in found if each.kind is Kind.RESIDUAL_HEAVY)
    assert "not counting rare long steps" in steady.summary
    assert steady.cost_share == pytest.approx(6 / (22 + 200 * 0.08), rel=0.3)


def test_one_step_that_is_nearly_all_of_it_is_reported_alone():
    """The mean of a pause of 30 s and two of 100 ms is no time that any step took."""
    short, one = adds("other", 100, every=150), adds("other", 30_000, every=ALONE.steps)
    alone = jitter(ALONE, short, one, lines=())
    alike = jitter(ALONE, at_once("other", 200, 0.03), lines=())

    assert alone.summary.startswith("One of 390 steps takes 30"), alone.summary
    assert alone.headline.startswith("One step takes far longer than the rest: ")
    assert alike.headline.startswith("Some steps take far longer than the rest: ")
    assert "without it steps would be" in alone.summary
    assert "One of" not in alike.summary
    assert "without them steps would be" in alike.summary


def test_pauses_are_told_without_the_shorter_steps_beside_them():
    """Two waits of 3 s for a lock, and eight steps of 60 ms: 10 steps of 650 ms were none of them."""
    found = jitter(ALONE, adds("other", 60, every=45), adds("other", 3_000, every=190), lines=())

    assert found.summary.startswith("2 of 390 steps take 3."), found.summary
    assert found.evidence["long_steps"] == 2
    assert found.evidence["mean_long_ms"] == pytest.approx(3_000, rel=0.1)


@pytest.mark.parametrize(
    ("wait_of_ready_time", "wait_of_wall_time", "line", "told"),
    [(0.5, 0.5, False, False), (0.5, 0.5, True, True), (0.5, 0.05, False, True), (0.1, 0.5, False, True)],
    ids=["oversubscribed", "a line", "waits little", "has its cores"],
)
def test_long_steps_cost_more_than_waiting_for_a_core(wait_of_ready_time, wait_of_wall_time, line, told):
    """On an oversubscribed host a rank without a core for half of its time has long steps in whatever it does most."""
    window = window_of(ALONE, at_once("other", 200, 0.03))
    lines = sampled(ALONE) if line else ()
    found = diagnose(
        window,
        JobFacts(wait_of_ready_time={0: wait_of_ready_time}, wait_of_wall_time={0: wait_of_wall_time}, lines=lines),
    )

    assert any(each.kind is Kind.JITTER for each in found) == told


def searches(own, random) -> None:
    """The first calls of L-BFGS have more iterations: whole passes, a few steps in a row."""
    for part in ("forward", "backward", "optimizer"):
        own[part][:, 300:306] += 80


def test_steps_in_a_row_with_more_of_everything_are_more_work():
    """In one part they are irregular."""
    found = diagnose(window_of(ALONE, searches), JobFacts())
    in_one_part = jitter(ALONE, lambda own, random: own["optimizer"].__setitem__(np.s_[:, 300:306], 240), lines=())

    assert Kind.JITTER not in {each.kind for each in found}
    assert in_one_part.phase == "optimizer"


@pytest.mark.parametrize(("ranks", "waits", "told"), [(2, (1,), True), (2, (0, 1), False), (4, (1, 2, 3), False)])
def test_rare_waits_for_data_of_some_ranks_are_long_steps(ranks, waits, told):
    """The first batch of an epoch takes 2 s, three times: too rarely to call the rank slow."""

    def first_batches(own, random):
        for step in (60, 150, 301):
            own["input_wait"][list(waits), step] += 2_000

    found = diagnose(window_of(Job(ranks=ranks, steps=400), first_batches), JobFacts(world_size=ranks))
    rare = [each for each in found if each.kind is Kind.JITTER]

    assert bool(rare) == told
    if told:
        assert rare[0].summary.startswith("3 of 390 steps take 2.0"), rare[0].summary
        assert rare[0].phase == "input_wait"
        assert "the first batch of an epoch" in rare[0].next


@pytest.mark.parametrize(("part", "told"), [("other", True), ("forward", False)])
def test_long_code_is_seen_in_steps_of_any_length(part, told):
    """Beside other programs steps take 2 ms or 200 ms by chance, and code outside the phases next to nothing."""
    busy = Job(ranks=1, steps=400, grouped=False, own={"forward": 20.0, "backward": 20.0, "other": 0.3}, sigma=1.4)
    window = window_of(busy, at_once(part, 900, 0.04))
    found = diagnose(window, JobFacts(world_size=1, lines=sampled(busy)))
    long = next((each for each in found if each.kind is Kind.JITTER), None)

    assert (long is not None and "rebuild" in long.summary) is told


def test_steps_of_any_length_are_no_long_code():
    """Neither are those whose code outside the phases takes a part of what they take more."""
    busy = Job(ranks=1, steps=400, grouped=False, own={"forward": 20.0, "backward": 20.0, "other": 5.0}, sigma=1.4)

    assert Kind.JITTER not in {each.kind for each in diagnose(window_of(busy), JobFacts(lines=sampled(busy)))}


@pytest.mark.parametrize("fault", [at_once("optimizer", 100, 0.03), adds("optimizer", 100, every=30)])
def test_long_steps_of_all_optimizers_are_none_of_the_network(fault: Fault) -> None:
    """A preconditioner that is computed anew at times, after the ranks have met: none is late."""
    (found,) = diagnose(window_of(Job(steps=220), fault), JobFacts(world_size=2))

    assert found.phase == "optimizer"


@pytest.mark.parametrize("part", ["other", "optimizer", "forward"])
def test_long_steps_of_one_rank_are_reported_once(part):
    """Before or after the point at which the ranks meet: the others wait in the same step or in the next one."""
    found = diagnose(window_of(Job(ranks=2, steps=400), adds(part, 200, (1,), chance=0.04)), JobFacts(world_size=2))

    assert [each.ranks for each in found] == [(1,)]
    assert found[0].kind.rule.is_straggler
    assert found[0].speedup_if_fixed == pytest.approx(1.37, abs=0.03)


def test_waiting_that_no_work_explains_is_communication():
    """A network that stalls now and then: no part of the ranks' own work is named."""
    window = window_of(Job(ranks=2, steps=400))
    window.total[:, 5::40] += 150 * MS
    window.times["backward"][:, 5::40] += 150 * MS
    window.wait[:, 5::40] += 150 * MS

    found, near = (
        next(each for each in diagnose(window, JobFacts(world_size=2, hosts=hosts)) if each.kind is Kind.JITTER)
        for hosts in ({}, {0: "a", 1: "a"})
    )

    assert found.phase == near.phase == "comm"
    assert "network" in found.next
    assert "network" not in near.next  # the ranks are on one host


def test_no_line_is_named_where_most_of_the_phase_is_in_usual_steps():
    """Forward runs in all steps, so its samples do not tell what the long ones do."""
    found = jitter(ALONE, at_once("forward", 120, 0.02), lines=sampled(ALONE))

    assert found.phase == "forward"
    assert "line" not in found.evidence
    assert "mostly in the forward pass" in found.summary or "mostly in forward" in found.summary


@pytest.mark.parametrize(("collects", "forward_ms"), [(True, 300), (True, 20), (False, 300)])
def test_rare_long_steps_that_call_the_model_may_be_rollouts(collects: bool, forward_ms: float) -> None:
    """Self-play between the iterations of a short run: too few long steps for a distance."""

    def play(own, random):
        own["forward"][:, [90, 190, 290]] += forward_ms
        own["other"][:, [90, 190, 290]] += 400

    found = diagnose(window_of(ALONE, play), JobFacts(collects=collects))
    long = next(each for each in found if each.kind is Kind.JITTER)

    assert long.next.startswith("Make rollouts cheaper. ") is (collects and forward_ms > 100)


def test_two_steps_with_nearly_all_of_it_are_told_alone():
    """One rank pauses between two steps, the other waits in the next one: the mean over ranks has half in each."""

    def pause(own, random):
        own["other"][:, [200, 201]] += 5500
        own["other"][:, ::40] += 30

    found = jitter(ALONE, pause, lines=())

    assert found.summary.startswith("2 of 390 steps take 5.5")
    assert found.evidence["long_steps"] == 2


def test_without_samples_the_lines_are_pointed_to():
    """The advice is no longer to wrap code in phases."""
    found = jitter(ALONE, at_once("other", 200, 0.03), lines=())

    assert "traceml report --lines" in found.next
    assert "traceml.phase" not in found.next


@pytest.mark.parametrize(("waited", "threads", "found"), [(0.02, 1, True), (0.02, 8, False), (0.2, 1, False)])
def test_turns_cost_more_than_waiting_for_cores(waited: float, threads: int, found: bool) -> None:
    """Ranks that mostly sleep wait for a core in much of the little time in which they have work."""
    facts = JobFacts(
        world_size=2,
        threads=threads,
        wait_of_ready_time={0: 0.2, 1: 0.2},
        wait_of_wall_time=dict.fromkeys((0, 1), waited),
    )

    said = diagnose(window_of(Job(ranks=2), takes_turns("forward", 30, (0, 1))), facts)

    assert any("take turns being slow" in each.summary for each in said) == found


@pytest.mark.parametrize(("sigma", "ranks"), [(0.1, 2), (0.1, 4), (0.8, 4)])
def test_code_that_ranks_run_in_turns_is_told_as_such(sigma: float, ranks: int) -> None:
    """It costs a step all of it, and each rank a part; where all run it in each step, noise is no turn."""
    facts = JobFacts(world_size=ranks)
    job = Job(ranks=ranks, sigma=sigma)

    (turns,) = diagnose(window_of(job, takes_turns("other", 40, tuple(range(ranks)))), facts)
    assert (turns.kind, turns.ranks) == ("RESIDUAL_HEAVY", ())
    assert "by the ranks in turns" in turns.summary
    assert "in the same steps" in turns.next

    noisy = Job(ranks=ranks, sigma=sigma, own={**Job().own, "other": 20.0})
    found = next(each for each in diagnose(window_of(noisy), facts) if each.kind == "RESIDUAL_HEAVY")
    assert "in turns" not in found.summary


@pytest.mark.parametrize(("ms", "is_uneven"), [(40, True), (0, False)])
def test_code_that_takes_another_rank_longest_in_each_step_is_uneven(ms: int, is_uneven: bool) -> None:
    """All ranks spend 20 ms in it, and one in turn 40 ms more: steps lose 60 ms, though each has 33 ms on average."""
    job = Job(ranks=3, own={**Job().own, "other": 20.0})

    said = diagnose(window_of(job, takes_turns("other", ms, (0, 1, 2))), JobFacts(world_size=3))
    found = next(each for each in said if each.kind == "RESIDUAL_HEAVY")

    assert ("unevenly: a rank spends 3" in found.summary) == is_uneven
    assert ("the others wait for the longest" in found.summary) == is_uneven
    assert ("give each rank as much of it in the same step" in found.next) == is_uneven
    assert "in turns" not in found.summary


@pytest.mark.parametrize(("evaluations", "kinds"), [(10, {Kind.EVAL_HEAVY}), (2, {Kind.EVAL_HEAVY, Kind.JITTER})])
def test_waiting_for_the_evaluation_of_a_rank_is_not_the_network(evaluations: int, kinds: set[Kind]) -> None:
    """Ten steps are long, after ten evaluations on rank 0; two evaluations leave most of them to explain."""
    window = window_of(Job(ranks=2, steps=400))
    window.total[:, 5::40] += 150 * MS
    window.times["backward"][:, 5::40] += 150 * MS
    window.wait[:, 5::40] += 150 * MS
    parts = {"steps": 9.0, "evaluation": 0.75}
    time = replace(RunTime.of(10.0, parts, evaluations), evaluators=(0,), evaluators_s=1.5)

    found = diagnose(window, JobFacts(world_size=2, time=time))

    assert {each.kind for each in found if each.severity is not Severity.INFO} == kinds
    assert next(each.ranks for each in found if each.kind is Kind.EVAL_HEAVY) == (0,)


def pauses(own, random) -> None:
    """Rank 1 waits for 11 s behind the point at which the ranks meet: rank 0 waits for it in its next step."""
    own["other"][1, 200] += 11_000
    own["other"][:, ::40] += 30


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_pause_for_which_the_others_wait_is_one_long_step(ranks):
    """The mean over ranks has a part of it in each of two steps, neither of which took as long as said."""
    found = jitter(Job(ranks=ranks, steps=400), pauses, lines=())

    assert found.summary.startswith("One of 390 steps takes 11."), found.summary
    assert found.evidence["long_steps"] == 1


@pytest.mark.parametrize("ranks", [2, 3, 16])
def test_waiting_for_a_rank_that_was_late_in_the_step_before_is_no_network(ranks):
    """Any rank may have such steps. In a mean over many ranks, only the step after it is long."""

    def reloads(own, random):
        for step in 15 + np.cumsum(random.integers(5, 20, 30)):
            own["other"][random.integers(ranks), step] += 300

    found = jitter(Job(ranks=ranks, steps=600), reloads, lines=())

    assert (found.phase, found.ranks) == ("other", ())
    assert found.summary.startswith("30 of 590 steps take 31"), found.summary
    assert found.cost_share == pytest.approx(30 * 300 / (590 * 16.5 + 30 * 300), abs=0.03)
    assert "network" not in found.next


@pytest.mark.parametrize(("others", "named"), [(0, (1,)), (40, ())])
def test_the_rank_of_a_pause_is_named_if_it_alone_runs_the_line(others, named):
    """Few long steps may be those of one rank by chance, but not in a line that the others do not run."""
    seen = [(1, "other", "stall", 60), (0, "other", "stall", others), *((r, "forward", "main", 140) for r in (0, 1))]
    lines = tuple(SampledLine(rank, part, FILE, 70, name, None, count) for rank, part, name, count in seen if count)
    found = jitter(Job(ranks=2, steps=400), pauses, lines=lines)

    assert found.ranks == named
    assert ("on rank 1, mostly in train.py:70 stall" in found.summary) == bool(named)


def test_long_backward_that_was_not_measured_may_be_computation() -> None:
    """The network is one of two causes then."""
    job, pauses = Job(ranks=4, steps=960, callback_every=16), adds("backward", 100, chance=0.01)
    found, known = (jitter(each, pauses, lines=()) for each in (job, dataclasses.replace(job, callback_every=1)))

    assert (found.phase, found.ranks) == (None, ())
    assert ", mostly in backward or communication: " in found.summary
    assert "No rank's own work is longer" not in found.next
    assert found.evidence["excess_ms_by_phase"]["unknown"] > 0
    assert known.phase == "backward"


def test_a_part_that_many_steps_lack_has_a_limit() -> None:
    """It is no larger than a 32-bit number of nanoseconds can be: pytest makes an error of the warning."""

    def seldom(own: dict[str, np.ndarray], _: np.random.Generator) -> None:
        own["user"][0] = np.where(np.arange(400) % 4 > 0, 60.0, 0.0)

    found = diagnose(window_of(ALONE.scaled(5), seldom), JobFacts())

    assert found[0].kind is Kind.RESIDUAL_HEAVY
