"""Findings about garbage collections: cost, line, advice, and where they must stay silent."""

from __future__ import annotations

import numpy as np
import pytest
from msgspec.structs import replace

from tests.diagnosis.fabricated import MS, Job, adds, window_of
from traceml.database.schema import IMPORTING, LINE_OTHER, PAUSES, Pause, Phase
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.pauses import PauseHistory
from traceml.diagnosis.facts.sampled_lines import SampledLine
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind, Severity
from traceml.diagnosis.ruleset import diagnose

ALONE = Job(ranks=1, steps=220, grouped=False)
LIBRARY = "/v/lib/python3.11/site-packages/pykeen/training/training_loop.py:742 TrainingLoop._train"
NAMES = {rank: {5: "/x/train.py:31 tidy", 6: LIBRARY} for rank in range(4)}


def collections(ms: float, *, every: int = 1, phase: int = LINE_OTHER, called: bool = False, generation: int = 2):
    steps = np.arange(every // 2, 220, every)
    rows = np.zeros(len(steps), PAUSES.dtype)
    rows["step"], rows["ns"], rows["count"] = steps, int(ms * MS), 1
    rows["cause"], rows["phase"], rows["detail"] = int(Pause.COLLECTION), phase, generation
    rows["called"], rows["line_id"], rows["text_id"] = called, 5 if called else -1, -1
    return rows


def history(**of_rank) -> PauseHistory:
    pauses = PauseHistory(NAMES)
    for rank, rows in of_rank.items():
        pauses.add(int(rank.removeprefix("r")), rows)

    return pauses


def found(job: Job, *faults, pauses: PauseHistory, lines: tuple[SampledLine, ...] = ()) -> list[Finding]:
    return diagnose(window_of(job, *faults), JobFacts(world_size=job.ranks, pauses=pauses, lines=lines))


def test_a_call_in_each_step_is_reported_with_its_line():
    """The call explains all of the time outside the phases, so no other finding is about that."""
    findings = found(ALONE, adds("other", 30), pauses=history(r0=collections(30, called=True)))

    assert [finding.kind for finding in findings] == [Kind.GC_PAUSES]
    verdict = findings[0]
    assert (verdict.evidence["file"], verdict.evidence["line"]) == ("/x/train.py", 31)
    assert verdict.severity is Severity.CRITICAL
    assert verdict.cost_share == pytest.approx(30 / 44, rel=0.05)
    assert "The script's gc.collect() at train.py:31 tidy" in verdict.summary
    assert "Take the call out of the loop" in verdict.next
    assert "library" not in verdict.evidence


def test_the_line_is_looked_up_in_the_names_of_its_own_rank() -> None:
    """Rank 1 collects longest, rank 0 most often; they have numbered the lines that they ran in another order."""
    often, long = (collections(ms, called=True) for ms in (15, 31))
    long["line_id"] = 6
    pauses = PauseHistory({0: NAMES[0], 1: {5: LIBRARY, 6: "/x/train.py:31 tidy"}})
    pauses.add(0, np.repeat(often, 2))
    pauses.add(1, long)

    (verdict, *_) = found(Job(ranks=2, steps=220), adds("other", 31), pauses=pauses)

    assert "gc.collect() at train.py:31 tidy takes" in verdict.summary


def test_the_merged_ranks_of_a_host_are_named_as_well() -> None:
    """Rank 0 represents two more, which behave as it does; collections are known of it alone."""
    window = replace(window_of(Job(ranks=2), adds("other", 31, (0,), every=4)), represents={0: (0, 2, 3)})
    pauses = history(r0=collections(30, every=4, called=True))

    verdict = diagnose(window, JobFacts(world_size=4, pauses=pauses))[0]

    assert (verdict.kind, verdict.ranks) == (Kind.GC_PAUSES, (0, 2, 3))
    assert "one in 4 steps" in verdict.summary


def test_communication_beside_collections_is_a_share_of_the_whole_step() -> None:
    """Steps would be 14 ms without them, of which 10 ms are waiting: that is a tenth of 104 ms."""
    rows = collections(90, called=True)
    findings = found(Job(ranks=2, steps=220, comm=10.0), adds("other", 90), pauses=history(r0=rows, r1=rows))

    assert [each.kind for each in findings] == [Kind.GC_PAUSES]


@pytest.mark.parametrize(
    ("line", "subject"),
    [
        (5, "The gc.collect() of pykeen at training_loop.py:742 TrainingLoop._train, through train.py:31 tidy, takes"),
        (6, "The gc.collect() of pykeen at training_loop.py:742 TrainingLoop._train takes"),
    ],
)
def test_a_call_of_a_library_is_not_said_to_be_the_scripts(line, subject):
    """The user cannot take it out of the loop; with or without a line of the user."""
    rows = collections(30, called=True)
    rows["line_id"], rows["text_id"] = line, 6
    verdict = found(ALONE, adds("other", 30), pauses=history(r0=rows))[0]

    assert verdict.summary.startswith(subject)
    assert "an option of pykeen" in verdict.next
    assert "out of the loop" not in verdict.next
    assert verdict.evidence["library"] == LIBRARY


def test_the_gain_is_that_of_the_advice():
    """Every 500th step is left, which takes a hundredth of the step."""
    verdict = found(ALONE, adds("other", 30), pauses=history(r0=collections(30, called=True)))[0]

    every = verdict.evidence["every_advised"]
    left_ms = 14.1 + 30 / every
    assert every == 500
    assert f"every {every}th step" in verdict.next
    assert verdict.speedup_if_fixed == pytest.approx(44.1 / left_ms, rel=0.05)


@pytest.mark.parametrize(("longest_ms", "imports", "told"), [(390, 300, True), (1600, 300, False), (1600, 0, True)])
def test_collections_of_a_step_that_imports_are_no_habit(longest_ms: float, imports: int, told: bool) -> None:
    """It collects for longer than all others together; so does the one full collection of a heap that grows."""
    rows = collections(100, every=30)
    rows["ns"][3] = longest_ms * MS
    long = np.zeros(220)
    long[rows["step"]] = rows["ns"] / MS

    def fault(own: dict[str, np.ndarray], _random: object) -> None:
        own["other"][0] += long

    line = SampledLine(0, "other", "/x/train.py", 9, "metrics", f"{IMPORTING}1207 _handle_fromlist", imports)
    lines = (line,) if imports else ()
    kinds = [each.kind for each in found(ALONE, fault, pauses=history(r0=rows), lines=lines)]
    assert (Kind.GC_PAUSES in kinds) is told


@pytest.mark.parametrize(("ms", "told"), [(15, True), (1, False)])
def test_collections_in_a_collective_are_waited_for(ms: float, told: bool) -> None:
    """Unpickling what `broadcast_object_list` has received makes objects: it is no part of a rank's own work."""
    job = Job(ranks=2, comm=20.0)
    findings = found(job, pauses=history(r1=collections(ms, phase=int(Phase.COMM))))
    told_of = [each for each in findings if each.kind is Kind.GC_PAUSES]

    assert [each.ranks for each in told_of] == [(1,)] * told
    assert all(each.cost_share == pytest.approx(ms / 34, rel=0.05) for each in told_of)


def test_collections_of_the_interpreter_are_told_apart():
    """They are advised against by freezing what exists, not by taking a call out."""
    pauses = history(r0=collections(400, every=20, phase=int(Phase.FORWARD)))
    verdict = found(ALONE, adds("forward", 400, every=20), pauses=pauses)[0]

    assert (verdict.kind, verdict.evidence["called"]) == (Kind.GC_PAUSES, False)
    assert "gc.freeze()" in verdict.next
    assert ": one in 19 steps, a full one 400 ms." in verdict.summary


def test_short_collections_count_together():
    """A row of many short ones is spread over its steps."""
    rows = collections(800, every=40, generation=0)
    rows["count"] = 4000
    verdict = found(ALONE, adds("other", 20), pauses=history(r0=rows))[0]

    assert verdict.kind is Kind.GC_PAUSES
    assert verdict.cost_share == pytest.approx(20 / 34, rel=0.1)


def test_the_rank_that_collects_is_no_straggler():
    """Others wait for it, and its collections are why."""
    findings = found(
        Job(ranks=4), adds("other", 20, (2,)), pauses=history(r2=collections(20, called=True), r0=collections(0))
    )

    assert [(finding.kind, finding.ranks) for finding in findings] == [(Kind.GC_PAUSES, (2,))]


@pytest.mark.parametrize(
    "rows", [collections(0.5), collections(500, every=100), collections(5, every=10)], ids=["cheap", "rare", "few"]
)
def test_cheap_or_rare_collections_are_silent(rows):
    """Less than a tenth of the step, or two in the whole window, are no finding."""
    ms = rows["ns"][0] / MS
    every = int(rows["step"][1] - rows["step"][0])
    kinds = {each.kind for each in found(ALONE, adds("other", ms, every=every), pauses=history(r0=rows))}

    assert Kind.GC_PAUSES not in kinds


def test_pauses_outside_of_steps_cost_nothing():
    """Collections during an evaluation have step -1."""
    rows = collections(50)
    rows["step"] = -1

    assert found(ALONE, pauses=history(r0=rows))[0].kind is Kind.COMPUTE_BOUND


@pytest.mark.parametrize(("samples", "is_named"), [(180, True), (110, False)])
def test_the_line_that_makes_the_objects_is_named(samples: int, is_named: bool) -> None:
    """Where it must have most of the collections: they are most of the part, and so is the line."""
    lines = [
        SampledLine(
            0, "other", "/x/train.py", 8, "lr_at", "/usr/lib/python3.11/json/decoder.py:353 raw_decode", samples
        ),
        SampledLine(0, "other", "/x/train.py", 9, "log", None, 200 - samples),
        SampledLine(0, "backward", "/x/train.py", 30, "train", None, 90),
    ]
    facts = JobFacts(pauses=history(r0=collections(18)), lines=lines)
    (verdict, *_) = diagnose(window_of(ALONE, adds("other", 30)), facts)

    assert verdict.kind is Kind.GC_PAUSES
    assert (", most of them in train.py:8 lr_at." in verdict.summary) is is_named
    assert ("make fewer objects in train.py:8 lr_at" in verdict.next) is is_named
    assert ("function" in verdict.evidence) is is_named


@pytest.mark.parametrize(("collects", "is_named"), [(0, True), (190, False)])
def test_other_code_beside_collections_has_its_line(collects: int, is_named: bool) -> None:
    """Samples are of both: a line is named that has most of the part even if it has all collections."""
    lines = [
        SampledLine(0, "other", "/x/train.py", 8, "lr_at", None, 280 - collects),
        SampledLine(0, "other", "/x/train.py", 9, "collate", None, collects),
        SampledLine(0, "backward", "/x/train.py", 30, "train", None, 120),
    ]
    facts = JobFacts(pauses=history(r0=collections(18)), lines=lines)
    findings = diagnose(window_of(ALONE, adds("other", 30)), facts)

    residual = next(each for each in findings if each.kind is Kind.RESIDUAL_HEAVY)
    assert (residual.evidence.get("function") == "lr_at") is is_named
    assert "collate" not in residual.summary


def test_collections_of_the_script_are_not_those_of_the_interpreter() -> None:
    """Most of the interpreter's own are in forward; the line that calls for others makes no objects."""
    lines = [
        SampledLine(0, "other", "/x/train.py", 31, "tidy", None, 200),
        SampledLine(0, "forward", "/x/train.py", 12, "forward", None, 100),
    ]
    called, own = collections(20, called=True), collections(8, phase=int(Phase.FORWARD))
    facts = JobFacts(pauses=history(r0=np.concatenate([called, own, collections(1.5)])), lines=lines)
    findings = diagnose(window_of(ALONE, adds("other", 22), adds("forward", 8)), facts)

    by_interpreter = next(each for each in findings if each.kind is Kind.GC_PAUSES and not each.evidence["called"])
    assert "tidy" not in by_interpreter.summary + by_interpreter.next
