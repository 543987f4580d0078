"""Too few cores: who uses them, and what to do."""

from __future__ import annotations

import numpy as np
import pytest
from msgspec.structs import replace

from tests.diagnosis.fabricated import Job, adds, window_of
from tests.diagnosis.facts.watched_workers import watched
from traceml.database.schema import GPU, HOST, PROCESS, Resource, Table
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.machine_use import MachineSamples
from traceml.diagnosis.facts.resource_use import ResourceUse
from traceml.diagnosis.facts.run_time import RunTime
from traceml.diagnosis.facts.sampled_lines import SampledLine
from traceml.diagnosis.facts.trainings.models_and_loaders import LoaderFacts
from traceml.diagnosis.kinds import Kind, Severity
from traceml.diagnosis.rules.cpu_contention import cpu_contention
from traceml.diagnosis.ruleset import diagnose

ALONE = Job(ranks=1, grouped=False)


def rows_of(table: Table, seconds: int, **columns: object) -> np.ndarray:
    """Return one row per second."""
    rows = np.zeros(seconds, table.dtype)
    rows["t_ns"] = np.arange(seconds) * 10**9
    for name, values in columns.items():
        rows[name] = values

    return rows


def samples(
    *, busy: float, waited: float = 0.0, seconds: int = 20, of_host: slice = slice(None), cpu_pct: float = 100.0
) -> MachineSamples:
    """Return samples of a rank on two cores, with ten steps per second, and some of its host."""
    at = np.arange(seconds)
    made = MachineSamples(machine_cores={0: 2})
    times = {"step": at * 10, "cpu_ns": at * busy * 1e9, "main_run_ns": at * busy * 1e9}
    made.add(PROCESS.name, 0, rows_of(PROCESS, seconds, **times, main_wait_ns=at * waited * 1e9))
    made.add(HOST.name, 0, rows_of(HOST, seconds, cores=2, cpu_pct=cpu_pct)[of_host])
    return made


def oversubscribed(use: MachineSamples, waited: float = 0.4, **facts: object) -> JobFacts:
    return JobFacts(
        samples=use,
        wait_of_ready_time={0: 0.45},
        wait_of_wall_time={0: waited},
        hosts={0: "h"},
        cores={"h": 2},
        **facts,
    )


@pytest.mark.parametrize(
    ("bound", "hosts", "told"),
    [
        ({0: [0], 1: [0]}, "hh", "Ranks 0, 1 may run on core 0 only."),
        ({0: [0, 1], 1: [0], 2: [1]}, "hhh", "Ranks 0-2 may run on cores 0, 1 only."),
        ({0: [0], 1: [1]}, "hh", None),
        ({0: [0], 1: [0]}, "hg", None),
        ({1: [0]}, "hh", None),
    ],
    ids=["the same core", "some of these cores", "a core each", "two hosts", "one of them"],
)
def test_ranks_that_are_bound_to_too_few_cores_are_told(bound: dict[int, list[int]], hosts: str, told: str | None):
    """Other programs are busy, too; but other cores of the host are no help as long as the ranks may not use them."""
    known = oversubscribed(samples(busy=0.5), started_processes={})
    found = cpu_contention(replace(known, world_size=len(hosts), hosts=dict(enumerate(hosts)), bound_cores=bound))

    assert ("may run on" in found.summary) is (told is not None)
    assert told is None or told in found.summary
    assert found.next.startswith("Bind each rank to cores of its own" if told else "End or move the other programs")


@pytest.mark.parametrize(
    ("busy", "cpu_pct", "says"),
    [(1.9, 100.0, "The run itself needs more cores than there are: try "), (1.2, 70.0, "Not all cores are used, but ")],
)
def test_more_cores_are_missing_only_where_all_are_used(busy: float, cpu_pct: float, says: str) -> None:
    """Ranks that meet in each collective need their cores at the same moments, and leave them free in between."""
    found = cpu_contention(oversubscribed(samples(busy=busy, cpu_pct=cpu_pct), started_processes={}))

    assert found.next.startswith(says)


def test_other_programs_are_reported():
    """The share of time without a core, the cores of the rank and of the others, and the gain."""
    found = cpu_contention(oversubscribed(samples(busy=0.5), started_processes={}))

    assert (found.kind, found.severity) == (Kind.CPU_CONTENTION, Severity.CRITICAL)
    assert found.cost_share == pytest.approx(0.4)
    assert found.speedup_if_fixed == pytest.approx(1 / 0.6)
    assert "Of 2 cores, it used 0.5 cores, other programs used 1.5 cores." in found.summary
    assert found.next.startswith("End or move the other programs on this host")


def test_only_the_gain_is_capped():
    """What was waited is told as it was counted: of 96 %, sentence, evidence and cost said 90 %."""
    found = cpu_contention(oversubscribed(samples(busy=0.05), waited=0.96, started_processes={}))

    assert "waited for a CPU core for 96 % of the time." in found.summary
    assert found.evidence["cpu_wait_share"] == found.cost_share == 0.96
    assert found.speedup_if_fixed == pytest.approx(10)


def test_processes_that_the_script_started_are_no_other_programs():
    """A program that augments samples, started by the script, takes nearly all that the rank does not."""
    started = {"python augment.py": 1.4}
    found = cpu_contention(oversubscribed(samples(busy=0.5), started_processes=started))

    assert "it used 0.5 cores, processes that it started used 1.4 cores (python augment.py 1.4 cores)." in found.summary
    assert found.next.startswith("Let the processes that the script starts take fewer cores")
    assert found.evidence["started_processes"] == started


def test_other_programs_are_told_beside_processes_that_the_script_started():
    """The latter use less than half a core; what is left is of other programs."""
    started, others = {"python augment.py": 0.3}, {"ffmpeg": 1.1}
    facts = oversubscribed(samples(busy=0.5), started_processes=started, competing_processes=others)
    found = cpu_contention(facts)

    assert (
        "started used 0.3 cores (python augment.py 0.3 cores), other programs used 1.2 cores (ffmpeg" in found.summary
    )
    assert found.next.startswith("End or move the other programs on this host")


def test_nobody_is_blamed_where_processes_were_not_read():
    """A training of seconds, or one on another host than its aggregator: they may be other programs or its own."""
    found = cpu_contention(oversubscribed(samples(busy=0.5)))

    assert "Of 2 cores, it used 0.5 cores, other processes used 1.5 cores." in found.summary
    assert "end or move other programs, start fewer processes in the script" in found.next


@pytest.mark.parametrize(("threads", "told"), [(16, True), (2, False), (None, False)])
def test_threads_that_crowd_each_other_beside_other_programs_are_told(threads, told):
    """Sixteen threads on two cores are slow, whoever else uses these."""
    found = cpu_contention(oversubscribed(samples(busy=1.2), threads=threads, started_processes={}))

    assert "End or move the other programs" in found.next
    assert ("Torch has 16 threads: set OMP_NUM_THREADS=2" in found.next) is told


def test_cores_of_a_bound_rank_are_not_those_that_others_use():
    """It is bound to one core, and other programs use more of the machine than that."""
    found = cpu_contention(replace(oversubscribed(samples(busy=0.2)), cores={"h": 1}))

    assert found.summary.endswith(" of the time. It used 0.2 cores, other processes used 1.8 cores.")


@pytest.mark.parametrize(("throttled", "is_told"), [(890, True), (100, False)])
def test_a_quota_is_the_cause_where_the_container_is_throttled(throttled: int, is_told: bool):
    """Not the programs of the host, which use the cores that the container may not."""
    quota = ResourceUse(0, Resource.CPU_QUOTA, throttled, 1000)

    found = cpu_contention(oversubscribed(samples(busy=0.3), limits=(quota,)))

    assert ("Its container was throttled in 89 % of the scheduling periods" in found.summary) == is_told
    assert ("other processes used" in found.summary) != is_told
    assert ("Ask for more CPUs" in found.next) == is_told
    assert ("throttled_share" in found.evidence) == is_told


def test_the_processes_that_take_the_cores_are_named():
    """Those of other users have no name."""
    takers = {"ffmpeg": 1.04, "": 0.3}
    found = cpu_contention(oversubscribed(samples(busy=0.5), competing_processes=takers, started_processes={}))

    assert "other programs used 1.5 cores (ffmpeg 1 core, processes of other users 0.3)." in found.summary
    assert found.evidence["competing_processes"] == takers


def test_processes_are_not_named_where_others_use_no_cores():
    """The ranks themselves take them all."""
    found = cpu_contention(oversubscribed(samples(busy=1.9), competing_processes={"cron": 0.1}))

    assert "cron" not in found.summary


def test_ranks_that_wait_are_named_where_the_others_do_not():
    """Most of them have their cores."""
    waits = {0: 0.02, 1: 0.5, 2: 0.03, 3: 0.01}
    found = cpu_contention(JobFacts(world_size=4, wait_of_ready_time=waits, wait_of_wall_time=waits))

    assert found.ranks == (1,)
    assert found.summary.startswith("Rank 1 of 4 waited for a CPU core for 50 % of the time.")


@pytest.mark.parametrize("waits", [{0: 0.02, 1: 0.2, 2: 0.03}, {0: 0.5, 1: 0.4, 2: 0.3}, {1: 0.5}])
def test_no_rank_is_named_where_all_wait_or_one_waits_a_little(waits):
    """Nor where the others are not known."""
    found = cpu_contention(JobFacts(world_size=3, wait_of_ready_time=waits, wait_of_wall_time=waits))

    assert (None if found is None else found.ranks) == (() if min(waits.values()) >= 0.3 else None)


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"threads": 4}, "OMP_NUM_THREADS=2"),
        ({"threads": 1, "loader": LoaderFacts(num_workers=4)}, "fewer loader workers"),
        ({"threads": 1}, "more cores"),
    ],
)
def test_a_run_that_crowds_itself_is_reported_so(facts, says):
    """Nobody else uses the cores."""
    found = cpu_contention(oversubscribed(samples(busy=1.9), **facts))

    assert says in found.next
    assert "other p" not in found.next


def test_the_run_is_not_blamed_where_the_use_of_the_host_is_not_known():
    """Too short for a sample of the host: the cores may be used by others, or by the run."""
    found = cpu_contention(oversubscribed(samples(busy=0.5, of_host=slice(0)), threads=1))

    assert (
        found.next == "If other programs use the cores (`top` names them), end or move them; otherwise try more cores."
    )


def test_one_sample_of_the_host_is_enough():
    """Each is a mean of the time before it, so a training of a second knows who takes the cores."""
    found = cpu_contention(oversubscribed(samples(busy=0.5, seconds=3, of_host=slice(1, 2))))

    assert "other processes used 1.5 cores" in found.summary


@pytest.mark.parametrize(("busy", "says"), [(0.1, "end or move other programs"), (0.9, "fewer loader workers")])
def test_loader_workers_are_not_taken_for_other_programs(busy, says):
    """Of 1.5 cores that others use, the one worker uses little, or most."""
    loader = LoaderFacts(num_workers=1)

    found = cpu_contention(oversubscribed(samples(busy=0.7), threads=1, loader=loader, workers=watched(1, busy=busy)))

    assert says in found.next


@pytest.mark.parametrize(
    ("started", "says"), [({}, "End or move the other programs"), (None, "If other programs use the cores")]
)
def test_a_run_is_not_blamed_for_workers_whose_use_is_not_known(started, says):
    """They may sleep, in a training too short to watch them: who takes the cores is known, or open."""
    loader = LoaderFacts(num_workers=4)

    found = cpu_contention(oversubscribed(samples(busy=0.5), threads=1, loader=loader, started_processes=started))

    assert says in found.next
    assert "The run itself" not in found.next


def test_loader_workers_are_among_the_started_processes():
    """They take all that the rank does not: it needs fewer of them."""
    loader = LoaderFacts(num_workers=2)
    facts = oversubscribed(samples(busy=0.5), threads=1, loader=loader, started_processes={"python train.py": 1.5})

    found = cpu_contention(facts)

    assert "processes that it started, its loader workers among them, used 1.5 cores" in found.summary
    assert "fewer loader workers" in found.next


def test_a_little_waiting_is_none():
    """A tenth of the time is usual; and a thread that has seldom work may wait for a core now and then."""
    assert (
        cpu_contention(JobFacts(samples=samples(busy=0.9), wait_of_ready_time={0: 0.09}, wait_of_wall_time={0: 0.09}))
        is None
    )
    assert cpu_contention(oversubscribed(samples(busy=0.1), waited=0.05)) is None


def test_it_is_the_verdict_of_a_starved_run_and_a_remark_beside_a_cause():
    """A starved run is not healthy; a cause that was found comes first."""
    facts = oversubscribed(samples(busy=0.5))

    assert diagnose(window_of(ALONE), facts)[0].kind is Kind.CPU_CONTENTION
    found = diagnose(window_of(ALONE, adds("input_wait", 20)), facts)
    assert [each.kind for each in found] == [Kind.INPUT_BOUND, Kind.CPU_CONTENTION]
    assert found[1].severity is Severity.INFO


@pytest.mark.parametrize(("hook_samples", "input_ms", "told"), [(90, 0, True), (10, 0, False), (90, 20, False)])
def test_code_of_the_script_in_backward_is_told_beside_the_missing_cores(hook_samples, input_ms, told):
    """A communication hook that compresses is most of each step, with or without other programs; not beside a cause."""
    lines = [
        SampledLine(0, "backward", "/x/train.py", 9, "compress", None, hook_samples),
        SampledLine(0, "backward", "/x/train.py", 30, "main", "torch/autograd/graph.py:966 _run", 100 - hook_samples),
        SampledLine(0, "forward", "/x/train.py", 29, "main", None, 50),
    ]
    facts = replace(oversubscribed(samples(busy=0.5), 0.8), lines=lines)
    found = diagnose(window_of(ALONE, adds("backward", 30), adds("input_wait", input_ms)), facts)
    contention = next(each for each in found if each.kind is Kind.CPU_CONTENTION)

    assert ("is spent in train.py:9 compress, which backward calls" in contention.next) is told


@pytest.mark.parametrize(("waited", "first"), [(0.3, Kind.COMPUTE_BOUND), (0.8, Kind.CPU_CONTENTION)])
def test_code_that_costs_more_than_the_missing_cores_comes_first(waited: float, first: Kind) -> None:
    """A hook of a gradient waits for a server for 70 % of each step."""
    lines = [
        SampledLine(0, "backward", "/x/train.py", 9, "send", None, 90),
        SampledLine(0, "backward", "/x/train.py", 30, "main", "torch/autograd/graph.py:966 _run", 10),
        SampledLine(0, "forward", "/x/train.py", 29, "main", None, 30),
    ]
    facts = replace(oversubscribed(samples(busy=0.5), waited), lines=lines)
    found = diagnose(window_of(ALONE, adds("backward", 30)), facts)

    assert found[0].kind is first
    assert ("Beside that" in found[0].next) is (first is Kind.CPU_CONTENTION)


def test_a_late_rank_without_a_core_is_not_told_to_look_at_its_code():
    """Its host is the cause."""
    waits = {0: 0.01, 1: 0.4, 2: 0.01, 3: 0.02}
    found = diagnose(
        window_of(Job(ranks=4), adds("forward", 20, (1,))), JobFacts(world_size=4, wait_of_ready_time=waits)
    )[0]

    assert (found.kind, found.ranks) == (Kind.COMPUTE_STRAGGLER, (1,))
    assert "Rank 1 waited for a CPU core for 40 %" in found.summary
    assert "not the cause" in found.next


def test_samples_of_a_long_run_are_few_and_spread():
    """Every n-th row is kept, also over many calls."""
    made = MachineSamples(machine_cores={0: 2})
    for first in range(0, 10_000, 7):
        at = np.arange(first, first + 7)
        rows = rows_of(PROCESS, 7, step=at, cpu_ns=at * 5 * 10**8)
        rows["t_ns"] = at * 10**9
        made.add(PROCESS.name, 0, rows)

    kept = made._kept[PROCESS.name, 0].rows["step"]
    assert 256 < len(kept) <= 1031
    assert set(np.diff(kept).tolist()) == {16}
    assert made.use(4000, 5000).busy_cores == pytest.approx(0.5)


def test_the_use_of_a_device_is_that_of_the_steps():
    """Clock, temperature and utilization, and whether the clock is lowered."""
    made = samples(busy=1.0, waited=0.0)
    hot = np.arange(20) >= 10
    made.add(
        GPU.name, 0,
        rows_of(GPU, 20, sm_clock_mhz=np.where(hot, 900, 1700), temperature_c=np.where(hot, 92, 60),
                utilization_pct=90, throttle_reasons=np.where(hot, 0x40, 1)),
    )  # fmt: skip

    assert (made.use(0, 100).clock_mhz, made.use(0, 100).throttled) == (1700, False)
    assert (made.use(100).clock_mhz, made.use(100).throttled, made.use(100).temperature_c) == (900, True, 92)


@pytest.mark.parametrize(
    ("busy", "waited", "started", "first"),
    [
        (0.2, 0.5, {}, Kind.CPU_CONTENTION),
        (0.2, 0.5, {"python augment.py": 1.7}, Kind.CPU_CONTENTION),
        (0.2, 0.45, {}, Kind.INPUT_BOUND),
        (1.9, 0.7, {}, Kind.INPUT_BOUND),
    ],
    ids=["most of the time", "for processes of the script", "less than half of it", "by threads of its own"],
)
def test_waiting_for_other_processes_most_of_the_time_comes_first(busy, waited, started, first):
    """A worker that is starved as the training is makes it wait for data, longer than that waits for a core."""
    facts = oversubscribed(samples(busy=busy), waited=waited, started_processes=started)

    found = diagnose(window_of(ALONE, adds("input_wait", 40)), facts)

    assert {each.kind for each in found} == {Kind.INPUT_BOUND, Kind.CPU_CONTENTION}
    assert found[0].kind is first


@pytest.mark.parametrize(("evaluation", "first"), [(34.0, Kind.CPU_CONTENTION), (60.0, Kind.EVAL_HEAVY)])
def test_waiting_for_other_processes_is_ordered_by_cost_beside_evaluation(evaluation: float, first: Kind) -> None:
    """It takes 87 % of the steps: half of the run, or a third."""
    time = RunTime.of(100.0, {"steps": 98.0 - evaluation, "evaluation": evaluation, "startup": 2.0}, evaluations=12)
    facts = oversubscribed(samples(busy=0.2), waited=0.87, started_processes={}, time=time)

    found = diagnose(window_of(ALONE), facts)

    assert {each.kind for each in found} == {Kind.EVAL_HEAVY, Kind.CPU_CONTENTION}
    assert found[0].kind is first


@pytest.mark.parametrize(("counted_s", "is_told"), [(0.0, False), (0.5, False), (2.0, True)])
def test_half_a_second_of_training_does_not_show_that_it_lacks_cores(counted_s: float, is_told: bool) -> None:
    """Ranks that hang after 40 short steps waited for cores in their start-up: that costs their steps nothing."""
    facts = replace(oversubscribed(samples(busy=0.5), waited=0.9), core_wait_s={0: counted_s})

    assert bool(cpu_contention(facts)) is is_told


@pytest.mark.parametrize(("counted_s", "is_told"), [(1.0, False), (10.0, True)])
def test_a_second_of_readings_does_not_show_that_ranks_have_their_cores(counted_s: float, is_told: bool) -> None:
    """A rank that shares its core with a program for that second is late in each step; such as before a hang."""
    job = Job(ranks=2, steps=60)
    waits = dict.fromkeys((0, 1), 0.02)
    facts = JobFacts(
        world_size=2, wait_of_ready_time=waits, wait_of_wall_time=waits, core_wait_s=dict.fromkeys((0, 1), counted_s)
    )

    found = diagnose(window_of(job, adds("other", 5, (0,))), facts)

    assert any(each.kind is Kind.STRAGGLER for each in found) is is_told
