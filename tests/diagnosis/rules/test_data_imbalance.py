"""Work that follows the size of the batches: told as such, and no rank or step is blamed for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from tests.diagnosis.fabricated import Fault, Job, adds, rows_of
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.job_facts_builder import JobFactsBuilder
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind
from traceml.diagnosis.rules.data_imbalance import with_batch_sizes, without_largest_batches
from traceml.diagnosis.ruleset import diagnose
from traceml.diagnosis.steps.aligned_steps import AlignedSteps
from traceml.diagnosis.steps.kept_steps import KeptSteps

Sizes = Callable[[int, int], np.ndarray]


def uneven(ranks: int, steps: int) -> np.ndarray:
    """Return sizes that differ by rank and step."""
    return np.random.default_rng(5).uniform(0.3, 1.7, (ranks, steps))


def one_larger(ranks: int, steps: int) -> np.ndarray:
    """Return sizes of which the last rank's are twice those of the others."""
    sizes = np.random.default_rng(5).uniform(0.9, 1.1, (ranks, steps))
    sizes[-1] *= 2
    return sizes


def rarely_large(ranks: int, steps: int) -> np.ndarray:
    """Return sizes of which one in thirty, by chance, is eight times as large."""
    random = np.random.default_rng(5)
    return random.uniform(0.95, 1.05, (ranks, steps)) * np.where(random.random(steps) < 1 / 30, 8, 1)


def steps_of(job: Job, sizes: np.ndarray, *faults: Fault, known: bool = True) -> AlignedSteps:
    """Return the steps of a run whose forward and backward take longer for larger batches."""

    def grows(own, random):
        for part in ("forward", "backward"):
            own[part] *= sizes

    found = KeptSteps(1024, job.ranks)
    for rank, rows in enumerate(rows_of(job, grows, *faults)):
        rows["elements"] = sizes[rank] * 1000 * known
        found.scatter(np.full(len(rows), rank), rows)

    return found.aligned(last=1000)


def kinds(of: AlignedSteps, job: Job) -> list[Kind]:
    return [finding.kind for finding in diagnose(of, JobFacts(world_size=job.ranks))]


@pytest.mark.parametrize(("sizes", "ranks"), [(uneven, ()), (one_larger, (3,))])
def test_ranks_that_wait_for_the_largest_batch(sizes: Sizes, ranks: tuple[int, ...]):
    """The difference is that of the batches: no rank is a straggler. One that always has the largest is named."""
    job = Job(ranks=4)
    of = steps_of(job, sizes(4, job.steps))

    finding = diagnose(of, JobFacts(world_size=4))[0]

    assert (finding.kind, finding.ranks) == (Kind.DATA_IMBALANCE, ranks)
    assert ("; that is rank 3 in nearly all steps" in finding.summary) == bool(ranks)
    assert finding.evidence["explained_share"] > 0.8
    assert finding.speedup_if_fixed > 1.1
    assert not any(kind.rule.is_straggler for kind in kinds(of, job))


def test_a_rank_that_is_slow_beside_uneven_batches_is_not_said_to_be_none() -> None:
    """It plots at times, whatever the size of its batch."""
    job = Job(ranks=4, steps=400)
    of = steps_of(job, uneven(4, job.steps), adds("other", 150.0, (1,), chance=0.03))

    late, sizes = diagnose(of, JobFacts(world_size=4))[:2]

    assert (late.kind, late.ranks, sizes.kind) == (Kind.STRAGGLER, (1,), Kind.DATA_IMBALANCE)
    assert "o rank is slow" not in sizes.summary
    assert " the smallest, and the others wait for the rank that has it. That costs " in sizes.summary


@pytest.mark.parametrize("is_larger", [True, False])
def test_communication_beside_uneven_batches_does_not_say_that_no_rank_is_late(is_larger: bool) -> None:
    job = Job(ranks=4, comm=40.0)
    sizes = one_larger(4, job.steps) if is_larger else np.ones((4, job.steps))
    found = diagnose(steps_of(job, sizes), JobFacts(world_size=4))
    [comm] = [each for each in found if each.kind is Kind.COMM_BOUND]

    assert ("no rank is late but for the size of its batch;" in comm.summary) is is_larger
    assert ("no rank is late;" in comm.summary) is not is_larger


def test_without_sizes_the_same_run_has_a_straggler():
    """The rule's information is the size: without it, the rank with more work is late."""
    job = Job(ranks=4)
    assert any(kind.rule.is_straggler for kind in kinds(steps_of(job, one_larger(4, job.steps), known=False), job))


def test_a_rank_that_is_slower_than_its_batches_are_larger_is_slow():
    """Its batches are 12 % larger, and it takes 2.2x as long: no work grows by that much with the size."""
    job = Job(ranks=2)
    sizes = np.random.default_rng(5).uniform(0.98, 1.02, (2, job.steps))
    sizes[1] *= 1.12
    found = diagnose(steps_of(job, sizes, adds("forward", 14.0, (1,))), JobFacts(world_size=2))

    assert (found[0].kind, found[0].ranks) == (Kind.COMPUTE_STRAGGLER, (1,))
    assert Kind.DATA_IMBALANCE not in {each.kind for each in found}


@pytest.mark.parametrize(("larger", "is_told"), [(3.0, True), (1.0, False)])
def test_larger_batches_of_a_late_rank_are_told(larger, is_told):
    """Other programs make work follow the sizes too little to explain it: they are told nevertheless."""
    job = Job(ranks=2)
    sizes = np.random.default_rng(5).uniform(0.98, 1.02, (2, job.steps))
    sizes[1] *= larger
    job = replace(job, own={**job.own, "forward": 1.0, "backward": 2.0})
    of = steps_of(job, sizes, adds("forward", 12.0, (1,)), adds("backward", 30.0, chance=0.5))
    found = next(each for each in diagnose(of, JobFacts(world_size=2)) if each.kind is Kind.COMPUTE_STRAGGLER)

    assert found.ranks == (1,)
    assert ("Its batches have 3.0x as many elements as those of the others." in found.summary) is is_told
    assert found.next.startswith("Give rank 1 as much data per step as the others have") is is_told


@pytest.mark.parametrize(
    ("ranks", "whose", "whom"), [((1,), "its batch size, its", "it"), ((1, 2), "their batch sizes, their", "them")]
)
def test_a_rank_may_get_its_larger_inputs_from_the_others(ranks: tuple[int, ...], whose: str, whom: str) -> None:
    """As tokens that are routed to its expert: then no sampler is to blame."""
    job = Job(ranks=4)
    sizes = np.random.default_rng(5).uniform(0.98, 1.02, (4, job.steps))
    sizes[list(ranks)] *= 3.0
    job = replace(job, own={**job.own, "forward": 1.0, "backward": 2.0})
    late = diagnose(steps_of(job, sizes, adds("forward", 12.0, ranks), known=False), JobFacts(world_size=4))[0]

    told = with_batch_sizes(late, steps_of(job, sizes)).next

    assert f"look at {whose} number of batches per step" in told
    assert f"and what the others send to {whom}, such as the tokens of an expert (all_to_all)." in told


@pytest.mark.parametrize(("larger", "is_all"), [(3.0, False), (16.0, True)])
def test_batches_that_are_larger_than_their_work_is_longer_explain_a_late_rank(larger, is_all):
    """Forward takes 13 times as long: with batches of three times the size there is another cause."""
    job = Job(ranks=2)
    job = replace(job, own={**job.own, "forward": 1.0, "backward": 2.0})
    sizes = np.ones((2, job.steps))
    late = diagnose(steps_of(job, sizes, adds("forward", 12.0, (1,)), known=False), JobFacts(world_size=2))[0]
    sizes[1] *= larger

    told = with_batch_sizes(late, steps_of(job, sizes)).next

    assert told.startswith("Give rank 1 as much data per step")
    assert (late.next in told) is not is_all


@pytest.mark.parametrize(("more_ms", "messages"), [(12.0, True), (12.0, False), (60.0, True)])
def test_inputs_of_two_stages_of_a_pipeline_are_not_compared(more_ms: float, messages: bool) -> None:
    """The second one gets what the first one has computed, of twice as many elements."""
    job = Job(ranks=2)
    sizes = np.random.default_rng(5).uniform(0.98, 1.02, (2, job.steps))
    sizes[1] *= 2
    builder = JobFactsBuilder(2)
    for rank in (0, 1):
        builder.info(rank, {"kind": "model", "parameters": 100 + 300 * rank, "step": 0})
        builder.info(rank, {"kind": "collectives", "elements": 65, "messages": messages})

    found = diagnose(steps_of(job, sizes, adds("backward", more_ms, (1,))), builder.build())[0]

    assert found.kind is (Kind.COMPUTE_STRAGGLER if messages else Kind.DATA_IMBALANCE)
    assert ("as much data per step" in found.next) is not messages
    assert ("as many elements" in found.summary) is False


@pytest.mark.parametrize(
    ("ranks", "share", "ratio", "told"),
    [((1,), 0.16, 4.0, False), ((1,), 0.5, 4.0, True), ((2,), 0.16, 4.0, True), ((1,), 0.16, None, True)],
)
def test_a_rank_with_the_largest_batches_is_not_called_slow_beside_it(ranks, share, ratio, told) -> None:
    """Backward is not measured in all steps: what is left of a rank's longer one follows the size, too."""
    evidence = {} if ratio is None else {"size_ratio": ratio}
    late = Finding.of(
        Kind.COMPUTE_STRAGGLER, ranks=ranks, phase="backward", summary="", next="", evidence=evidence, cost_share=share
    )
    larger = Finding.of(Kind.DATA_IMBALANCE, ranks=(1,), summary="", next="", evidence={}, cost_share=0.3)

    assert without_largest_batches([late], [larger]) == ([late] if told else [])


def test_a_slow_rank_is_found_among_uneven_batches():
    """What does not follow the size is judged as usual."""
    job = Job(ranks=4)
    found = kinds(steps_of(job, uneven(4, job.steps), adds("input_wait", 9.0, (2,))), job)
    assert Kind.INPUT_STRAGGLER in found


def test_rare_large_batches_are_no_jitter():
    """Long steps of one rank whose batches are as much larger are explained."""
    job = Job(ranks=1, grouped=False)
    sizes = rarely_large(1, job.steps)
    assert Kind.JITTER in kinds(steps_of(job, sizes, known=False), job)
    assert Kind.JITTER not in kinds(steps_of(job, sizes), job)


def test_equal_batches_are_no_finding():
    """A slow rank whose batches are like the others' is a straggler."""
    job = Job(ranks=4)
    of = steps_of(job, np.ones((4, job.steps)), adds("forward", 6.0, (1,)))
    found = kinds(of, job)
    assert Kind.DATA_IMBALANCE not in found
    assert Kind.COMPUTE_STRAGGLER in found


@pytest.mark.parametrize("every", [4, 16])
def test_sizes_explain_the_steps_that_measured_own_backward(every: int) -> None:
    """In the others it is a mean, which follows no size: the gain is that of a job which measures all."""
    finding, of_all = (
        diagnose(steps_of(job, uneven(8, 400)), JobFacts(world_size=8))[0]
        for job in (Job(ranks=8, steps=400, callback_every=every), Job(ranks=8, steps=400))
    )

    assert finding.kind is of_all.kind is Kind.DATA_IMBALANCE
    assert finding.speedup_if_fixed == pytest.approx(of_all.speedup_if_fixed, rel=0.05)
