"""Long steps at a fixed distance are named with it, and are no jitter."""

from __future__ import annotations

import numpy as np
import pytest

from tests.diagnosis.fabricated import Fault, Job, adds, at_once, window_of
from tests.diagnosis.stalls.test_gc_pauses import collections, history
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.sampled_lines import SampledLine
from traceml.diagnosis.facts.shared_batches import BatchHistory
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind
from traceml.diagnosis.rules.periodic_steps import regular
from traceml.diagnosis.ruleset import diagnose
from traceml.formatting import ordinal_text

ALONE = Job(ranks=1, steps=300, grouped=False)
SEEN = np.arange(230)


def findings(job: Job, *faults, **facts) -> list[Finding]:
    return diagnose(window_of(job, *faults), JobFacts(world_size=job.ranks, **facts))


@pytest.mark.parametrize("job", [ALONE, Job(ranks=2, steps=300)])
@pytest.mark.parametrize(("part", "every"), [("other", 25), ("other", 10), ("forward", 16)])
def test_every_nth_step_is_named(job, part, every):
    """The distance, the phase, what it costs, and what half as often gains; nothing is called jitter."""
    found = findings(job, adds(part, 150, every=every))

    assert [each.kind for each in found] == [Kind.RESIDUAL_HEAVY]
    assert (found[0].phase, found[0].evidence["every_n_steps"]) == (part, every)
    cost = 150 / every / (14.1 + job.comm * job.grouped + 150 / every)
    assert found[0].cost_share == pytest.approx(cost, rel=0.15)
    assert found[0].speedup_if_fixed == pytest.approx(1 / (1 - cost / 2), rel=0.1)
    assert f"every {ordinal_text(2 * every)} step" in found[0].next
    assert found[0].headline.startswith(f"Every {every}th step is long")


def test_steps_that_evaluate_with_gradients_are_named():
    """Batches of another loader, each with a call of the model: the step waits for all of them, and trains on none."""
    found = findings(ALONE, adds("input_wait", 150, every=10), adds("forward", 90, every=10))[0]

    assert (found.kind, found.phase, found.evidence["every_n_steps"]) == (Kind.RESIDUAL_HEAVY, "forward", 10)
    assert found.evidence["phases"] == ["forward", "input_wait"]
    assert "evaluation" in found.next
    assert found.cost_share == pytest.approx(24 / 38.1, rel=0.1)


@pytest.mark.parametrize(
    "more",
    [(), (adds("forward", 8, every=10),), (adds("forward", 90, every=10), adds("backward", 150, every=10))],
    ids=["first batches of epochs", "a little of forward", "larger batches"],
)
def test_steps_that_wait_for_data_train_on_it(more):
    """Without many calls of the model for one backward pass they do not evaluate."""
    found = findings(ALONE, adds("input_wait", 250, every=10), *more)

    assert found[0].kind is Kind.INPUT_BOUND
    assert "input_wait" not in [part for each in found for part in each.evidence.get("phases", ())]


@pytest.mark.parametrize(("part", "kind"), [("other", Kind.STRAGGLER), ("forward", Kind.COMPUTE_STRAGGLER)])
def test_the_rank_that_the_others_wait_for_in_these_steps_is_named(part, kind):
    """Half of their wait is in the next step: a mean over the ranks would be the length of no step."""
    (found,) = findings(Job(ranks=2, steps=420), adds(part, 500, ranks=(1,), every=100))

    assert (found.kind, found.ranks, found.phase, found.evidence["every_n_steps"]) == (kind, (1,), part, 100)
    assert found.evidence["mean_long_ms"] == pytest.approx(515, rel=0.1)
    assert "on rank 1, in " in found.summary
    assert found.headline.startswith("Rank 1 is slow in every 100th step, in ")


def test_long_steps_of_some_ranks_that_wait_for_nobody_are_theirs():
    """Without a process group no other rank waits."""
    (found,) = findings(Job(ranks=3, steps=300, grouped=False), adds("other", 150, ranks=(0, 2), every=25))

    assert (found.kind, found.ranks) == (Kind.RESIDUAL_HEAVY, (0, 2))


def busy(own, random) -> None:
    """Make forward of any length, as on a host with ten programs per core."""
    own["forward"] *= random.lognormal(1.0, 0.9, own["forward"].shape)


@pytest.mark.parametrize("every", [17, 20])
def test_a_period_is_found_among_steps_of_all_lengths(every):
    """Steps are long by chance as often, but not by other code."""
    starved = {"wait_of_ready_time": {0: 0.9}, "wait_of_wall_time": {0: 0.6}}
    found = findings(Job(ranks=1, steps=400, grouped=False), busy, adds("other", 90, every=every), **starved)

    assert (found[0].kind, found[0].phase) == (Kind.RESIDUAL_HEAVY, "other")
    assert found[0].evidence["every_n_steps"] == every


@pytest.mark.parametrize(("ms", "is_regular"), [(900, True), (130, False)])
def test_few_long_steps_of_a_busy_host_are_regular_if_no_missing_core_explains_them(ms, is_regular):
    """Five of 250 steps, after each epoch: what takes a few times as long on a busy host is not told by chance."""
    starved = {"wait_of_ready_time": {0: 0.4}, "wait_of_wall_time": {0: 0.35}}
    found = findings(Job(ranks=1, steps=250, grouped=False), adds("other", ms, every=45), **starved)

    assert any(each.evidence.get("every_n_steps") == 45 for each in found) is is_regular


def test_noise_at_the_same_distance_is_none_of_the_long_steps():
    """What a long step takes is told without steps that another program made a little longer."""

    def noise(own, random):
        own["other"][:, 17::30] += 20  # milliseconds

    found = findings(ALONE, adds("other", 300, every=30), noise)[0]

    assert found.evidence["every_n_steps"] == 30
    assert found.evidence["mean_long_ms"] == pytest.approx(314, rel=0.05)


def rollouts(until: int):
    """Return a busy host's steps, every tenth of which is long up to one: some longer than all else, some not."""

    def fault(own, random):
        busy(own, random)
        longer = np.where(random.random(own["other"].shape[1]) < 0.6, 500.0, 100.0)
        own["other"][:, 5:until:10] += longer[5:until:10]

    return fault


def test_all_steps_at_the_distance_count_on_a_busy_host():
    """Those that are long, but not unusual there, too: the mean is not that of the longest."""
    found = findings(ALONE, rollouts(300))[0]

    assert (found.evidence["every_n_steps"], found.evidence["long_steps"]) == (10, 29)
    assert found.evidence["mean_long_ms"] == pytest.approx(413, rel=0.05)


def test_steps_at_the_distance_that_are_as_long_as_others_do_not_count():
    """After a while nothing more is done in them."""
    found = findings(ALONE, rollouts(220))[0]

    assert found.evidence["every_n_steps"] == 10
    assert 21 <= found.evidence["long_steps"] <= 22


def test_short_noise_between_long_steps_hides_no_period():
    """Negative samples are drawn before every 64th step; other programs make some steps a little longer."""
    long = np.arange(64, 502, 64)
    noisy = [50, 53, 75, 118, 150, 212, 241, 242, 243, 246, 247, 248, 251, 311, 313, 370, 390, 401]
    steps = np.sort([*long, *noisy])
    every, members = regular(steps, np.where(np.isin(steps, long), 1500.0, 10.0), np.arange(502))

    assert every == 64
    assert steps[members].tolist() == long.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_steps_of_all_lengths_have_no_period(seed):
    """Also if other code is long by chance."""
    window = window_of(ALONE, busy, at_once("other", 90, 0.05), seed=seed)

    assert not any("every_n_steps" in each.evidence for each in diagnose(window, JobFacts()))


def test_long_steps_in_a_small_part_of_the_run_have_no_period():
    """Another program took the cores for 35 of 300 steps: a third of them are long, by chance 3 apart."""

    def stolen(own, _random) -> None:
        own["backward"][:, [131, 134, 137, 140, 143, 152, 155, 158, 161, 164]] += 300

    found = findings(Job(ranks=2, steps=300), stolen)

    assert not any("every_n_steps" in each.evidence for each in found)


def test_the_last_step_makes_no_period():
    """A script that hangs at its end, and two short pauses before at such a distance."""

    def ends(own, _) -> None:
        own["other"][:, [-21, -11]] += 30
        own["other"][:, -1] += 40_000

    assert not any("every_n_steps" in each.evidence for each in findings(ALONE, ends))


def test_one_very_long_step_is_not_every_nth():
    """Once 45 s, in the middle, at a distance at which a few steps are a little longer by chance."""

    def pauses(own, _) -> None:
        own["other"][:, [138, 144, 156, 162]] += 30
        own["other"][:, 150] += 45_000

    found = findings(ALONE, pauses)

    assert found[0].kind is Kind.JITTER
    assert not any("every_n_steps" in each.evidence for each in found)


def test_all_that_is_long_in_these_steps_is_one_finding():
    """Rollouts before every 28th step call the model and an environment; no other cause is told of that time."""
    played = SampledLine(0, "input_wait", "/me/ppo.py", 63, "<module>", "/lib/envs.py:9 step", 60)
    found = findings(ALONE, adds("forward", 300, every=28), adds("other", 200, every=28), lines=(played,))

    assert [(each.kind, each.phase) for each in found] == [(Kind.RESIDUAL_HEAVY, "forward")]
    assert found[0].cost_share == pytest.approx(500 / 28 / (14.1 + 500 / 28), rel=0.15)
    assert found[0].evidence["phases"] == ["forward", "other"]
    assert all(
        "in forward and code outside the known phases: 5" in text for text in (found[0].headline, found[0].summary)
    )


def test_a_part_that_is_next_to_nothing_of_the_time_is_not_named():
    """Also if it is long in all of these steps."""
    found = findings(ALONE, adds("other", 1190, every=16), adds("forward", 60, every=16))

    assert "phases" not in found[0].evidence
    assert "in code outside the known phases: " in found[0].summary


def test_a_small_part_of_all_of_these_steps_is_no_jitter():
    """Stable-baselines3's rollouts: the environment takes 1,190 ms, and the model that is called for it 226 ms."""
    found = findings(ALONE, adds("other", 1190, every=16), adds("forward", 226, every=16))

    assert [(each.kind, each.phase) for each in found] == [(Kind.RESIDUAL_HEAVY, "other")]
    assert found[0].cost_share == pytest.approx(1416 / 16 / (14.1 + 1416 / 16), rel=0.05)


def test_what_is_long_in_some_of_these_steps_is_not_joined():
    """A part that is long by chance in a few of them costs what it costs."""
    found = findings(ALONE, adds("forward", 300, every=28), adds("other", 200, every=112))
    period = next(each for each in found if each.phase == "forward")

    assert period.cost_share == pytest.approx(300 / 28 / (14.1 + 300 / 28 + 200 / 112), rel=0.15)


def test_what_runs_there_is_named_with_its_line():
    """Where the samples of the phase tell it."""
    line = SampledLine(0, "other", "/home/me/train.py", 70, "log_images", None, 80)
    rest = SampledLine(0, "forward", "/home/me/train.py", 40, "main", None, 120)
    found = findings(ALONE, adds("other", 200, every=25), lines=(line, rest))[0]

    assert "train.py:70 log_images" in found.headline
    assert "If half as often is enough, run train.py:70 log_images every 50th step: " in found.next


@pytest.mark.parametrize("grows", [True, False])
def test_long_steps_that_grow_are_told_so(grows: bool) -> None:
    """A log that is read and written as a whole in every 10th step, and one that is appended to."""

    def save(own: dict[str, np.ndarray], random: np.random.Generator) -> None:
        row = own["other"][0]
        at = np.arange(5, row.size, 10)
        row[at] += (at if grows else row.size / 2) * random.lognormal(0, 0.05, at.size)

    line = SampledLine(0, "other", "/home/me/train.py", 70, "save_log", None, 80)
    rest = SampledLine(0, "forward", "/home/me/train.py", 40, "main", None, 120)
    found = findings(ALONE, save, lines=(line, rest))[0]

    assert ("They grow from " in found.summary) is grows
    assert ("Look at what train.py:70 save_log reads, sends or writes as a whole" in found.next) is grows
    assert "If half as often is enough" in found.next
    assert ("after_ms" in found.evidence) is grows
    if grows:
        assert found.evidence["after_ms"] == pytest.approx(14 + 300, rel=0.15)


def test_what_waits_there_is_to_begin_sooner():
    """A shard that another process has not written yet: its line uses no CPU time."""
    waits = SampledLine(0, "other", "/home/me/train.py", 9, "wait_for", None, 80, 4_000_000_000, 40_000_000)
    rest = SampledLine(0, "forward", "/home/me/train.py", 40, "main", None, 120)
    found = findings(ALONE, adds("other", 200, every=25), lines=(waits, rest))[0]

    assert found.next.startswith(
        "train.py:9 wait_for waits there (for a sleep, a disk, a server, another thread or proc"
    )
    assert "Do it in the background, in a thread or another process, and begin what a step needs" in found.next
    assert "make it cheaper" not in found.next


@pytest.mark.parametrize(("library", "grows"), [("/lib/threading.py:295 Condition.wait", True), (None, False)])
def test_what_is_waited_for_may_be_more_after_more_steps(library: str | None, grows: bool) -> None:
    """A queue of uploads that every 25th step joins: half as often it has twice as much in it."""
    waits = SampledLine(0, "other", "/home/me/train.py", 9, "main", library, 80, 4_000_000_000, 0)
    rest = SampledLine(0, "forward", "/home/me/train.py", 40, "main", None, 120)
    found = findings(ALONE, adds("other", 200, every=25), lines=(waits, rest))[0]

    assert ("If half as often is enough, and there is no more to wait for then, run it" in found.next) is grows
    assert ("If half as often is enough, run it every 50th step" in found.next) is not grows


def trains_more(every: int, ms: float) -> list:
    """Return the faults of a second optimizer, which steps in every n-th step."""
    return [adds("forward", ms, every=every), adds("backward", 2 * ms, every=every), adds("optimizer", ms, every=every)]


@pytest.mark.parametrize("every", [5, 16])
@pytest.mark.parametrize("job", [ALONE, Job(ranks=2, steps=300)])
def test_training_more_in_every_nth_step_is_no_finding(job, every):
    """A generator after five updates of its critic, or a policy: neither long steps nor jitter."""
    found = findings(job, *trains_more(every, 10))

    assert [each.kind for each in found] in ([Kind.COMPUTE_BOUND], [Kind.HEALTHY])


def test_other_code_in_the_steps_that_train_more_is_a_finding():
    """Pictures of the generator are drawn in each fifth of its updates."""
    found = findings(ALONE, *trains_more(5, 10), adds("other", 200, every=25))

    assert [(each.kind, each.phase) for each in found] == [(Kind.RESIDUAL_HEAVY, "other")]
    assert found[0].evidence["every_n_steps"] == 25
    assert found[0].evidence.get("phases") is None


def test_the_model_s_own_line_is_not_to_run_half_as_often():
    """Samples of a diffusion model are drawn every 50th step; its forward runs in each step."""
    line = SampledLine(0, "forward", "/home/me/unet.py", 5, "UNet.forward", None, 120)
    rest = SampledLine(0, "backward", "/home/me/train.py", 40, "main", None, 40)
    found = findings(ALONE, adds("forward", 700, every=25), lines=(line, rest))[0]

    assert (found.phase, found.evidence["line"]) == ("forward", 5)
    assert found.next.startswith("If half as often is enough, run what else these steps do with the model (sampling,")
    assert "UNet.forward" not in found.next


def test_an_object_that_each_epoch_makes_is_to_be_made_once():
    """A data set that is made in each epoch is none that may be made in every second one."""
    line = SampledLine(0, "other", "/home/me/data.py", 11, "Pairs.__init__", None, 120)
    rest = SampledLine(0, "backward", "/home/me/train.py", 40, "main", None, 40)
    found = findings(ALONE, adds("other", 700, every=25), lines=(line, rest))[0]

    assert found.next.startswith("If data.py:11 Pairs.__init__ makes the same each time, make it once, before the loop")
    assert "every 50th step" not in found.next


@pytest.mark.parametrize(("part", "collects"), [("forward", True), ("forward", False), ("other", True)])
def test_rollouts_are_made_cheaper_not_rarer(part, collects):
    """The model is called for them before every n-th step; what else runs in these steps may be a log of them."""
    advice = findings(ALONE, adds(part, 200, every=25), collects=collects)[0].next

    assert ("Make rollouts cheaper" in advice) is collects
    assert ("half as often" in advice) is not (collects and part == "forward")


def test_blocks_of_a_long_run_have_the_period_of_its_steps():
    """Every 40th step, in blocks of 64 steps: every 480th was told, the least distance that most blocks show."""
    seen = np.concatenate([np.arange(first, first + 64) for first in range(0, 12_000 - 64, 512)])
    steps = seen[seen % 40 == 0]

    every, members = regular(steps, np.ones(len(steps)), seen)

    assert (every, members.all()) == (40, True)


def test_a_counter_that_begins_anew_in_each_epoch_has_a_period():
    """Every 25th step of epochs of 60 steps."""
    steps = np.array([24, 49, 84, 109, 144, 169])

    assert regular(steps, np.ones(6), SEEN)[0] == 25


@pytest.mark.parametrize(
    "steps", [[3, 50, 90, 137], [5, 17, 60, 100, 133, 190], [7, 8, 9, 10, 11], [10, 12, 14, 80, 82, 84]]
)
def test_other_long_steps_have_no_period(steps):
    """Four by chance, also with one distance twice; a pause of some steps; and clumps of every second step."""
    assert regular(np.array(steps), np.ones(len(steps)), SEEN) is None


def test_long_steps_in_rows_have_no_period():
    """Long episodes of REINFORCE come in rows, in which every second step is long, too."""
    episodes = [103, 104, 105, 106, 109, 112, 124, 126, 127, 128, *range(131, 143), *range(165, 171), *range(206, 225)]

    assert regular(np.array(episodes), np.ones(len(episodes)), SEEN) is None


def test_long_steps_at_shorter_distances_have_no_period():
    """On a busy host many steps in a row were long: each has another one five steps away, and others between."""
    assert regular(np.array([22, 27, 30, 31, 34, 35, 36, 39, 42, 46, 47, 57]), np.ones(12), SEEN) is None


@pytest.mark.parametrize("seed", range(5))
def test_rare_long_steps_by_chance_stay_jitter(seed):
    """There is no period in chance."""
    found = diagnose(window_of(ALONE, at_once("other", 150, 0.04), seed=seed), JobFacts())

    assert [each.kind for each in found] == [Kind.JITTER]


@pytest.mark.parametrize("waited", [0.0, 0.5])
def test_a_few_long_steps_without_cores_have_no_period(waited):
    """Of 36 steps six may be at one distance by chance, where each step waits for a core."""
    job = Job(ranks=2, steps=36)
    found = findings(job, adds("backward", 900, every=6), wait_of_ready_time=dict.fromkeys((0, 1), waited))

    assert any("every_n_steps" in each.evidence for each in found) is (waited == 0.0)


@pytest.mark.parametrize(
    ("line_share", "words"), [(0.3, "long, mostly in a.py:8 step"), (0.48, "long, in a.py:8 step")]
)
def test_a_line_with_a_part_of_the_long_steps_has_not_all_of_it(line_share, words):
    """The model is called between the steps of an environment, in the same phase."""
    line = {"file": "/x/a.py", "line": 8, "function": "step", "line_share": line_share}
    found = Finding.of(
        Kind.RESIDUAL_HEAVY, summary="", next="", phase="other", evidence={"every_n_steps": 16, **line}, cost_share=0.5
    )

    assert words in found.headline


@pytest.mark.parametrize(("samples", "is_told"), [(70, False), (97, True)])
def test_an_iterator_is_not_told_of_what_the_long_steps_have(samples, is_told):
    """One that collects for every tenth step takes all of its time there; one that takes more, also elsewhere."""
    waits = SampledLine(
        0, "input_wait", "/me/dqn.py", 18, "<module>", "/lib/torchrl/collectors/_single.py:9 f", samples
    )
    other = SampledLine(0, "other", "/me/dqn.py", 22, "<module>", None, 100 - samples)
    found = findings(ALONE, adds("other", 150, every=10), adds("other", 8), lines=(waits, other))

    assert found[0].evidence["every_n_steps"] == 10
    assert any(each.kind is Kind.INPUT_BOUND for each in found) is is_told


@pytest.mark.parametrize("more", [(), (adds("input_wait", 20.0, (1,)),)], ids=["alone", "beside a late rank"])
def test_long_steps_between_two_meetings_of_the_ranks_are_told_once(more: tuple[Fault, ...]) -> None:
    """In local SGD ranks meet in each 8th step; without a plot in each 10th the others are not shorter."""
    job = Job(ranks=4, steps=400, meets_every=8)
    window = window_of(job, adds("other", 120.0, every=10), *more)

    findings = diagnose(window, JobFacts(world_size=4, batches=BatchHistory()))

    assert [each.kind for each in findings if each.phase in ("other", "comm")] == [Kind.RESIDUAL_HEAVY]
    assert all("Every 10th step takes" in each.summary for each in findings if each.phase == "other")
    assert not any(each.kind is Kind.JITTER for each in findings)


def at(part: str, ms: float, every: int, first: int) -> Fault:
    """Return a fault in each n-th step of all ranks, from one step on."""

    def fault(own: dict[str, np.ndarray], random: np.random.Generator) -> None:
        own[part][:, first::every] += ms

    return fault


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize(
    ("other", "kinds"),
    [
        (at("forward", 1000.0, 50, 49), {"forward": 50, "other": 10}),
        (at("forward", 300.0, 25, 24), {"forward": 25, "other": 10}),
        (at("checkpoint", 1000.0, 50, 45), {"other": 10}),
    ],
    ids=["evaluates", "evaluates more often", "saves in some of them"],
)
def test_a_loop_has_work_at_several_distances(other: Fault, kinds: dict[str, int], ranks: int) -> None:
    """It logs in each 10th step. Some of these are longer for another cause, whose time is not that of logging."""
    job, logs = Job(ranks=ranks, grouped=ranks > 1, steps=800), at("other", 120.0, 10, 5)

    findings = diagnose(window_of(job, logs, other), JobFacts(world_size=ranks))

    found = {each.phase: each for each in findings if each.kind is Kind.RESIDUAL_HEAVY}
    assert {phase: each.evidence["every_n_steps"] for phase, each in found.items()} == kinds
    assert found["other"].evidence["mean_long_ms"] == pytest.approx(136, abs=4)
    assert not any(each.kind is Kind.JITTER for each in findings)


def test_two_distances_of_one_part_are_told_with_the_line_of_one() -> None:
    """No step takes the mean of those that log and those that evaluate; the samples do not tell these apart."""
    job = Job(ranks=1, grouped=False, steps=800)
    lines = (
        SampledLine(0, "other", "/x/train.py", 7, "evaluate", None, 110),
        SampledLine(0, "other", "/x/train.py", 8, "log", None, 30),
        SampledLine(0, "backward", "/x/train.py", 9, "main", None, 70),
    )
    window = window_of(job, at("other", 60.0, 10, 5), at("other", 1000.0, 50, 49))

    seldom, often = diagnose(window, JobFacts(lines=lines))

    assert seldom.summary.startswith("Every 50th step takes 1.0")
    assert "in train.py:7 evaluate: " in seldom.summary
    assert often.summary.startswith("Every 10th step takes 74")
    assert "in code outside the known phases: " in often.summary


def test_the_line_of_long_steps_that_also_collect_garbage_is_named():
    """A plot makes many objects: samples are of the collections, too, which another finding has."""
    pauses = history(r0=collections(150, every=10))
    seen = [
        SampledLine(0, "other", "/home/me/train.py", 70, "plot", None, 138),
        SampledLine(0, "forward", "/home/me/train.py", 40, "main", None, 62),
    ]
    found = findings(ALONE, adds("other", 300, every=10), pauses=pauses, lines=seen)

    assert {each.kind for each in found} == {Kind.GC_PAUSES, Kind.RESIDUAL_HEAVY}
    periodic = next(each for each in found if each.kind is Kind.RESIDUAL_HEAVY)
    assert "in train.py:70 plot" in periodic.summary
