"""Steps that become slower, and runs that only look so."""

from __future__ import annotations

from collections.abc import Callable, Container
from functools import partial

import numpy as np
import pytest
from msgspec.structs import replace

from tests.diagnosis.fabricated import Job, adds, window_of
from tests.diagnosis.facts.watched_workers import worker_rows
from traceml.database.schema import HOST, LINE_OTHER, LINES, PROCESS, Phase, Resource
from traceml.database.states import RunStatus
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.machine_use import MachineSamples
from traceml.diagnosis.facts.resource_use import ResourceUse
from traceml.diagnosis.facts.sampled_lines import DividedLines, LineCounts, SampledLine
from traceml.diagnosis.facts.trainings.models_and_loaders import LoaderFacts
from traceml.diagnosis.facts.worker_history import WorkerHistory
from traceml.diagnosis.kinds import Kind, Severity
from traceml.diagnosis.rules.slowdowns.slowdown import slowdown
from traceml.diagnosis.ruleset import diagnose
from traceml.diagnosis.steps.own_work import own_work_of
from traceml.diagnosis.steps.step_history import StepHistory

METRICS = (SampledLine(0, "other", "/x/train.py", 23, "metrics", None, 180),)
MS = 1e6
BINS, WIDTH = 60, 16
AT = np.arange(BINS)


def history(change, *, noise=0.02, seed=0, part="other", alike=False):
    """Return a run of 20 ms steps whose bins are longer by `change` milliseconds, in one part or in all alike."""
    random = np.random.default_rng(seed)
    usual = {"forward": 6.0, "backward": 10.0, "optimizer": 2.0, "other": 2.0}
    usual |= {} if part in usual else {part: 2.0}
    longer = np.broadcast_to(change, BINS)
    parts = {}
    for name, ms in usual.items():
        values = ms * random.lognormal(0, noise, BINS)
        values = values * (1 + longer / 20) if alike else values + (longer if name == part else 0)
        parts[name] = values * MS

    return StepHistory(AT * WIDTH, np.full(BINS, WIDTH), sum(parts.values()), parts)


def found(change, *lines, wait_of_ready_time=None, **options):
    return slowdown(history(change, **options), JobFacts(lines=lines, wait_of_ready_time=wait_of_ready_time or {}))


def test_a_jump_that_stays_is_reported_with_its_step():
    """From 20 to 40 ms at bin 20, in one phase."""
    (finding,) = found(np.where(AT >= 20, 20.0, 0.0))

    evidence = finding.evidence
    assert (finding.kind, finding.phase, evidence["shape"]) == (Kind.SLOWDOWN, "other", "stays")
    assert abs(evidence["since_step"] - 20 * WIDTH) <= WIDTH
    assert evidence["factor"] == pytest.approx(2, rel=0.05)
    assert finding.cost_share == pytest.approx(0.4, abs=0.03)
    assert finding.headline == f"Steps take 2.0x as long since step {evidence['since_step']}"


@pytest.mark.parametrize(
    ("part", "since", "told"), [("optimizer", 20, True), ("forward", 20, False), ("optimizer", 16, False)]
)
def test_denormal_numbers_are_told_where_the_optimizer_becomes_slower(part: str, since: int, told: bool) -> None:
    """Averages of weights without gradients shrink to such numbers after some hundred steps, and not in 256."""
    (finding,) = found(np.where(since <= AT, 20.0, 0.0), part=part)

    assert (finding.phase, "torch.set_flush_denormal(True)" in finding.next) == (part, told)


@pytest.mark.parametrize(("width", "told"), [(WIDTH, True), (4, False)])
def test_denormal_numbers_are_told_where_the_optimizer_grows_until_later_steps(width: int, told: bool) -> None:
    """More and more averages shrink to such numbers, of a run of 960 steps and not of 240."""
    grows = history(AT * 1.0, part="optimizer")
    shorter = replace(grows, first_step=AT * width, steps=np.full(BINS, width))
    lines = (
        SampledLine(0, "optimizer", "/x/train.py", 23, "Lion.step", None, 180),
        SampledLine(0, "forward", "/x/train.py", 40, "Net.forward", None, 120),
    )

    (finding,) = slowdown(shorter, JobFacts(lines=lines))

    assert (finding.evidence["shape"], finding.evidence["since_step"]) == ("growth", 0)
    assert ("torch.set_flush_denormal(True)" in finding.next) is told
    assert "train.py:23 Lion.step" in finding.next


@pytest.mark.parametrize(
    ("elements", "explains", "severity"),
    [
        (2000, True, Severity.INFO),
        (1600, True, Severity.CRITICAL),
        (1250, False, Severity.CRITICAL),
        (800, False, Severity.CRITICAL),
    ],
)
def test_larger_batches_are_told_where_they_explain_longer_steps(elements, explains, severity):
    """A curriculum of longer sequences makes all phases longer: no fault, if a sample takes no longer than before."""
    longer = AT >= 20
    run = replace(history(np.where(longer, 20.0, 0.0), alike=True), elements=np.where(longer, elements, 1000.0))
    (finding,) = slowdown(run, JobFacts())

    assert (f"Meanwhile batches were {elements / 1000:.2g}" in finding.summary) is explains
    assert (finding.evidence.get("changed") == {"batch_elements": [1000, elements]}) is explains
    assert finding.next.startswith("If larger batches are meant") is explains
    assert finding.severity is severity
    assert ("costs" in finding.summary) is (finding.gain is not None) is (severity is Severity.CRITICAL)


@pytest.mark.parametrize(("last", "is_fault"), [(2.0, False), (1.2, True)])
def test_steps_with_larger_batches_are_a_remark(last, is_fault):
    """A warm-up of the batch size doubles batches and steps, which vary so much that a line does not show it."""

    def grow(own, _random):
        for name in own:
            own[name] *= np.linspace(1, 2, own[name].shape[1])

    window = window_of(Job(steps=900, ranks=1, comm=0.0, sigma=0.6).scaled(4), grow)
    elements = np.broadcast_to(np.linspace(1000, 1000 * last, len(window)), (1, len(window))).astype(np.float32)
    findings = diagnose(replace(window, elements=elements), JobFacts())

    (at,) = (number for number, each in enumerate(findings) if each.kind is Kind.SLOWDOWN)
    assert (at == 0) is is_fault


def test_elements_of_batches_are_in_the_history():
    """Those of all ranks, where they are known."""
    window = window_of(Job(ranks=2))
    rows = np.full((2, len(window)), 16.0, np.float32)
    known = replace(window, elements=rows)
    histories = [StepHistory.of(each, own_work_of(each, JobFacts())) for each in (window, known)]

    assert histories[0].elements.tolist() in ([], [0.0] * len(histories[0].steps))
    assert set(histories[1].elements.tolist()) == {32.0}


def test_a_jump_that_recovers_and_a_slow_start_end():
    """Both have a last step."""
    (between,) = found(np.where((AT >= 20) & (AT < 40), 20.0, 0.0))
    (first,) = found(np.where(AT < 15, 20.0, 0.0))

    assert between.evidence["shape"] == "recovers"
    assert abs(between.evidence["until_step"] - 40 * WIDTH) <= WIDTH
    assert first.evidence["shape"] == "first"
    assert abs(first.evidence["until_step"] - 15 * WIDTH) <= WIDTH
    assert first.summary.startswith("Until step ")


@pytest.mark.parametrize(("busy", "says"), [(0.05, "waits for then (for a sleep, a disk,"), (0.95, "does only then.")])
def test_a_line_that_waits_longer_does_no_more(busy, says):
    """A log that is flushed to a disk which others begin to use; code that computes does more."""
    line = replace(METRICS[0], watched_ns=int(1e9), cpu_ns=int(busy * 1e9))

    rest = SampledLine(0, "backward", "/x/train.py", 30, "<module>", None, 180)

    (finding,) = found(np.where(AT >= 20, 20.0, 0.0), line, rest)

    assert finding.next.startswith(f"Look at what train.py:23 metrics {says}")


def test_growth_is_reported_with_its_rate_and_line():
    """0.02 ms more in each step: 20 ms in 960."""
    line = SampledLine(0, "other", "/x/train.py", 23, "smooth", None, 90)
    rest = SampledLine(0, "forward", "/x/train.py", 5, "forward", None, 110)

    (finding,) = found(AT * WIDTH * 0.02, line, rest)

    assert finding.evidence["shape"] == "growth"
    assert finding.evidence["growth_ms_per_step"] == pytest.approx(0.02, rel=0.1)
    assert finding.evidence["function"] == "smooth"
    assert "train.py:23 smooth" in finding.next


@pytest.mark.parametrize(("function", "may_be_hook"), [("watch", True), ("Net.forward", False)])
def test_hooks_that_are_registered_in_each_step_are_a_cause_of_growth_in_forward(function, may_be_hook):
    """The same function runs once more in each step."""
    usual = {"forward": 2.0, "backward": 1.5, "optimizer": 0.5}
    parts = {name: (ms + AT * 0.4 * (name == "forward")) * MS for name, ms in usual.items()}
    run = StepHistory(AT * WIDTH, np.full(BINS, WIDTH), sum(parts.values()), parts)
    lines = [
        SampledLine(0, "forward", "/x/train.py", 6, function, None, 150),
        SampledLine(0, "backward", "/x/train.py", 30, "<module>", None, 30),
    ]

    (finding,) = slowdown(run, JobFacts(lines=lines))

    assert finding.next.startswith(f"Look at train.py:6 {function} for what it keeps, repeats or sends")
    assert ("or hooks that are registered in each step and not removed" in finding.next) is may_be_hook


@pytest.mark.parametrize("power", [1, 2, 3])
def test_growth_that_speeds_up_is_told_from_its_first_step_and_within_what_was_measured(power):
    """From 20 to 100 ms: a scan of a list that itself grows faster."""
    (finding,) = found(80 * (AT / AT[-1]) ** power)

    assert (finding.evidence["shape"], finding.evidence["since_step"]) == ("growth", 0)
    assert finding.evidence["before_ms"] == pytest.approx(20, rel=0.1)
    assert finding.evidence["after_ms"] == pytest.approx(100, rel=0.1)


@pytest.mark.parametrize(("slow_share", "is_told"), [(0.8, True), (0.93, False)])
def test_steps_that_are_faster_at_the_very_end_were_not_slow_at_first(slow_share: float, is_told: bool) -> None:
    """Another program on the host has ended, for example."""
    changes = found(np.where(len(AT) * slow_share > AT, 20.0, 0.0))

    assert [each.evidence["shape"] for each in changes] == ["first"] * is_told


@pytest.mark.parametrize("noise", [0.01, 0.05])
@pytest.mark.parametrize("first", [12, 25, 45])
def test_growth_that_begins_later_is_told_from_there(first: int, noise: float) -> None:
    """A list is filled from a step on: neither a jump, nor a growth of the whole run."""
    for seed in range(5):
        (finding,) = found(np.maximum(AT - first, 0) * 2.0, noise=noise, seed=seed)

        since = finding.evidence["since_step"]
        assert finding.evidence["shape"] == "growth"
        assert since == pytest.approx(first * WIDTH, abs=5 * WIDTH)
        assert finding.evidence["growth_ms_per_step"] == pytest.approx(2.0 / WIDTH, rel=0.2)
        assert finding.summary.startswith(f"Since step {since} steps grow by ")


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("longer", "shape"), [(AT / 6, "growth"), (np.where(AT >= 20, 9.0, 0.0), "stays")])
def test_the_shape_of_one_part_is_found_on_a_busy_host(longer, shape, seed):
    """In a third of the bins other programs make all phases take 1.4x as long."""
    random = np.random.default_rng(seed)
    busy = np.where(random.random(BINS) < 1 / 3, 1.4, 1.0)
    usual = {"forward": 3.0, "backward": 2.0, "optimizer": 1.3, "other": 0.1 + longer}
    parts = {name: ms * busy * random.lognormal(0, 0.05, BINS) * MS for name, ms in usual.items()}
    (finding,) = slowdown(StepHistory(AT * WIDTH, np.full(BINS, WIDTH), sum(parts.values()), parts), JobFacts())

    assert (finding.phase, finding.evidence["shape"]) == ("other", shape)


@pytest.mark.parametrize(("limits", "whose"), [((), "host"), ((ResourceUse(0, Resource.MEMORY, 9, 10),), "container")])
def test_memory_that_filled_meanwhile_is_told_with_its_owner(limits, whose):
    """Samples of a container with a limit are of its own memory."""
    rows = np.zeros(BINS, HOST.dtype)
    rows["t_ns"], rows["memory_total_bytes"], rows["memory_used_bytes"] = AT * 1e9, 100, np.where(AT < 20, 20, 90)
    processes = np.zeros(BINS, PROCESS.dtype)
    processes["t_ns"], processes["step"] = rows["t_ns"], AT * WIDTH
    samples = MachineSamples()
    samples.add(HOST.name, 0, rows)
    samples.add(PROCESS.name, 0, processes)
    (finding,) = slowdown(history(np.where(AT >= 20, 20.0, 0.0)), JobFacts(samples=samples, limits=limits))

    assert f"90 % of the {whose}'s memory was in use (otherwise 20 %)" in finding.summary


def test_a_host_that_is_slower_blames_no_phase():
    """All phases alike: the host, or episodes of a game that become longer."""
    (finding,) = found(np.where(AT >= 30, 15.0, 0.0), alike=True)

    assert finding.phase is None
    assert "other programs on the host" in finding.next
    assert "longer episodes" in finding.next


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize(
    "change",
    [
        np.zeros(BINS),
        np.where(AT >= 20, 1.0, 0.0),  # 5 %
        np.where(AT == 30, 30.0, 0.0),  # one bin
        np.where(AT % 10 == 0, 8.0, 0.0),  # periodic
    ],
)
@pytest.mark.parametrize("noise", [0.02, 0.15])
def test_a_level_run_is_no_slowdown(change, seed, noise):
    """Noise, a small change, a single long bin, periodic work."""
    assert found(change, seed=seed, noise=noise) == []


def test_few_bins_have_no_shape():
    """Also of few steps each: those are joined first."""
    whole = history(np.where(AT >= 20, 20.0, 0.0))

    assert slowdown(StepHistory(AT[15:24], whole.steps[15:24], whole.step_ns[15:24], {}), JobFacts()) == []
    assert slowdown(StepHistory(AT[:0], whole.steps[:0], whole.step_ns[:0], {}), JobFacts()) == []


def test_a_window_is_divided_in_bins_of_several_steps():
    """100 steps are 25 bins of 4; their parts are own work, the rest is waiting."""
    window = window_of(Job(steps=110))
    work = own_work_of(window, JobFacts(world_size=2))

    made = StepHistory.of(window, work)

    assert (len(made.steps), set(made.steps.tolist())) == (25, {4})
    assert made.first_step.tolist() == list(range(10, 110, 4))
    assert sum(made.parts_ns.values()) == pytest.approx(made.step_ns, rel=0.1)


def test_a_slower_phase_of_a_real_window_is_named():
    """All ranks take 15 ms more in other code from step 150 on."""

    def later(own, _random):
        own["other"] = own["other"] + np.where(np.arange(own["other"].shape[1]) >= 150, 15.0, 0.0)

    finding = diagnose(window_of(Job(steps=300), later), JobFacts(world_size=2))[0]

    assert (finding.kind, finding.phase) == (Kind.SLOWDOWN, "other")
    assert finding.evidence["since_step"] == 150


@pytest.mark.parametrize("at", [97, 98, 150, 397])
def test_the_step_of_a_jump_is_exact(at):
    """By the single steps, not by the bin of seven in which it is; also where it ends."""

    def later(own, _random):
        steps = np.arange(own["other"].shape[1])
        own["other"] = own["other"] + np.where((steps >= at) & (steps < at + 333), 15.0, 0.0)

    staying = diagnose(window_of(Job(steps=at + 333), later), JobFacts(world_size=2))[0]
    between = diagnose(window_of(Job(steps=at + 555), later), JobFacts(world_size=2))[0]

    assert staying.evidence["shape"] == "stays"
    assert staying.evidence["since_step"] == at
    assert (between.evidence["since_step"], between.evidence["until_step"]) == (at, at + 333)


SOME = {"between": lambda at: (at >= 150) & (at < 250), "later": lambda at: at >= 200, "first": lambda at: at < 150}


def of_one_rank(part, when, ranks, facts=None):
    """Return the findings of 400 steps in which rank 1 takes 30 ms more in one part; the others wait for it."""

    def longer(own, _random):
        own[part][1] = own[part][1] + 30.0 * when(np.arange(own[part].shape[1]))

    return diagnose(window_of(Job(steps=400, ranks=ranks), longer), facts or JobFacts(world_size=ranks))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("part", ["other", "input_wait"])
def test_a_rank_that_was_slow_for_some_steps_is_named(ranks, part):
    """The others wait for it as long, so the means over ranks are slower in two parts."""
    (finding,) = of_one_rank(part, SOME["between"], ranks)

    assert (finding.kind, finding.ranks, finding.phase) == (Kind.SLOWDOWN, (1,), part)
    assert "because of rank 1, in " in finding.summary
    assert "of rank 1" in finding.next
    assert finding.evidence["shape"] == "recovers"
    assert finding.evidence["until_step"] == pytest.approx(250, abs=6)
    assert finding.speedup_if_fixed == pytest.approx(1.48, abs=0.1)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("part", ["other", "forward", "backward", "optimizer", "input_wait"])
@pytest.mark.parametrize(("shape", "words"), [("later", "since step "), ("first", "until step ")])
def test_a_late_rank_is_told_with_its_steps(ranks, part, shape, words):
    """One cause is one finding: that other programs are to blame would contradict it."""
    (finding,) = of_one_rank(part, SOME[shape], ranks)

    assert (finding.kind.rule.is_straggler, finding.ranks, finding.phase) == (True, (1,), part)
    assert f" {words}" in finding.summary
    assert "turns" not in finding.summary
    assert finding.speedup_if_fixed == pytest.approx({"later": 1.95, "first": 1.68}[shape], abs=0.1)


@pytest.mark.parametrize(("since", "told"), [(380, False), (300, True)])
def test_a_late_rank_does_not_recover_in_the_last_steps(since, told):
    """As when the loader of the other rank is slow there, too: it is slow in all of the run."""

    def slow(own, _random):
        own["input_wait"][1] += 30.0
        own["input_wait"][0] += 30.0 * (np.arange(own["input_wait"].shape[1]) >= since)

    finding = next(
        each for each in diagnose(window_of(Job(steps=400), slow), JobFacts(world_size=2)) if each.ranks == (1,)
    )

    assert finding.kind is Kind.INPUT_STRAGGLER
    assert (f"until step {since}" in finding.summary) == told
    assert ("until_step" in finding.evidence) == told


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_step_of_a_late_rank_is_that_of_its_own_work(ranks):
    """All ranks lack cores for the 30 steps before rank 1 waits for its data: it does so since step 200 only."""

    def longer(own, _random):
        at = np.arange(own["input_wait"].shape[1])
        own["input_wait"][1] = own["input_wait"][1] + 30.0 * (at >= 200)
        own["backward"] = own["backward"] + 35.0 * ((at >= 170) & (at < 200))

    finding = diagnose(window_of(Job(steps=400, ranks=ranks), longer), JobFacts(world_size=ranks))[0]

    assert (finding.kind, finding.ranks) == (Kind.INPUT_STRAGGLER, (1,))
    assert finding.evidence["since_step"] == 200


def test_a_rank_that_becomes_slower_steadily_is_one_finding():
    """0.075 ms with each step."""
    (finding,) = of_one_rank("forward", lambda at: at / 400, 2)

    assert (finding.kind, finding.ranks) == (Kind.COMPUTE_STRAGGLER, (1,))
    assert finding.evidence["growth_ms_per_step"] == pytest.approx(0.075, rel=0.1)


def test_a_late_rank_is_not_the_cause_of_what_slows_all():
    """Rank 1 is late all along, and all ranks become slower in other code: two findings."""

    def faults(own, _random):
        own["forward"][1] += 8.0
        own["other"] = own["other"] + 15.0 * (np.arange(own["other"].shape[1]) >= 200)

    found = diagnose(window_of(Job(steps=400), faults), JobFacts(world_size=2))

    assert {(each.kind, each.ranks) for each in found} >= {(Kind.SLOWDOWN, ()), (Kind.COMPUTE_STRAGGLER, (1,))}
    assert all("since step" not in each.summary for each in found if each.ranks)


@pytest.mark.parametrize("parts", [("other",), ("forward", "backward", "optimizer", "other")])
def test_a_rank_that_was_late_before_is_not_late_since_then(parts):
    """Rank 1 is 20 ms late all along, and for the last 40 % of the steps by 16 ms more, as where its core is taken."""

    def faults(own, _random):
        own["other"][1] += 20.0
        for part in parts:
            own[part][1] = own[part][1] + 16.0 / len(parts) * (np.arange(own[part].shape[1]) >= 240)

    found = diagnose(window_of(Job(steps=400), faults), JobFacts(world_size=2))
    late = next(each for each in found if each.kind is Kind.STRAGGLER)

    assert (late.ranks, late.phase) == ((1,), "other")
    assert "slow since" not in late.summary
    assert "shape" not in late.evidence


@pytest.mark.parametrize(
    ("usual_ms", "growth_ms", "waited", "told"),
    [(1.0, 0.2, 0.0, True), (1.0, 0.2, 0.3, False), (1.0, 0.2, -1, False), (5.0, 0.1, 0.0, False)],
)
def test_backward_that_grows_far_more_than_cores_explain_is_told_in_seconds(usual_ms, growth_ms, waited, told):
    """A recurrent state that is not detached: backward goes through all steps before, and is nearly all of a step."""
    samples = MachineSamples()
    rows = np.zeros(40, PROCESS.dtype)
    rows["step"], rows["t_ns"] = np.arange(0, 960, 24), np.arange(40) * 250 * MS
    rows["main_wait_ns"] = rows["t_ns"] * waited if waited >= 0 else -1
    samples.add(PROCESS.name, 0, rows)
    parts = {"forward": np.full(BINS, 0.2) * MS, "backward": (usual_ms + AT * growth_ms) * MS}
    run = StepHistory(AT * WIDTH, np.full(BINS, WIDTH), sum(parts.values()), parts)

    findings = slowdown(run, JobFacts(samples=samples))

    assert [each.phase for each in findings] == (["backward"] if told else [])
    assert all("detach" in each.next for each in findings)


@pytest.mark.parametrize(
    ("forward_ms", "backward_ms", "until", "told"),
    [
        ((0.6, 20.6), (2.4, 3.1), BINS, True),
        ((0.6, 20.6), (2.4, 3.1), BINS - 10, False),
        ((0.6, 6.0), (2.4, 12.0), BINS, False),
        ((4.0, 24.0), (0.4, 0.4), BINS, False),
    ],
    ids=["a part that begins", "one that ends again", "all grow", "the rest is too short to lose its core"],
)
def test_a_part_that_begins_is_told_on_a_busy_host(forward_ms, backward_ms, until, told):
    """From the middle on forward computes another loss, for some seconds, with a core for a third of the time."""
    samples = MachineSamples()
    rows = np.zeros(40, PROCESS.dtype)
    rows["step"], rows["t_ns"] = np.arange(0, 480, 12), np.arange(40) * 250 * MS
    rows["main_wait_ns"] = rows["t_ns"] * 0.6
    samples.add(PROCESS.name, 0, rows)
    slow = (AT >= BINS / 2) & (until > AT)
    parts = {
        name: np.where(slow, then, usual) * MS
        for name, (usual, then) in (("forward", forward_ms), ("backward", backward_ms))
    }
    run = StepHistory(AT * 12, np.full(BINS, 12), sum(parts.values()), parts)

    findings = slowdown(run, JobFacts(samples=samples))

    assert [each.phase for each in findings] == (["forward"] if told else [])


@pytest.mark.parametrize(("waited", "told"), [(0.0, True), (0.3, False), (-1, False)])
def test_slow_seconds_of_one_phase_count_if_the_ranks_had_their_cores(waited, told):
    """100 steps of 45 ms; the kernel counts the waiting of the main thread, or says -1."""
    samples = MachineSamples()
    rows = np.zeros(40, PROCESS.dtype)
    rows["step"], rows["t_ns"] = np.arange(0, 400, 10), np.arange(40) * 250 * MS
    rows["main_wait_ns"] = rows["t_ns"] * waited if waited >= 0 else -1
    for rank in range(2):
        samples.add(PROCESS.name, rank, rows)

    kinds = [each.kind for each in of_one_rank("forward", SOME["between"], 2, JobFacts(world_size=2, samples=samples))]

    assert (Kind.SLOWDOWN in kinds) is told


@pytest.mark.parametrize(("waiting", "phase"), [(1, None), (0, "backward")])
def test_a_rank_that_lacked_its_core_in_the_slow_steps_has_no_slow_phase(waiting, phase):
    """In steps 150 to 249 its core was taken for half of the time; or that of another rank was."""
    samples = MachineSamples()
    rows = np.zeros(160, PROCESS.dtype)
    rows["step"], rows["t_ns"] = np.arange(0, 400, 2.5), np.arange(160) * 250 * MS
    for rank in range(4):
        lacks = (rows["step"] >= 150) & (rows["step"] < 250) & (rank == waiting)
        rows["main_wait_ns"] = np.cumsum(lacks * 0.5) * 250 * MS
        samples.add(PROCESS.name, rank, rows)

    window = window_of(Job(steps=400, ranks=4).scaled(4), _longer_in_between)
    (finding, *_) = diagnose(window, JobFacts(world_size=4, samples=samples))

    assert (finding.kind, finding.ranks, finding.phase) == (Kind.SLOWDOWN, (1,), phase)
    assert ("Meanwhile rank 1 waited for a CPU core for" in finding.summary) is (phase is None)
    assert finding.next.startswith("End or move") is (phase is None)


def _longer_in_between(own, _random):
    own["backward"][1][150:250] += 100.0


def test_a_host_that_becomes_busier_is_told_once():
    """That the training waits for a core is the verdict, that it does so more than before a remark."""

    def slower(own, _random):
        for values in own.values():
            values *= np.where(np.arange(values.shape[1]) >= 400, 2.0, 1.0)

    oversubscribed = JobFacts(
        world_size=2, wait_of_ready_time={0: 0.6, 1: 0.6}, wait_of_wall_time={0: 0.6, 1: 0.6}, cores={"a": 2}
    )
    window = window_of(Job(steps=800), slower)

    assert [each.kind for each in diagnose(window, JobFacts(world_size=2))] == [Kind.SLOWDOWN]
    contention, slowdown_of_host = diagnose(window, oversubscribed)
    assert (contention.kind, slowdown_of_host.kind) == (Kind.CPU_CONTENTION, Kind.SLOWDOWN)
    assert slowdown_of_host.severity == "info"


@pytest.mark.parametrize(("waited", "passes", "is_host"), [(0.5, 2, True), (0.12, 2, False), (0.5, 1, False)])
def test_computation_that_lacks_cores_is_told_once(waited: float, passes: int, is_host: bool) -> None:
    """Threads of one operation wait for each other: with one core less, only forward and backward are longer."""

    def slower(own, _random):
        for part in ("forward", "backward")[-passes:]:
            own[part] *= np.where(np.arange(own[part].shape[1]) >= 400, 5.0, 1.0)

    waits = {0: waited}
    facts = JobFacts(wait_of_ready_time=waits, wait_of_wall_time=waits, cores={"a": 2})
    found = diagnose(window_of(Job(steps=800, ranks=1, grouped=False), slower), facts)

    assert (found[0].kind is Kind.CPU_CONTENTION) is is_host
    assert (next(each for each in found if each.kind is Kind.SLOWDOWN).severity == "info") is is_host


@pytest.mark.parametrize(("busy", "is_host"), [(0.51, True), (0.35, False)])
def test_a_core_that_is_had_for_less_of_the_time_explains_longer_steps(busy: float, is_host: bool) -> None:
    """From 77 % of the time to 49 % of it: the same work takes 1.57 times as long, most of 2.3 times; 65 % do not."""
    samples = MachineSamples()
    rows = np.zeros(60, PROCESS.dtype)
    rows["step"], rows["t_ns"] = AT * 2 * WIDTH, AT * 500 * MS
    rows["main_wait_ns"] = np.cumsum(np.where(AT >= 30, busy, 0.23)) * 500 * MS
    samples.add(PROCESS.name, 0, rows)
    usual = {"forward": 1.0, "backward": 6.0, "optimizer": 1.0}
    parts = {name: ms * MS * np.where((AT >= 30) & (name == "backward"), 2.8, 1.0) for name, ms in usual.items()}
    run = StepHistory(AT * 2 * WIDTH, np.full(BINS, 2 * WIDTH), sum(parts.values()), parts)

    (finding,) = slowdown(run, JobFacts(samples=samples))

    assert finding.phase == (None if is_host else "backward")
    assert finding.next.startswith("End or move what else runs on the host") is is_host


@pytest.mark.parametrize(
    ("hosts", "look"),
    [
        ({}, "links between the ranks"),
        ({0: "a", 1: "b"}, "links between the ranks"),
        ({0: "a", 1: "a"}, "host's cores"),
    ],
)
def test_longer_reductions_are_not_the_code(hosts, look):
    """No rank's own work is longer; ranks on one host have no links, but cores that gloo needs."""
    usual = {"forward": 6.0, "backward": 10.0, "comm": 4.0}
    parts = {name: (ms + 15.0 * (AT >= 30) * (name == "comm")) * MS for name, ms in usual.items()}

    facts = JobFacts(world_size=2, backend="gloo", hosts=hosts)

    (finding,) = slowdown(StepHistory(AT * WIDTH, np.full(BINS, WIDTH), sum(parts.values()), parts), facts)

    assert finding.phase == "comm"
    assert "alike" not in finding.summary
    assert look in finding.next


def test_a_few_slow_seconds_of_a_host_are_no_finding():
    """The same slow part, 4 s long, is reported only if one phase has it: programs take cores for seconds."""
    short = np.where((AT >= 20) & (AT < 27), 22.0, 0.0)

    assert found(short, alike=True) == []
    assert found(short)[0].phase == "other"


def test_the_heaviest_phase_is_not_to_blame_if_all_are_slower():
    """A phase that is most of the step also has most of the difference."""
    usual = {"forward": 16.0, "backward": 2.0, "other": 2.0}
    slower = np.where(AT >= 30, 1.8, 1.0)
    parts = {name: ms * slower * MS for name, ms in usual.items()}

    (finding,) = slowdown(StepHistory(AT * WIDTH, np.full(BINS, WIDTH), sum(parts.values()), parts), JobFacts())

    assert finding.phase is None


@pytest.mark.parametrize(
    "lines", [(), (*METRICS, SampledLine(0, "backward", "/x/train.py", 30, "<module>", None, 180))]
)
def test_phases_that_grow_together_are_not_called_all(lines):
    """A memory bank that each step compares with makes a loss outside the model grow, and its backward."""
    usual = {"forward": 1.0, "backward": 1.5, "optimizer": 0.5, "other": 1.0}
    parts = {name: (ms + AT * 0.4 * (name in ("backward", "other"))) * MS for name, ms in usual.items()}
    run = StepHistory(AT * WIDTH, np.full(BINS, WIDTH), sum(parts.values()), parts)

    (finding,) = slowdown(run, JobFacts(lines=lines))

    assert (finding.phase, finding.evidence["phases"]) == ("other", ["other", "backward"])
    place = "train.py:23 metrics" if lines else "code outside the known phases"
    assert f", in {place} and backward; that costs" in finding.summary
    assert finding.next.startswith("Look at")
    assert "All phases" not in finding.next


@pytest.mark.parametrize(("longer_ms", "phases"), [(20.0, ["other", "comm"]), (7.0, None)])
def test_code_and_communication_that_grow_together_are_named(longer_ms, phases):
    """As a list that all ranks exchange and append to in each step; less of it may be a host that becomes busier."""
    random, grown = np.random.default_rng(0), longer_ms * AT / BINS
    usual = {"forward": 0.6, "backward": 1.0, "optimizer": 0.3, "other": 4.0 + grown, "comm": 8.0 + grown}
    parts = {name: ms * random.lognormal(0, 0.02, BINS) * MS for name, ms in usual.items()}
    bins = StepHistory(AT * WIDTH, np.full(BINS, WIDTH), sum(parts.values()), parts)
    (finding,) = slowdown(bins, JobFacts())

    assert finding.evidence["shape"] == "growth"
    assert finding.evidence.get("phases") == phases
    assert finding.phase == (phases and "other")
    assert "in code outside the known phases and communication; that costs" in finding.summary
    assert ("most of it" in finding.summary) is (phases is None)


@pytest.mark.parametrize("passes", [True, False])
def test_longer_episodes_of_a_policy_that_learns_are_no_promised_gain(passes):
    """Each step of the game calls the model and adds to the loss: all but the optimizer grows. A list grows alone."""
    random, grown = np.random.default_rng(0), AT / BINS
    usual = {"forward": 2.0, "backward": 3.0, "optimizer": 0.7, "other": 6.0 * (1 + 3 * grown)}
    if passes:
        usual |= {"forward": 2.0 * (1 + 3 * grown), "backward": 3.0 * (1 + 3 * grown), "optimizer": 4.0}

    parts = {name: ms * random.lognormal(0, 0.02, BINS) * MS for name, ms in usual.items()}
    (finding,) = slowdown(StepHistory(AT * WIDTH, np.full(BINS, WIDTH), sum(parts.values()), parts), JobFacts())

    assert finding.evidence["shape"] == "growth"
    assert ("longer episodes or sequences), nothing needs fixing" in finding.next) is passes
    assert (finding.speedup_if_fixed == 1.0) is passes


@pytest.mark.parametrize(("waited", "phase"), [(0.0, "forward"), (-1, None)])
def test_phases_that_fewer_cores_may_slow_are_told_as_most_of_it(waited, phase):
    """Forward and backward take 1.6x as long: named where the kernel counted that the training had its core."""
    samples = MachineSamples()
    rows = np.zeros(40, PROCESS.dtype)
    rows["step"], rows["t_ns"] = np.arange(0, 960, 24), np.arange(40) * 500 * MS
    rows["main_wait_ns"] = rows["t_ns"] * waited if waited >= 0 else -1
    samples.add(PROCESS.name, 0, rows)
    usual = {"forward": 6.0, "backward": 10.0, "optimizer": 4.0, "other": 2.0}
    parts = {
        name: ms * np.where(AT >= 30, 1.6 if name in ("forward", "backward") else 1.0, 1.0) * MS
        for name, ms in usual.items()
    }
    run = StepHistory(AT * WIDTH, np.full(BINS, WIDTH), sum(parts.values()), parts)

    (finding,) = slowdown(run, JobFacts(samples=samples))

    assert finding.phase == phase
    assert "alike" not in finding.summary
    assert ("most of it in forward and backward" in finding.summary) is (phase is None)
    assert ("other programs on the host" in finding.next) is (phase is None)


@pytest.mark.parametrize(
    ("rest_ms", "are_told"), [({"comm": 0.0}, False), ({"input_wait": 0.05}, False), ({"optimizer": 2.0}, True)]
)
def test_phases_that_are_all_of_the_step_are_not_told_as_most_of_it(rest_ms, are_told):
    """A program takes the core for a third of the run, and the loop waits for no data and no ranks."""
    usual = {"forward": 6.0, "backward": 10.0, "other": 18.0}
    parts = {name: ms * np.where(AT >= 40, 1.8, 1.0) * MS for name, ms in usual.items()}
    parts |= {name: np.full(BINS, ms * MS) for name, ms in rest_ms.items()}
    run = StepHistory(AT * WIDTH, np.full(BINS, 40 * WIDTH), sum(parts.values()), parts)

    (finding,) = slowdown(run, JobFacts())

    assert ("most of it in code outside the known phases, forward and backward" in finding.summary) is are_told
    assert ("in all phases alike" in finding.summary) is not are_told


@pytest.mark.parametrize(("waited", "phase"), [(0.0, "backward"), (0.9, None)])
def test_with_too_few_cores_a_phase_is_compared_with_each_other(waited, phase):
    """Backward takes 1.64x and forward 1.47x as long, while the optimizer takes less by chance."""
    usual = {"forward": 30.5, "backward": 59.6, "optimizer": 9.1}
    slow = {"forward": 44.9, "backward": 97.1, "optimizer": 1.5}
    parts = {name: np.where(AT < 30, slow[name], usual[name]) * MS for name in usual}
    bins = StepHistory(AT * WIDTH, np.full(BINS, WIDTH), sum(parts.values()), parts)

    (finding,) = slowdown(bins, JobFacts(wait_of_ready_time={0: waited}))

    assert finding.phase == phase


@pytest.mark.parametrize(
    ("waited", "named", "phase"), [(0.83, False, None), (0.3, False, "other"), (0.83, True, "other")]
)
def test_other_code_of_a_rank_that_hardly_has_a_core_is_not_blamed(waited, named, phase):
    """A sixth of a core is now more and now less: 1.5x as long is chance, unless samples name a line."""
    lines = (*METRICS, SampledLine(0, "forward", "/x/train.py", 5, "forward", None, 500)) if named else ()

    (finding,) = found(np.where(AT < 30, 10.0, 0.0), *lines, wait_of_ready_time={0: waited})

    assert finding.phase == phase
    assert "alike" not in finding.summary


def test_a_step_that_only_computes_is_like_all_phases():
    """Where forward is nearly the whole step, a few slow seconds may be the host's."""
    usual = {"forward": 19.0, "other": 1.0}
    short = np.where((AT >= 20) & (AT < 27), 22.0, 0.0)
    parts = {name: (ms + short * (name == "forward")) * MS for name, ms in usual.items()}

    assert slowdown(StepHistory(AT * WIDTH, np.full(BINS, WIDTH), sum(parts.values()), parts), JobFacts()) == []


QUEUE = (
    SampledLine(0, "input_wait", "/x/train.py", 9, "main", "/lib/queue.py:180 Queue.get", 120),
    SampledLine(0, "forward", "/x/train.py", 5, "forward", None, 60),
)


@pytest.mark.parametrize("training_ends", [300, 200])
@pytest.mark.parametrize(("since", "lines", "told"), [(60, QUEUE, False), (160, QUEUE, True), (60, METRICS, True)])
def test_a_queue_that_was_full_at_first_is_no_slowdown(since, lines, told, training_ends):
    """Its thread does not keep up, and that is told; later, or in other code, steps do become slower."""

    def later(own, _random):
        own["other"][:, since:training_ends] += 15.0

    own = {"forward": 6.0, "backward": 10.0, "optimizer": 2.0, "other": 1.0}  # without a loader
    facts = JobFacts(lines=lines, other_models=(training_ends,))
    findings = diagnose(window_of(Job(ranks=1, steps=300, grouped=False, own=own), later), facts)

    kinds = [finding.kind for finding in findings]
    assert (Kind.SLOWDOWN in kinds) is told
    assert (Kind.INPUT_BOUND in kinds) is (lines is QUEUE)


@pytest.mark.parametrize(("slow", "kinds"), [(slice(0, 90), {Kind.SLOWDOWN}), (slice(0, 600), {Kind.INPUT_BOUND})])
def test_waits_that_have_ended_are_no_reason_for_workers(slow, kinds):
    """A data set that decodes at the first access and keeps it: the mean wait of all epochs tells no gain."""

    def decodes(own, _) -> None:
        own["input_wait"][:, slow] += 60

    found = diagnose(window_of(Job(ranks=1, steps=600, grouped=False), decodes), JobFacts())

    assert {each.kind for each in found} == kinds
    for advice in ("fills a cache", "without persistent_workers=True anew in each epoch"):
        assert (advice in found[0].next) == (found[0].kind is Kind.SLOWDOWN)


@pytest.mark.parametrize(("later_ms", "told"), [(30, True), (3, False)])
def test_waits_that_go_on_after_slow_steps_are_told_beside_them(later_ms, told):
    """On a busy host each step takes longer, with its batch: the loader is waited for all along."""

    def waits(own, _) -> None:
        own["input_wait"] += later_ms
        own["input_wait"][:, :300] += 60

    found = diagnose(window_of(Job(ranks=1, steps=600, grouped=False), waits), JobFacts())

    assert {each.kind for each in found} == {Kind.SLOWDOWN, *([Kind.INPUT_BOUND] if told else [])}


@pytest.mark.parametrize(("before_ms", "kinds"), [(0.0, {Kind.SLOWDOWN}), (30.0, {Kind.SLOWDOWN, Kind.INPUT_BOUND})])
def test_waits_that_begin_in_the_run_are_a_slowdown(before_ms, kinds):
    """A store that becomes slow; where the data was waited for before, too, that is told as well."""

    def later(own, _) -> None:
        own["input_wait"] += before_ms
        own["input_wait"][:, 300:] += 60

    loader = LoaderFacts(num_workers=0)
    found = diagnose(window_of(Job(ranks=1, steps=600, grouped=False), later), JobFacts(loader=loader))

    assert {each.kind for each in found} == kinds
    slower = next(each for each in found if each.kind is Kind.SLOWDOWN)
    assert slower.evidence["since_step"] == 300
    assert slower.next.endswith("Loader workers (num_workers) can read ahead meanwhile.")


@pytest.mark.parametrize("is_known", [True, False])
def test_communication_that_grows_is_told_by_what_is_sent(is_known: bool) -> None:
    """A list that all ranks gather in each step; the links are not the first thing to look at."""
    library = "/lib/torch/distributed/distributed_c10d.py:4191 all_gather" if is_known else None
    line = SampledLine(0, "comm", "/x/train.py", 15, "gather_predictions", library, 60)
    (finding,) = found(np.maximum(AT, 0) * 2.0, line, part="comm")

    assert (finding.phase, finding.evidence["shape"]) == ("comm", "growth")
    who = "train.py:15 gather_predictions" if is_known else "the script"
    assert finding.next.startswith(f"Look at how much {who} sends: an object that grows")


LATER = np.where(AT >= 45, 25.0, 0.0)
"""From step 720 on 27 of 45 ms are in `other`, before that 2 of 20 ms."""


def divided_lines(step: int, check: int) -> Callable[[Container[int]], DividedLines]:
    """Return the samples of 960 steps: one in ten in `step` at first, and of the slow steps in two lines of `other`."""
    counts = LineCounts({0: {1: "/x/train.py:25 step", 2: "/x/train.py:22 check", 3: "/x/train.py:5 forward"}})
    for second in range(1, 65):
        rows = np.zeros(3, LINES.dtype)
        rows["t_ns"], rows["step"], rows["line_id"] = second * 1_000_000_000, 15 * second, [1, 2, 3]
        rows["phase"] = [LINE_OTHER, LINE_OTHER, Phase.FORWARD]
        rows["samples"] = [1, 0, 9] if second <= 48 else [step, check, 10 - step - check]
        counts.add(0, rows[rows["samples"] > 0])

    return partial(counts.divided, [960], [64_000_000_000])


@pytest.mark.parametrize(("step", "check", "named"), [(1, 5, 22), (2, 4, 22), (5, 1, 25)])
def test_the_line_of_slow_steps_is_what_they_have_more(step, check, named):
    """Not what has most of the phase in the whole run, nor its share of that."""
    whole = (SampledLine(0, "other", "/x/train.py", 25, "step", None, 40), METRICS[0])
    facts = JobFacts(lines=whole, divided_lines=divided_lines(step, check))

    finding = slowdown(history(LATER), facts)[0]

    assert (finding.phase, finding.evidence["line"]) == ("other", named)
    assert finding.evidence["line_share"] == pytest.approx(max(step, check) / 10, abs=0.03)


def test_no_line_is_blamed_for_slow_steps_if_they_hardly_run_it():
    """The phase is longer by code that samples do not see; the line has most of the phase in the whole run."""
    facts = JobFacts(lines=METRICS, divided_lines=divided_lines(1, 0))

    finding = slowdown(history(LATER), facts)[0]

    assert (finding.phase, finding.evidence.get("line")) == ("other", None)


@pytest.mark.parametrize(("ms", "share", "is_named"), [(250.0, 78, True), (25.0, 31, False)])
def test_samples_of_a_phase_that_only_slow_steps_have_are_theirs(ms: float, share: int, *, is_named: bool) -> None:
    """Samples are sent every 5 s: in a short run most of them may come with those of other steps."""
    forward = SampledLine(0, "forward", "/x/train.py", 5, "forward", None, 100 - share)
    lines = (SampledLine(0, "other", "/x/train.py", 61, "replay", None, share), forward)
    facts = JobFacts(lines=lines, divided_lines=lambda _steps: ([replace(forward, samples=2)], lines))

    finding = slowdown(history(np.where(AT >= 45, ms, 0.0)), facts)[0]

    assert finding.phase == "other"
    assert ("replay" in finding.summary) is is_named


@pytest.mark.parametrize(
    ("replay", "others", "step_before", "is_named"),
    [
        (7, (), 2, True),
        (3, (), 2, True),  # on a fast machine
        (2, (), 2, False),
        (4, (), 40, False),  # the line has most of the phase, not nearly all
        (7, ("step",), 2, False),
        (0, ("step",) * 7, 2, False),
    ],
)
def test_few_samples_of_the_slow_steps_show_no_other_line(
    replay: int, others: tuple[str, ...], step_before: int, is_named: bool
) -> None:
    """Beside other programs a run of 6 s had 120 samples in the line, 7 of them in its last steps."""

    def lines(counts: dict[str, int], forward: int) -> tuple[SampledLine, ...]:
        own = (SampledLine(0, "other", "/x/train.py", 61, name, None, count) for name, count in counts.items() if count)
        return (*own, SampledLine(0, "forward", "/x/train.py", 5, "forward", None, forward))

    before = lines({"replay": 110, "step": step_before}, 20)
    seen = lines({"replay": replay, "step": len(others)}, 3)

    finding = slowdown(history(AT * 4.0), JobFacts(divided_lines=lambda _steps: (seen, before)))[0]

    assert (finding.phase, finding.evidence["shape"]) == ("other", "growth")
    assert finding.evidence.get("function") == ("replay" if is_named else None)


@pytest.mark.parametrize(("growth_ms", "is_host"), [(4.0, False), (0.25, True)])
def test_advice_is_on_the_host_only_where_its_cores_explain_the_growth(growth_ms: float, is_host: bool) -> None:
    """The mean of a growing list takes 12 times as long. Waits for a core have grown by a quarter of the time, too."""
    samples = MachineSamples()
    rows = np.zeros(60, PROCESS.dtype)
    rows["step"], rows["t_ns"] = np.arange(60) * WIDTH, np.arange(60) * 1000 * MS
    rows["main_wait_ns"] = np.cumsum(np.linspace(0.2, 0.6, 60)) * 1000 * MS
    samples.add(PROCESS.name, 0, rows)

    (finding,) = slowdown(history(AT * growth_ms), JobFacts(samples=samples))

    assert "waited for a CPU core" in finding.summary
    assert finding.next.startswith("End or move what else runs on the host") is is_host


@pytest.mark.parametrize(("now_ms", "phase"), [(70.0, "other"), (40.0, None)])
def test_code_that_grows_is_told_although_it_waits_for_cores_more_often(now_ms: float, phase: str | None) -> None:
    """With a core for 49 % of the time instead of 84 %: of 5 times as long, 2.9 times are not of the cores."""
    samples = MachineSamples()
    rows = np.zeros(60, PROCESS.dtype)
    rows["step"], rows["t_ns"] = np.arange(60) * WIDTH, np.arange(60) * 1000 * MS
    rows["main_wait_ns"] = np.cumsum(np.where(AT < 20, 0.16, 0.51)) * 1000 * MS
    samples.add(PROCESS.name, 0, rows)
    parts = {"forward": np.full(BINS, 4.0) * MS, "other": (10.0 + (now_ms - 10.0) * AT / BINS) * MS}
    run = StepHistory(AT * WIDTH, np.full(BINS, WIDTH), sum(parts.values()), parts)

    (finding,) = slowdown(run, JobFacts(samples=samples))

    assert finding.phase == phase
    assert "Meanwhile the training waited for a CPU core" in finding.summary


@pytest.mark.parametrize(("epochs", "told"), [((0, 1, 2, 3), False), ((3,), True), ((0, 3), False), ((2,), True)])
def test_what_comes_in_each_epoch_is_no_change(epochs: tuple[int, ...], told: bool) -> None:
    """A shuffle buffer is full after the first 48 of 200 batches: then the rest of an epoch takes no time."""
    step_ns = np.full(BINS, 2.0 * MS)
    for epoch in epochs:
        step_ns[epoch * BINS // 4 + 1 : epoch * BINS // 4 + 5] = 25.0 * MS

    run = StepHistory(AT * WIDTH, np.full(BINS, WIDTH), step_ns, {"input_wait": step_ns})

    assert bool(slowdown(run, JobFacts())) is told


@pytest.mark.parametrize(("fast", "told"), [((0, 1), True), ((0, 1, 8, 9, 16, 17, 24, 25), False)])
def test_steps_that_are_fast_at_the_begin_of_each_epoch_did_not_become_slower(
    fast: tuple[int, ...], told: bool
) -> None:
    """The data of one worker lasts four times as long as that of the others: the end of each epoch waits for it."""
    step_ns = np.full(32, 33.0 * MS)
    step_ns[[*fast]] = 8.0 * MS
    run = StepHistory(np.arange(32) * WIDTH, np.full(32, WIDTH), step_ns, {"input_wait": step_ns})

    assert bool(slowdown(run, JobFacts())) is told


@pytest.mark.parametrize(("last_ms", "told"), [(150.0, False), (80.0, True)])
def test_a_run_that_ends_in_a_series_of_long_steps_did_not_become_slower(last_ms: float, told: bool) -> None:
    """There were such series before: the steps that are long at times are told. Those of another length are others."""

    def series(own, _random):
        for begin in (180, 380, 580, 780):
            own["other"][:, begin : begin + 20] += last_ms if begin == 780 else 150.0

    own = {"forward": 2.0, "backward": 3.0, "optimizer": 1.0, "other": 0.5}
    kinds = [
        each.kind for each in diagnose(window_of(Job(ranks=1, grouped=False, steps=800, own=own), series), JobFacts())
    ]

    assert Kind.JITTER in kinds
    assert (Kind.SLOWDOWN in kinds) is told


@pytest.mark.parametrize(("ms", "is_slower"), [(75.0, False), (300.0, True)])
def test_waits_that_fall_on_other_steps_make_no_step_slower(ms: float, is_slower: bool) -> None:
    """Four workers that were ready together become ready one after the other: the mean step takes as long."""

    def in_turns(own, _) -> None:
        own["input_wait"][:] = 0.5
        own["input_wait"][:, :300:4] += 300.0
        own["input_wait"][:, 300:] += ms

    job = Job(ranks=1, steps=400, grouped=False, own={"input_wait": 0.5, "forward": 2.0, "backward": 2.0, "other": 0.3})
    said = diagnose(window_of(job, in_turns), JobFacts(loader=LoaderFacts(num_workers=4)))

    assert any(each.kind is Kind.SLOWDOWN for each in said) is is_slower
    assert any(each.kind is Kind.INPUT_BOUND for each in said) or is_slower


@pytest.mark.parametrize(
    ("waited", "workers", "is_host"),
    [(0.7, 2, True), (0.05, 2, False), (0.7, 0, False)],
    ids=["starved", "not", "none"],
)
def test_workers_without_a_core_are_told_and_not_their_data(waited: float, workers: int, is_host: bool) -> None:
    """Another program has their cores for a while, and the training its own: samples are no larger then."""
    rows = worker_rows(2)
    slow = (np.arange(len(rows)) >= 20) & (np.arange(len(rows)) < 40)
    rows["step"], rows["wait_ns"] = AT * WIDTH + 1, np.cumsum(np.where(slow, waited, 0.04)) * 2e9
    history = WorkerHistory()
    history.add(0, rows)
    parts = {"forward": np.full(BINS, 2.0) * MS, "input_wait": np.where(slow, 4.0, 0.1) * MS}
    run = StepHistory(AT * WIDTH, np.full(BINS, WIDTH), sum(parts.values()), parts)

    (finding,) = slowdown(run, JobFacts(loader=LoaderFacts(num_workers=workers), workers=history))

    assert finding.phase == (None if is_host else "input_wait")
    assert finding.next.startswith("End or move what else runs on the host then") is is_host
    assert (
        "the loader workers waited for a CPU core for 70 % of the time (otherwise 4 %)" in finding.summary
    ) is is_host
    assert ("workers_wait_share" in finding.evidence.get("changed", {})) is is_host


@pytest.mark.parametrize(("first", "last", "told"), [(40, 100, False), (40, 200, True), (0, 200, True)])
def test_data_that_was_slow_for_a_while_is_no_live_finding(first, last, told):
    """The newest 200 steps have the slow ones still, on average; that the run waits for data is no longer true."""

    def slow(own, _):
        own["input_wait"][:, first:last] += 60.0

    job = Job(ranks=1, steps=200, own={"input_wait": 0.3, "forward": 10.0, "backward": 20.0}, comm=0.0, grouped=False)
    window = window_of(job, slow)
    live = {each.kind for each in diagnose(window, JobFacts(), window)}
    ended = {each.kind for each in diagnose(window, JobFacts(state="finished"))}

    assert bool({Kind.INPUT_BOUND, Kind.SLOWDOWN} & live) is told
    assert {Kind.INPUT_BOUND, Kind.SLOWDOWN} & ended


@pytest.mark.parametrize(("last", "kind"), [(130, Kind.COMPUTE_BOUND), (185, Kind.INPUT_BOUND), (195, Kind.SLOWDOWN)])
def test_a_live_verdict_is_about_the_steps_after_slow_ones(last: int, kind: Kind) -> None:
    """It says nothing of those that are over, once there are 20 of the others."""

    def slow(own, _):
        own["input_wait"][:, 60:last] += 60.0

    job = Job(ranks=1, steps=200, own={"input_wait": 0.3, "forward": 10.0, "backward": 20.0}, comm=0.0, grouped=False)
    window = window_of(job, slow)
    found = diagnose(window, JobFacts(), window)[0]

    assert found.kind is kind
    assert ("of each 30." in found.summary) is (kind is Kind.COMPUTE_BOUND)


def test_a_rank_that_was_slow_for_a_while_is_no_live_finding() -> None:
    """Nor are ranks that wait for it."""

    def slow(own, _):
        own["other"][1, 60:130] += 30.0

    window = window_of(Job(ranks=2, steps=200), slow)
    live = diagnose(window, JobFacts(world_size=2), window)
    ended = diagnose(window, JobFacts(world_size=2, state="finished"))

    assert Kind.STRAGGLER not in {each.kind for each in live}
    assert ended[0].kind is Kind.STRAGGLER


@pytest.mark.parametrize(("length", "told"), [(80, False), (240, True)])
def test_data_that_is_slow_in_turns_has_no_step_from_which_on_it_is(length: int, told: bool) -> None:
    """Each second shard is slow: more than half of the steps since the first one are, and the others are not."""

    def slow(own, _):
        for first in range(length, 480, 2 * length):
            own["input_wait"][:, first : first + length] += 20.0

    job = Job(ranks=1, steps=480, own={"input_wait": 0.3, "forward": 4.0, "backward": 6.0}, comm=0.0, grouped=False)
    found = {each.kind for each in diagnose(window_of(job, slow), JobFacts(state="finished"))}

    assert (Kind.SLOWDOWN in found, Kind.INPUT_BOUND in found) == (told, not told)


@pytest.mark.parametrize("part", ["other", "backward"])
def test_reads_of_disks_are_no_cause_of_longer_computation(part: str) -> None:
    """Another program reads from the disks while a first, larger layer is trained."""
    samples = MachineSamples()
    rows = np.zeros(60, HOST.dtype)
    rows["t_ns"] = AT * 1000 * MS
    rows["disk_read_bytes"] = np.cumsum(np.where(AT < 20, 6e6, 1e5))
    samples.add(HOST.name, 0, rows)
    steps = np.zeros(60, PROCESS.dtype)
    steps["step"], steps["t_ns"] = AT * WIDTH, AT * 1000 * MS
    samples.add(PROCESS.name, 0, steps)

    (finding,) = slowdown(history(np.where(AT < 20, 20.0, 0.0), part=part), JobFacts(samples=samples))

    assert finding.evidence["shape"] == "first"
    assert ("from its disks" in finding.summary) is (part == "other")


def test_two_lines_are_named_where_no_line_alone_is_known() -> None:
    """A search of a growing list holds the GIL: samples see it where the loop lets others run."""
    lines = [SampledLine(0, "other", "/x/train.py", line, "<module>", None, 40) for line in (10, 11)]

    finding = slowdown(history(AT * 4.0), JobFacts(lines=lines))[0]

    assert finding.next.startswith("Look at what changes in train.py:10 and train.py:11 then")


@pytest.mark.parametrize("other", ["checkpoint", "other"])
def test_a_slowdown_costs_a_share_of_all_step_time(other: str) -> None:
    """Each 25th step saves, or plots, for longer than all steps lose: their medians have nothing of it."""

    def slower(own, random):
        own["forward"][:, 200:] += 10.0

    job, rare = Job(ranks=1, steps=800, grouped=False), adds(other, 400.0, every=25)
    with_both, without = (window_of(job, rare, *some) for some in ((slower,), ()))

    findings = diagnose(with_both, JobFacts(state="finished"))

    (found,) = (each for each in findings if each.kind is Kind.SLOWDOWN)
    gain = float(with_both.total.mean() / without.total.mean())
    assert found.speedup_if_fixed == pytest.approx(gain, abs=0.02)
    assert found.cost_share == pytest.approx(1 - 1 / gain, abs=0.02)
    assert sum(each.cost_share for each in findings) < 1


@pytest.mark.parametrize(("steps", "seed"), [(60, 9), (100, 5)])
@pytest.mark.parametrize("part", ["other", "input_wait"])
def test_steps_that_are_long_by_chance_are_no_slow_part(part: str, steps: int, seed: int) -> None:
    """In three of ten steps some rank has a slow sample: of four in a row more than two are long now and then."""

    def at_times(own, random):
        for step in range(steps):
            if random.random() < 0.3:
                own[part][random.integers(8), step] += 30

    window = window_of(Job(ranks=8, steps=steps), at_times, seed=seed, last=steps)

    kinds = [each.kind for each in diagnose(window, JobFacts(world_size=8, state=RunStatus.FINISHED))]
    assert Kind.SLOWDOWN not in kinds
