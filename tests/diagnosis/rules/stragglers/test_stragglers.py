"""Which ranks are late, where others are near them."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from tests.diagnosis.fabricated import Fault, Job, adds, takes_turns, window_of
from tests.diagnosis.merged_hosts.clusters import Cluster, any_run, flat_verdict, told
from traceml.database.schema import PROCESS
from traceml.diagnosis.facts.blamed_lines import own_line_share
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.job_facts_builder import JobFactsBuilder
from traceml.diagnosis.facts.machine_use import MachineSamples
from traceml.diagnosis.facts.sampled_lines import SampledLine
from traceml.diagnosis.facts.trainings.models_and_loaders import LoaderFacts
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind
from traceml.diagnosis.rules.stragglers.late_ranks import find_late
from traceml.diagnosis.ruleset import diagnose
from traceml.diagnosis.steps.own_work import own_work_of
from traceml.formatting import factor_text


@pytest.mark.parametrize("between_ms", [(), (2.4,), (3.2, 2.4), (3.4, 3.2, 2.5)])
def test_ranks_between_the_late_ones_and_the_others_hide_none(between_ms: tuple[float, ...]) -> None:
    """They are few, and nearer to the others: these count as others, from which the late ones are clearly apart."""
    faults = [adds("forward", 8.0, (0, 1, 2))]
    faults += [adds("forward", ms, (rank,)) for rank, ms in enumerate(between_ms, 3)]
    window = window_of(Job(ranks=32, steps=120, sigma=0.02), *faults)

    found, *_ = find_late(own_work_of(window, JobFacts(world_size=32)), JobFacts(world_size=32))

    assert found.rows.tolist() == [0, 1, 2]
    assert len(found.others) == 29


@pytest.mark.parametrize(
    ("every", "ms", "says"), [(1, 30.0, None), (2, 60.0, None), (5, 120.0, "20 %"), (20, 250.0, "5 %")]
)
def test_the_sentence_says_in_how_many_steps_a_rank_is_late(every: int, ms: float, says: str | None) -> None:
    """A rank that saves in each 20th step is late by 250 ms there, and by the mean in no step."""
    found, *_ = diagnose(
        window_of(Job(ranks=2, steps=400), adds("other", ms, (1,), every=every)), JobFacts(world_size=2)
    )

    assert found.ranks == (1,)
    assert ("of the steps (" in found.summary) == (says is not None)
    if says is not None:
        assert re.search(rf", nearly all in {says} of the steps \(\d+ ms each\)", found.summary)


@pytest.mark.parametrize("in_turns", [True, False])
def test_two_ranks_that_are_late_in_turns_cost_more_than_each_on_average(in_turns: bool) -> None:
    """The others wait for both: 10 ms of each cost 20 ms of a step, which the sentence explains."""
    fault = takes_turns("other", 20.0, (0, 1)) if in_turns else adds("other", 20.0, (0, 1))

    found, *_ = diagnose(window_of(Job(ranks=4, steps=300), fault), JobFacts(world_size=4))

    assert (found.kind, found.ranks) == (Kind.STRAGGLER, (0, 1))
    assert found.summary.startswith(f"Ranks 0, 1 slow the others down{', in turns' if in_turns else ''}: their code")
    assert found.cost_share == pytest.approx(20.0 / found.evidence["step_ms"], rel=0.05)


@pytest.mark.parametrize(("ranks", "steps"), [(4, 26), (4, 30), (8, 30), (16, 30), (8, 60)])
def test_one_pause_of_another_rank_is_no_turn(ranks: int, steps: int) -> None:
    """The rank that is late in each step is named alone, also in a run of which 20 steps are judged."""

    def pause(own: dict[str, np.ndarray[Any, Any]], _: np.random.Generator) -> None:
        own["forward"][3, 20] += 2000.0

    window = window_of(Job(ranks=ranks, steps=steps), adds("forward", 10.0, (0,)), pause, seed=1)
    found, *_ = diagnose(window, JobFacts(world_size=ranks))

    assert (found.kind, found.ranks) == (Kind.COMPUTE_STRAGGLER, (0,))
    assert "One step took 2" in found.summary
    assert found.speedup_if_fixed < 2


def test_the_noise_of_one_rank_hides_no_late_host() -> None:
    """Its backward was measured in 8 of 32 steps; the host's forward takes 17 of 120 ms more."""
    run = any_run(Cluster(ranks=128, per_host=8, hosts_per_switch=4), 10_214)

    kind, ranks, phase, group = told(flat_verdict(run))

    assert (kind, ranks, phase) == ("COMPUTE_STRAGGLER", run.ranks, "forward")
    assert group == "all 8 ranks of host gpu-0002"


@pytest.mark.parametrize("ms", [(4.0, 4.0), (6.0, 3.0)])
def test_ranks_that_are_late_in_different_parts_do_not_hide_each_other(ms: tuple[float, float]) -> None:
    """Both ranks work equally long, or nearly: steps gain little by one remedy, and much by both."""
    faults = [adds("input_wait", ms[0], (0,)), adds("other", ms[1], (1,))]

    found = diagnose(window_of(Job(ranks=2, steps=200), *faults), JobFacts(world_size=2))
    found.sort(key=lambda each: each.ranks)

    assert [(each.kind, each.ranks) for each in found] == [("INPUT_STRAGGLER", (0,)), ("STRAGGLER", (1,))]
    for each, expected in zip(found, ms, strict=True):
        assert each.cost_share == pytest.approx(expected / each.evidence["step_ms"], rel=0.1)
        assert each.speedup_if_fixed < 1.25

    assert any("saved only once other differences between ranks are removed, too" in each.summary for each in found)


@pytest.mark.parametrize(("others_ms", "is_hidden"), [(8.0, True), (0.0, False)])
def test_nobody_waits_for_a_rank_that_a_later_one_hides(others_ms: float, is_hidden: bool) -> None:
    """Without its 4 ms of data loading, steps would take as long: another rank is late by more in its own code."""
    faults = [adds("input_wait", 4.0, (0,)), adds("other", others_ms, (1,))]

    found = diagnose(window_of(Job(ranks=2, steps=200), *faults), JobFacts(world_size=2))
    of_data = next(each for each in found if each.kind == "INPUT_STRAGGLER")

    assert ("others wait" in of_data.headline, "slows the others down" in of_data.summary) == (not is_hidden,) * 2
    assert ("hidden by other slow ranks" in of_data.headline) == is_hidden
    assert ("hidden by other slow ranks: its data loading takes" in of_data.summary) == is_hidden
    assert of_data.evidence.get("is_hidden", False) == is_hidden
    assert all("others wait" in each.headline for each in found if each.kind == "STRAGGLER")


@pytest.mark.parametrize(("every", "part", "measured"), [(1, "forward", 1), (5, "forward", 1), (1, "backward", 4)])
def test_steps_that_are_late_are_counted(every: int, part: str, measured: int) -> None:
    """A few very long steps are no measure for the others, and neither are steps that did not measure backward."""
    rare = adds("forward", 200.0, (1,), every=70)
    job = Job(ranks=2, steps=220, callback_every=measured)
    found, *_ = diagnose(window_of(job, adds(part, 20.0, (1,), every=every), rare), JobFacts(world_size=2))

    assert found.ranks == (1,)
    assert found.evidence["share_of_steps_late"] == pytest.approx(1 / every, abs=0.05)


@pytest.mark.parametrize(("part", "kind"), [("checkpoint", Kind.CHECKPOINT_STALLS), ("other", Kind.STRAGGLER)])
def test_a_rank_that_saves_alone_is_no_slow_host(part: str, kind: Kind) -> None:
    """After each save its caches are cold, and all that follows takes longer, too."""
    slower = [adds(name, ms, (0,)) for name, ms in (("forward", 4.0), ("backward", 6.0), ("optimizer", 2.0))]
    found = diagnose(window_of(Job(ranks=2, steps=200), adds(part, 18.0, (0,)), *slower), JobFacts(world_size=2))[0]

    assert (found.kind, found.ranks) == (kind, (0,))
    assert ("slower in every part" in found.summary) is (part == "other")
    assert ("save less often" in found.next) is (part == "checkpoint")


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    ("of_all", "late", "says"),
    [
        (adds("forward", 100.0, every=10), adds("forward", 12.0, (1,)), "Every 10th step takes 1"),
        (adds("other", 100.0, every=10), adds("other", 12.0, (1,)), "Every 10th step takes 1"),
        (adds("checkpoint", 300.0, every=25), adds("checkpoint", 500.0, (1,), every=25), "16 of 389 steps save"),
        (adds("input_wait", 40.0, every=4), adds("input_wait", 12.0, (1,)), "is in 25 % of the steps"),
    ],
    ids=["evaluates", "plots", "saves", "waits for workers"],
)
def test_a_late_rank_would_do_what_all_do_in_the_same_steps(of_all: Fault, late: Fault, says: str, ranks: int) -> None:
    """All evaluate, plot, save or wait for their workers in each n-th step, and one takes longer in that part."""
    job = Job(ranks=ranks, steps=400)
    both, without = (window_of(job, *faults) for faults in ((of_all, late), (of_all,)))

    findings = diagnose(both, JobFacts(world_size=ranks))

    (of_rank,), (cost,) = ([each for each in findings if each.ranks == some] for some in ((1,), ()))
    assert of_rank.speedup_if_fixed == pytest.approx(float(both.total.mean() / without.total.mean()), abs=0.04)
    assert "hidden by other slow ranks" not in of_rank.summary
    assert says in cost.summary
    assert of_rank.cost_share + cost.cost_share < 0.75


@pytest.mark.parametrize("part", ["input_wait", "h2d", "other"])
def test_slow_data_and_one_slow_phase_are_no_slow_host(part: str) -> None:
    """The rank reads from a slow disk and has a hook in backward: its forward and optimizer are as those of others."""
    both = adds(part, 20.0, (1,)), adds("backward", 16.0, (1,))

    found = diagnose(window_of(Job(ranks=4, steps=200), *both), JobFacts(world_size=4))[0]

    assert (found.ranks, found.phase) == ((1,), part)
    assert found.cost_share == pytest.approx(20 / 51, abs=0.02)
    assert "Its backward takes 16" in found.summary
    assert "Look at the host" not in found.next


@pytest.mark.parametrize(
    ("optimizer_ms", "says"),
    [(0.0, "slower in data loading, forward and backward, 1"), (1.5, "slower in every part of the step, 1")],
)
def test_the_parts_that_are_not_slower_are_not_told(optimizer_ms: float, says: str) -> None:
    """A rank with larger batches reads, and computes, for longer; a slow host steps for longer, too."""
    longer = {"input_wait": 5.0, "forward": 4.0, "backward": 8.0, "optimizer": optimizer_ms}
    faults = [adds(part, ms, (1,)) for part, ms in longer.items() if ms]

    found = diagnose(window_of(Job(ranks=4, steps=200), *faults), JobFacts(world_size=4))[0]

    assert says in found.summary
    assert "the largest part in backward" in found.summary  # less than half of it


def _sampled(rank: int, part: str, number: int, samples: int) -> SampledLine:
    return SampledLine(rank, part, "/home/me/train.py", number, "Net.forward", None, samples)


@pytest.mark.parametrize(("line", "kinds"), [(9, ["COMPUTE_STRAGGLER", "CPU_CONTENTION"]), (7, ["CPU_CONTENTION"])])
def test_a_line_of_one_rank_alone_is_no_lack_of_cores(line: int, kinds: list[str]) -> None:
    """A rank that only waits for a core runs the lines that the others run: its excess may be chance."""
    job = Job(ranks=3, steps=200)
    lines = [_sampled(rank, part, 7, 40) for rank in range(3) for part in ("forward", "backward")]
    facts = JobFacts(
        world_size=3, wait_of_ready_time=dict.fromkeys(range(3), 0.4), lines=[*lines, _sampled(1, "forward", line, 20)]
    )

    found = diagnose(window_of(job, adds("forward", 3.0, (1,))), facts)

    assert [each.kind for each in found] == kinds
    if line == 9:
        assert (found[0].ranks, found[0].phase) == ((1,), "forward")
        assert found[0].cost_share == pytest.approx(3.0 / found[0].evidence["step_ms"], rel=0.1)


def _late_in(samples: dict[str, int], of_others: str = "main") -> Finding:
    """Return the finding about rank 1, which spends half of its steps in some functions, one of which others run."""
    lines = [
        SampledLine(1, "backward", "/x/train.py", 1, "main", None, 100 - sum(samples.values())),
        *(SampledLine(1, "other", "/x/train.py", 9, name, None, count) for name, count in samples.items()),
        SampledLine(0, "other", "/x/train.py", 9, of_others, None, 10),
        SampledLine(0, "backward", "/x/train.py", 1, "main", None, 90),
    ]
    facts = JobFacts(world_size=2, lines=lines)
    return next(
        each for each in diagnose(window_of(Job(), adds("other", 14, (1,))), facts) if each.kind is Kind.STRAGGLER
    )


@pytest.mark.parametrize(("first", "second"), [(26, 23), (35, 14)])
def test_two_lines_of_a_late_rank_are_named_together(first: int, second: int) -> None:
    """Without one of them the rank is still late; the gain is that without both."""
    found = _late_in({"augment": first, "tokenize": second})

    assert f"{2 * first + 1} % of it in train.py:9 augment and " in found.summary
    assert re.search(r"and \d\d % in train.py:9 tokenize; that costs", found.summary)
    assert found.next.startswith("Only rank 1 spends time in train.py:9 augment and train.py:9 tokenize: do it less")
    assert found.speedup_if_fixed == pytest.approx(1.9, abs=0.1)
    assert "and without it steps would be" in found.summary


@pytest.mark.parametrize(("rank", "samples", "is_named"), [(1, 20, True), (1, 9, False), (0, 20, False)])
def test_a_small_line_of_a_late_rank_is_all_that_it_takes_longer(rank: int, samples: int, is_named: bool) -> None:
    """All ranks prepare their batches for long; one also reports its progress. What another rank does is no cause."""
    lines = [
        *(SampledLine(each, "other", "/x/train.py", 5, "prepare", None, 115) for each in (0, 1)),
        *(SampledLine(each, "backward", "/x/train.py", 1, "main", None, 15) for each in (0, 1)),
        SampledLine(rank, "other", "/x/train.py", 9, "report", None, samples),
    ]
    job = Job(own={"forward": 4.0, "backward": 8.0, "other": 80.0}, sigma=0.02)

    found = diagnose(window_of(job, adds("other", 14.0, (1,))), JobFacts(world_size=2, lines=lines))
    late = next(each for each in found if each.kind is Kind.STRAGGLER)

    assert ("% of it in train.py:9 report; that costs" in late.summary) is is_named
    assert (late.evidence.get("function") == "report") is is_named
    assert late.next.startswith("Only rank 1 spends time in train.py:9 report: do it less often") is is_named


def test_a_line_that_is_a_part_of_the_lateness_gains_its_part() -> None:
    """The rest is in many places, none of which is named."""
    found = _late_in({"augment": 35, "a": 5, "b": 5, "c": 4})

    assert "augment; that costs" in found.summary
    assert "and without that line steps would be" in found.summary
    assert found.speedup_if_fixed == pytest.approx(1.5, abs=0.1)


@pytest.mark.parametrize(
    ("own", "kind"), [({}, Kind.INPUT_STRAGGLER), ({"input_wait": 1.0}, Kind.STRAGGLER)], ids=["iterator", "and loader"]
)
def test_a_rank_that_waits_for_an_iterator_of_the_script_waits_for_data(own: dict[str, float], kind: Kind) -> None:
    """The hooks measure it as other code, and the samples of the stack are of `input_wait`, with the line."""
    job = Job(own={"forward": 4.0, "backward": 8.0, "optimizer": 1.5, "other": 0.3} | own)
    lines = [_sampled(rank, "backward", 7, 40) for rank in range(2)]
    lines += [SampledLine(1, "input_wait", "/home/me/train.py", 9, "read", None, 40)]

    found = diagnose(window_of(job, adds("other", 14, (1,))), JobFacts(world_size=2, lines=lines))[0]

    assert (found.kind, found.ranks) == (kind, (1,))
    if not own:
        assert found.phase == "input_wait"
        assert "in train.py:9 read; that costs" in found.summary
        assert found.next == "Find out why rank 1 spends more time in train.py:9 read than the other ranks."


@pytest.mark.parametrize(("own_samples", "is_late"), [(40, True), (2, False)])
def test_a_rank_that_lacks_a_core_is_late_by_its_own_line_of_an_iterator(own_samples: int, is_late: bool) -> None:
    """All wait for the iterator for long, and for cores; what only one rank does in it is no lack of a core."""
    job = Job(own={"forward": 2.0, "backward": 4.0, "optimizer": 0.5, "other": 60.0})
    lines = [_sampled(rank, "backward", 7, 20) for rank in range(2)]
    lines += [SampledLine(rank, "input_wait", "/home/me/train.py", 9, "parse", None, 170) for rank in range(2)]
    lines.append(SampledLine(1, "input_wait", "/home/me/train.py", 12, "decode", None, own_samples))
    waits = dict.fromkeys(range(2), 0.4)

    facts = JobFacts(world_size=2, wait_of_ready_time=waits, lines=lines)
    late = [each for each in diagnose(window_of(job, adds("other", 14, (1,))), facts) if each.ranks == (1,)]

    assert [each.kind for each in late] == ([Kind.INPUT_STRAGGLER] if is_late else [])
    assert all("% of it in train.py:12 decode; that costs" in each.summary for each in late)


def test_a_rank_that_is_late_by_other_code_waits_for_the_iterator_as_long_as_the_others() -> None:
    job = Job(own={"forward": 4.0, "backward": 8.0, "optimizer": 1.5, "other": 20.0})
    lines = [_sampled(rank, "backward", 7, 40) for rank in range(2)]
    lines += [SampledLine(rank, "input_wait", "/home/me/train.py", 9, "read", None, 60) for rank in range(2)]
    lines.append(SampledLine(1, "other", "/home/me/train.py", 12, "log", None, 42))

    findings = diagnose(window_of(job, adds("other", 14, (1,))), JobFacts(world_size=2, lines=lines))
    (found,) = (each for each in findings if each.ranks == (1,))

    assert found.kind is Kind.STRAGGLER
    assert "in train.py:12 log" in found.summary


@pytest.mark.parametrize("samples", [{"augment": 48, "log": 1}, {"main": 36, "log": 13}])
def test_a_line_that_has_nearly_all_or_that_others_run_is_told_as_before(samples: dict[str, int]) -> None:
    """The gain is that of a rank that is not late."""
    found = _late_in(samples)

    assert "and without it steps would be" in found.summary
    assert "log" not in found.next
    assert found.speedup_if_fixed == pytest.approx(1.9, abs=0.1)


@pytest.mark.parametrize(("line", "kinds"), [(9, ["INPUT_STRAGGLER", "CPU_CONTENTION"]), (7, ["CPU_CONTENTION"])])
def test_a_fault_in_a_part_of_a_run_is_told_by_its_line(line: int, kinds: list[str]) -> None:
    """Steps vary more than it costs, and one interval may be chance; a line that no other rank runs is not."""
    lines = [_sampled(rank, part, 7, 40) for rank in range(3) for part in ("forward", "input_wait")]
    facts = JobFacts(
        world_size=3,
        wait_of_ready_time=dict.fromkeys(range(3), 0.5),
        lines=[*lines, _sampled(2, "input_wait", line, 40)],
    )
    busy = _varying("forward", 60.0)

    found = diagnose(window_of(Job(ranks=3, steps=300), busy, _in_steps("input_wait", 30.0, 2, 100, 200)), facts)

    assert [each.kind for each in found] == kinds
    if line == 9:
        assert (found[0].ranks, found[0].evidence["since_step"], found[0].evidence["until_step"]) == ((2,), 100, 200)
        assert found[0].summary.endswith("It was slow from step 100 to step 200.")


@pytest.mark.parametrize(("ratio", "found"), [(4.0, True), (1.8, True), (1.08, False)])
@pytest.mark.parametrize("parts", [("forward",), ("forward", "backward", "other")])
def test_more_cpu_time_is_no_lack_of_cores(ratio: float, found: bool, parts: tuple[str, ...]) -> None:
    """Four ranks on two cores; one has twice the layers, and no line of its own. Equal ones may be late by chance."""
    runs = {rank: 0.1 * (ratio if rank == 3 else 1.0) for rank in range(4)}
    waits = {rank: 3 * run for rank, run in runs.items()}
    facts = JobFacts(world_size=4, wait_of_ready_time=dict.fromkeys(range(4), 0.75), wait_of_wall_time=waits)
    # The host becomes busier: steps of the first half are shorter.
    faults = [adds(part, 5.0, (3,)) for part in parts] + [
        _in_steps("forward", 12.0, rank, 100, 200) for rank in range(4)
    ]

    kinds = {each.kind: each for each in diagnose(window_of(Job(ranks=4, steps=200), *faults), facts)}

    assert ("COMPUTE_STRAGGLER" in kinds) == found
    if found:
        assert kinds["COMPUTE_STRAGGLER"].ranks == (3,)
        assert kinds["COMPUTE_STRAGGLER"].summary.endswith(
            f"Rank 3 used {factor_text(ratio)} the CPU time of the others."
        )
        # A core that is slower, or shared, does not make the work take four times the CPU time.
        is_more = "Rank 3 has more to compute: compare the sizes" in kinds["COMPUTE_STRAGGLER"].next
        assert is_more is (ratio > 2 and len(parts) > 1)


@pytest.mark.parametrize(
    ("side", "threads", "kinds"),
    [
        ((0.05, 0.8), 1, ["COMPUTE_STRAGGLER", "CPU_CONTENTION"]),
        ((0.7, 0.8), 1, ["CPU_CONTENTION"]),  # as on the other rank
        ((0.05, 0.8), 4, ["CPU_CONTENTION"]),  # torch's own threads may be the ones that lack cores
    ],
)
def test_a_thread_that_holds_the_lock_of_the_interpreter_is_told(
    side: tuple[float, float], threads: int, kinds: list[str]
) -> None:
    """All parts of that rank are slower: its main thread neither runs nor waits for a core meanwhile."""
    facts = JobFacts(
        world_size=2,
        wait_of_ready_time={0: 0.35, 1: 0.55},
        wait_of_wall_time={0: 0.1, 1: 0.2},
        core_wait_s={0: 10.0, 1: 10.0},
        threads=threads,
        samples=_using(side),
    )
    slower = [adds(part, 6.0, (1,)) for part in ("forward", "backward", "other")]

    found = diagnose(window_of(Job(ranks=2, steps=200), *slower), facts)

    assert [each.kind for each in found] == kinds
    if len(found) > 1:
        assert found[0].ranks == (1,)
        assert "Other threads of rank 1 used 0.8 cores (those of the others 0.1 cores)" in found[0].summary
        assert found[0].next.startswith(
            "Move what the other threads do (`py-spy dump` shows it) into another process on rank 1"
        )

        line = SampledLine(1, "threads", "/me/train.py", 9, "monitor", None, 60)
        seen = diagnose(window_of(Job(ranks=2, steps=200), *slower), structs.replace(facts, thread_lines=(line,)))[0]
        assert "used 0.8 cores, all of it in train.py:9 monitor (those of the others 0.1 cores)" in seen.summary
        assert seen.next.startswith(
            "Move train.py:9 monitor into another process on rank 1 (multiprocessing, or a DataLoader's"
        )


@pytest.mark.parametrize("loader_of", [0, 1])
def test_the_data_of_the_others_are_those_of_their_loader(loader_of: int) -> None:
    """All wait for data, a rank without loader workers longest; the others have three."""
    loaders = {rank: (LoaderFacts(number=0, num_workers=many),) for rank, many in enumerate((3, 0, 3))}
    facts = JobFacts(world_size=3, loader=loaders[loader_of][0], loaders=loaders)
    faults = adds("input_wait", 6.0), adds("input_wait", 30.0, (1,))

    late, of_all, *_ = diagnose(window_of(Job(ranks=3, steps=200), *faults), facts)

    assert (late.kind, late.ranks) == (Kind.INPUT_STRAGGLER, (1,))
    assert late.next == "Give rank 1 as many loader workers as the others have: num_workers=3."
    assert (of_all.kind, of_all.evidence["num_workers"]) == (Kind.INPUT_BOUND, 3)
    assert "num_workers=0" not in of_all.next


@pytest.mark.parametrize(
    ("workers", "says"),
    [((4, 1), "Rank 1 has 1 loader worker, the others 4."), ((2, 0), "Rank 1 has no loader worker, the others 2."),
     ((2, 2), None), ((1, 4), None), ((4,), None)],
)  # fmt: skip
def test_a_rank_with_fewer_loader_workers_is_told_to_have_as_many(workers: tuple[int, ...], says: str | None) -> None:
    """Where it has as many, or that is not known, its data are to be compared."""
    loaders = {rank: (LoaderFacts(number=0, num_workers=many),) for rank, many in enumerate(workers)}
    facts = JobFacts(world_size=2, loader=loaders[0][0], loaders=loaders)

    found = diagnose(window_of(Job(ranks=2, steps=200), adds("input_wait", 30.0, (1,))), facts)[0]

    assert (found.kind, found.ranks) == (Kind.INPUT_STRAGGLER, (1,))
    assert ("loader worker, the" in found.summary) == (says is not None)
    if says is not None:
        assert found.summary.endswith(says)
        assert found.next == f"Give rank 1 as many loader workers as the others have: num_workers={workers[0]}."


@pytest.mark.parametrize(("at_work", "bounded"), [(90, True), (10, False)])
def test_a_rank_with_faster_data_is_as_fast_as_the_workers_of_the_others(at_work: int, *, bounded: bool) -> None:
    """Four workers that make batches for half of the time make twice as many at most, however soon they are asked."""
    idle = SampledLine(0, "workers", None, None, None, None, 200 - at_work)
    lines = [SampledLine(0, "workers", "/x/train.py", 9, "read", None, at_work), idle]
    loader = LoaderFacts(number=0, num_workers=4)
    facts = JobFacts(loader=loader, loaders={0: (loader,), 1: (loader,)}, lines_of_workers={0: lines})
    found = diagnose(window_of(Job(), adds("input_wait", 60, (1,))), facts)[0]

    assert (found.kind, found.ranks) == (Kind.INPUT_STRAGGLER, (1,))
    assert (found.speedup_if_fixed == pytest.approx(200 / at_work)) is bounded
    assert ("not more, as the others' workers make no more" in found.summary) is bounded


@pytest.mark.parametrize(
    ("library", "waits"),
    [("threading.py:295 Condition.wait", True), ("connection.py:374 Connection._recv", True), (None, False)],
)
def test_a_rank_that_waits_for_a_thread_is_not_told_to_do_it_in_a_thread(library: str | None, *, waits: bool) -> None:
    """Its thread fills a queue more slowly than those of the other ranks."""
    lines = [
        SampledLine(1, "other", "/x/train.py", 9, "next_batch", library, 50),
        *(SampledLine(rank, "backward", "/x/train.py", 1, "main", None, 50) for rank in (0, 1)),
    ]
    window = window_of(Job(), adds("other", 14, (1,)))
    found = next(each for each in diagnose(window, JobFacts(lines=lines)) if each.kind is Kind.STRAGGLER)

    assert found.next.startswith("Rank 1 waits in train.py:9 next_batch for another thread or process: make") is waits
    assert ("do it less often, or in a thread" in found.next) is not waits


@pytest.mark.parametrize(("readers", "alone"), [((1,), True), ((0, 1), False), ((0,), False)])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_rank_that_reads_for_all_is_not_compared_with_the_others(
    readers: tuple[int, ...], alone: bool, workers: int
) -> None:
    """It sends its batches on; ranks with loaders have data of their own, which may be faster."""
    loader = LoaderFacts(number=0, num_workers=workers)
    facts = JobFacts(world_size=2, loader=loader, loaders=dict.fromkeys(readers, (loader,)))
    window = window_of(Job(ranks=2, steps=200, own={"input_wait": 0.0}), adds("input_wait", 30.0, (1,)))

    found = diagnose(window, facts)[0]

    assert (found.kind, found.ranks) == (Kind.INPUT_STRAGGLER, (1,))
    assert found.next.startswith("Only rank 1 reads batches: let ") is alone
    assert ("let more workers" in found.next) is (alone and bool(workers))


def _using(cores: tuple[float, ...]) -> MachineSamples:
    """Return samples of ranks whose threads, but the main one, use so many cores; that one uses 0.2."""
    samples = MachineSamples()
    for rank, used in enumerate(cores):
        rows = np.zeros(20, PROCESS.dtype)
        rows["t_ns"], rows["step"] = np.arange(20) * 1e9, np.arange(20) * 10
        rows["main_run_ns"], rows["cpu_ns"] = rows["t_ns"] * 0.2, rows["t_ns"] * (0.2 + used)
        samples.add(PROCESS.name, rank, rows)

    return samples


@pytest.mark.parametrize(("run", "line"), [(0.36, 7), (0.1, 9)])
def test_a_rank_that_also_lacks_a_core_is_slow_by_its_code(run: float, line: int) -> None:
    """It waits for a core more than the other, and computes more, or runs a line of its own: the code is a cause."""
    lines = [_sampled(rank, part, 7, 40) for rank in range(2) for part in ("forward", "backward")]
    facts = JobFacts(
        world_size=2,
        wait_of_ready_time={0: 0.29, 1: 0.54 / (0.54 + run)},
        wait_of_wall_time={0: 0.04, 1: 0.54},
        lines=[*lines, _sampled(1, "forward", line, 60)],
    )

    found = diagnose(window_of(Job(ranks=2, steps=200), adds("forward", 25.0, (1,))), facts)[0]

    assert (found.kind, found.ranks) == ("COMPUTE_STRAGGLER", (1,))
    assert "Rank 1 waited for a CPU core" in found.summary
    assert "is not the cause" not in found.next


@pytest.mark.parametrize(("runs_ms", "waits_ms", "is_late"), [(180, 474, False), (600, 50, True)])
def test_a_rank_that_lacks_a_core_in_a_second_of_training_is_not_slow(
    runs_ms: int, waits_ms: int, is_late: bool
) -> None:
    """Rank 0 had its core in training, and neither had one in the imports before; rank 1 "used 45x its CPU time"."""
    builder = JobFactsBuilder(2)
    for rank, (ran, waited) in enumerate([(181, 12), (runs_ms, waits_ms)]):
        rows = np.zeros(4, PROCESS.dtype)
        rows["t_ns"], rows["step"] = np.array([0, 10_000, 11_000, 11_100]) * 10**6, (-1, 0, 150, -1)
        rows["main_run_ns"] = np.array([0, 2500, 2500 + ran, 2500 + ran]) * 10**6
        rows["main_wait_ns"] = np.array([0, 8500, 8500 + waited, 8500 + waited]) * 10**6
        builder.process_rows(rank, rows)

    job = Job(ranks=2, steps=160, own={"forward": 0.4, "backward": 0.6, "optimizer": 0.3, "other": 0.2}, comm=2.0)
    found = diagnose(window_of(job, adds("backward", 3.0, (1,))), builder.build())

    assert any(each.kind is Kind.COMPUTE_STRAGGLER for each in found) is is_late


def test_ranks_with_one_fault_do_not_hide_each_other_s_line() -> None:
    """Two of four ranks, on two cores: the line is of both, and of none that is not late."""
    lines = [_sampled(rank, part, 7, 40) for rank in range(4) for part in ("forward", "other")]
    facts = JobFacts(
        world_size=4,
        wait_of_ready_time=dict.fromkeys(range(4), 0.5),
        wait_of_wall_time=dict.fromkeys(range(4), 0.2),
        lines=[*lines, *(_sampled(rank, "other", 9, 20) for rank in (2, 3))],
    )
    # By noise a third rank is above the last one.
    faults = adds("other", 4.5, (2, 3)), adds("forward", 1.8, (0,))

    found = diagnose(window_of(Job(ranks=4, steps=200), *faults), facts)[0]

    assert (found.kind, found.ranks) == ("STRAGGLER", (2, 3))


def test_the_line_of_the_loop_is_not_blamed_for_loader_workers() -> None:
    """A late rank waits for its workers in the line that asks for a batch, as all ranks do."""
    select = "selectors.py:402 _PollLikeSelector.select"
    lines = [SampledLine(1, "input_wait", "/home/me/train.py", 11, "<module>", select, 80)]
    facts = JobFacts(world_size=2, lines=[*lines, *(_sampled(rank, "forward", 7, 40) for rank in range(2))])

    found = diagnose(window_of(Job(ranks=2), adds("input_wait", 30.0, (1,))), facts)[0]

    assert (found.kind, found.ranks) == ("INPUT_STRAGGLER", (1,))
    assert "line" not in found.evidence
    assert own_line_share(facts.lines, "input_wait", [1], [0]) == 0


def test_one_long_step_is_told_by_no_line() -> None:
    """An evaluation on one rank, once in a run, is not how long that rank's steps are."""
    lines = [_sampled(rank, "other", 7, 40) for rank in range(2)]
    facts = JobFacts(world_size=2, lines=[*lines, _sampled(1, "other", 9, 150)])

    found = diagnose(window_of(Job(ranks=2, steps=80), _in_steps("other", 15_000.0, 1, 40, 41)), facts)

    assert [each.kind for each in found if each.ranks] == []


def _varying(part: str, ms: float) -> Fault:
    """Return up to so much more in each interval of ten steps, on all ranks."""

    def fault(own: dict[str, Any], random: np.random.Generator) -> None:
        own[part] += np.repeat(random.uniform(0, ms, own[part].shape[1] // 10), 10)

    return fault


def _in_steps(part: str, ms: float, rank: int, first: int, last: int) -> Fault:
    def fault(own: dict[str, Any], _random: object) -> None:
        own[part][rank, first:last] += ms

    return fault


def test_a_line_that_another_rank_runs_is_of_no_rank_alone() -> None:
    """All other ranks count, not only those that are compared; and few samples show nothing."""
    lines = [_sampled(0, "forward", 7, 60), _sampled(1, "forward", 7, 60), _sampled(2, "backward", 8, 60)]

    assert own_line_share(lines, "forward", (1,), (2,)) == 1.0
    assert own_line_share(lines, "forward", (1,), (0, 2)) == 0.0
    assert own_line_share([*lines, _sampled(1, "forward", 9, 11)], "forward", (1,), (0, 2)) == 0.0
    assert own_line_share([*lines, _sampled(1, "forward", 9, 12)], "forward", (1,), (0, 2)) == pytest.approx(12 / 72)


@pytest.mark.parametrize(("own", "is_named"), [(41, True), (12, False)])
def test_what_only_the_workers_of_a_late_rank_do_is_named_beside_what_all_do(own: int, is_named: bool) -> None:
    """Each decodes; those of one rank also resize its images, which takes as long."""
    lines = [SampledLine(rank, "workers", "/x/data.py", 8, "decode", None, 45) for rank in range(2)]
    lines += [SampledLine(0, "workers", None, None, None, None, 50)]
    lines += [SampledLine(1, "workers", "/x/data.py", 9, "resize", None, own)]

    facts = JobFacts(world_size=2, loader=LoaderFacts(num_workers=1), lines_of_workers={0: lines})
    found, *_ = diagnose(window_of(Job(ranks=2, steps=200), adds("input_wait", 30.0, (1,))), facts)

    assert (found.kind, found.ranks) == (Kind.INPUT_STRAGGLER, (1,))
    assert ("in which its worker makes batches, 48 % is in data.py:9 resize" in found.summary) is is_named
    assert (found.evidence.get("function") == "resize") is is_named


@pytest.mark.parametrize(
    ("of_others", "samples", "idle", "named"),
    [
        ("read", 60, 0, True),
        ("read", 2, 60, True),
        ("slow_path", 60, 0, False),
        ("slow_path", 2, 60, False),
    ],
    ids=["a path of its own", "others are idle", "the path of all", "the path of idle ones"],
)
def test_a_rank_whose_workers_take_a_path_of_their_own_is_named_with_it(
    of_others: str, samples: int, idle: int, named: bool
) -> None:
    """Where all workers run that function, as with a slow disk, it is not what makes the rank slow."""
    lines = [SampledLine(1, "workers", "/x/data.py", 7, "slow_path", None, 60)]
    for rank in (0, 2, 3):
        lines += [SampledLine(rank, "workers", "/x/data.py", 9, of_others, None, samples)]
        lines += [SampledLine(rank, "workers", None, None, None, None, idle)]

    facts = JobFacts(world_size=4, loader=LoaderFacts(num_workers=2), lines_of_workers={0: lines})
    found, *_ = diagnose(window_of(Job(ranks=4, steps=200), adds("input_wait", 30.0, (1,))), facts)

    assert (found.kind, found.ranks) == ("INPUT_STRAGGLER", (1,))
    assert ("; of the time in which its workers make batches, all is in data.py:7 slow_path" in found.summary) == named
    assert (found.evidence.get("function") == "slow_path") == named
    assert ("Find out why rank 1 spends more time in data.py:7 slow_path" in found.next) == named


@pytest.mark.parametrize(
    ("parameters", "messages", "is_stage"),
    [((100, 400), True, True), ((400, 400), True, False), ((100, 400), False, False)],
)
@pytest.mark.parametrize("parts", [("backward",), ("forward", "backward", "optimizer")])
def test_a_long_stage_of_a_pipeline_gains_nothing_by_another_host(
    parameters: tuple[int, int], parts: tuple[str, ...], *, messages: bool, is_stage: bool
) -> None:
    """What one stage computes less, another one does; a late rank whose stage is like the others' is slow."""
    window = window_of(Job(ranks=2, steps=100), *(adds(part, 20.0, (1,)) for part in parts))
    builder = JobFactsBuilder(2)
    for rank, size in enumerate(parameters):
        builder.info(rank, {"kind": "model", "parameters": size, "step": 0})
        builder.info(rank, {"kind": "collectives", "elements": 65, "messages": messages})

    finding = next(each for each in diagnose(window, builder.build()) if each.kind is Kind.COMPUTE_STRAGGLER)

    assert finding.ranks == (1,)
    assert ("its part of the model is a different one" in finding.summary) is is_stage
    assert finding.next.startswith("Divide the model more evenly: move layers from rank 1") is is_stage
    assert (finding.speedup_if_fixed == 1.0) is is_stage
    if is_stage:  # by all parts of the step, though one is named
        assert finding.cost_share == pytest.approx(len(parts) * 20 / finding.evidence["step_ms"], rel=0.05)


@pytest.mark.parametrize("optimizer_ms", [0.0, 0.9])
def test_longer_passes_beside_a_usual_optimizer_are_more_work(optimizer_ms: float) -> None:
    """An expert that gets most tokens costs 8 of 32 ms: less than is blamed on a slow host, whose optimizer is slow."""
    own = {"forward": 4.0, "backward": 6.0, "optimizer": 1.0, "other": 0.5}
    more = [adds(part, 0.8 * own[part], (1,)) for part in ("forward", "backward")]
    job = Job(ranks=2, steps=300, own=own, comm=12.0)

    found = diagnose(window_of(job, *more, adds("optimizer", optimizer_ms, (1,))), JobFacts(world_size=2))

    assert (found[0].kind is Kind.COMPUTE_STRAGGLER) is (optimizer_ms == 0.0)
    if optimizer_ms == 0.0:
        assert "slower in forward and backward" in found[0].summary
        assert found[0].next.startswith("See whether rank 1 has more to compute")
