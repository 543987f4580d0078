"""Slowdowns of generated jobs whose truth is known."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.whatif.generated_job import GeneratedJob, slow_worker, usual_s
from traceml.whatif.causes import cause_of
from traceml.whatif.simulation import Simulator
from traceml.whatif.straggler_cost import WhatIf, explain_job
from traceml.whatif.trace_loading import load_job

SHAPES = [
    {},
    {"dp": 1},
    {"pp": 1},
    {"pp": 2, "micro_batches": 3},
    {"chunks": 2},
    {"chunks": 3, "micro_batches": 4},
    {"overlap": True},
    {"chunks": 2, "overlap": True},
    {"chunks": 2, "records_idle": False},
    {"pp": 2, "chunks": 3, "micro_batches": 4, "records_idle": False},
]


def explained(job: GeneratedJob, folder: Path) -> WhatIf:
    return explain_job(Simulator(load_job(*job.run().write(folder))))


def long_last_stage(kind: str, dp_rank: int, stage: int, step: int, micro_batch: int) -> float:
    factor = 1.6 if "compute" in kind and stage == 3 else 1
    return factor * usual_s(kind, dp_rank, stage, step, micro_batch)


def different_lengths(kind: str, dp_rank: int, stage: int, step: int, micro_batch: int) -> float:
    factor = random.Random(f"{dp_rank},{step},{micro_batch}").uniform(0.6, 1.6) if "compute" in kind else 1
    return factor * usual_s(kind, dp_rank, stage, step, micro_batch)


def slow_reduction(kind: str, dp_rank: int, stage: int, step: int, micro_batch: int) -> float:
    return 0.5 if kind == "grads-reduce-scatter" and step == 1 else usual_s(kind, dp_rank, stage, step, micro_batch)


@pytest.mark.parametrize("seconds", [usual_s, slow_worker, long_last_stage, different_lengths, slow_reduction])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_simulation_repeats_the_recorded_steps(shape, seconds, tmp_path):
    """With the recorded durations each step takes as long as the schedule made it."""
    job = GeneratedJob(**shape, seconds=seconds)
    result = explained(job, tmp_path)

    assert result.simulated_step_s == pytest.approx(sum(job.step_s) / len(job.step_s), rel=1e-9)
    assert result.recorded_step_s == pytest.approx(result.simulated_step_s, rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equal_workers_lose_nothing(shape, tmp_path):
    result = explained(GeneratedJob(**shape), tmp_path)

    assert result.slowdown == pytest.approx(1)
    scores = [*result.by_optype.values(), *result.by_worker.values()]
    assert scores == pytest.approx([1.0] * len(scores))
    assert (result.worker_share, result.stage_share) == (None, None)
    assert result.cause.startswith("Stragglers cost little")


@pytest.mark.parametrize("shape", [{}, {"chunks": 2}, {"overlap": True}], ids=str)
def test_slow_worker_is_named(shape, tmp_path):
    """The ideal job is the one in which all workers take the mean time."""
    result = explained(GeneratedJob(**shape, seconds=slow_worker), tmp_path)

    def mean(kind: str, dp_rank: int, stage: int, step: int, micro_batch: int) -> float:
        return usual_s(kind, dp_rank, stage, step, micro_batch) * (9 / 8 if "compute" in kind else 1)

    ideal = GeneratedJob(**shape, seconds=mean).run()
    assert result.ideal_step_s == pytest.approx(ideal.step_s[0], rel=1e-9)
    assert result.slowdown == pytest.approx(result.simulated_step_s / ideal.step_s[0])
    assert result.worst_workers == [5]
    assert next(iter(result.by_worker)) == "1,2"
    assert result.worker_share > 0.9
    assert "Rank 5 (data-parallel rank 1, stage 2)" in result.cause
    assert "2.0x as long" in result.cause


@pytest.mark.parametrize(("kind", "advises"), [("gc", True), ("optimizer", False)])
def test_a_worker_that_computes_as_fast_as_others_has_no_slow_hardware(kind, advises, tmp_path):
    def seconds(optype: str, dp_rank: int, stage: int, step: int, micro_batch: int) -> float:
        slow = optype == kind and (dp_rank, stage) == (1, 2)
        return 3.0 if slow else usual_s(optype, dp_rank, stage, step, micro_batch)

    cause = explained(GeneratedJob(seconds=seconds), tmp_path).cause

    assert cause.startswith(f"Rank 5 (data-parallel rank 1, stage 2) explains 100 % of the lost time: {kind} takes ")
    assert "hardware" not in cause
    assert ("Collect garbage at the same steps" in cause) == advises


@pytest.mark.parametrize("shape", [{}, {"chunks": 2}], ids=str)
def test_long_last_stage(shape, tmp_path):
    result = explained(GeneratedJob(**shape, seconds=long_last_stage), tmp_path)

    assert next(iter(result.by_stage)) == 3
    assert result.stage_share > 0.9
    assert result.worker_share < 0.5
    assert "last pipeline stage, 3" in result.cause


def noisy_worker_of_the_last_stage(kind: str, dp_rank: int, stage: int, step: int, micro_batch: int) -> float:
    factor = 2 if "compute" in kind and (dp_rank, stage) == (1, 3) else 1
    noise = random.Random(f"{kind},{dp_rank},{stage},{step},{micro_batch}").uniform(0.97, 1.03)
    return factor * noise * usual_s(kind, dp_rank, stage, step, micro_batch)


def slow_replica(kind: str, dp_rank: int, stage: int, step: int, micro_batch: int) -> float:
    return (2 if "compute" in kind and dp_rank == 1 else 1) * usual_s(kind, dp_rank, stage, step, micro_batch)


@pytest.mark.parametrize(
    ("shape", "seconds", "rank"),
    [
        ({"dp": 4}, noisy_worker_of_the_last_stage, "Rank 13 (data-parallel rank 1, stage 3) explains"),
        ({"dp": 4, "pp": 1}, slow_replica, "Rank 1 (data-parallel rank 1, stage 0) explains"),
    ],
    ids=["last stage", "no pipeline"],
)
def test_a_slow_worker_of_the_last_stage_is_not_its_stage(shape, seconds, rank, tmp_path):
    """The stage explains as much as its one slow worker, and noise of the others a little more."""
    result = explained(GeneratedJob(**shape, seconds=seconds), tmp_path)

    assert result.stage_share == pytest.approx(result.worker_share, abs=0.1)
    assert result.cause.startswith(rank)


def test_only_slow_workers_are_named(tmp_path):
    """The 3 % of 80 workers are three, of which two are like all others."""

    def seconds(kind: str, dp_rank: int, stage: int, step: int, micro_batch: int) -> float:
        factor = 2 if "compute" in kind and (dp_rank, stage) == (7, 1) else 1
        return factor * usual_s(kind, dp_rank, stage, step, micro_batch)

    result = explained(GeneratedJob(dp=40, pp=2, micro_batches=2, steps=2, seconds=seconds), tmp_path)

    assert len(result.worst_workers) == 3
    assert result.cause.startswith("Rank 47 (data-parallel rank 7, stage 1) explains 100 %")
    assert "2.0x as long" in result.cause


def test_the_share_in_the_sentence_is_that_of_the_named_workers(tmp_path):
    """The three worst of 80 explain all, the one that is named not what is left when two are somewhat slow."""
    factors = {(7, 1): 2.0, (8, 1): 1.3, (9, 1): 1.3}

    def seconds(kind: str, dp_rank: int, stage: int, step: int, micro_batch: int) -> float:
        factor = factors.get((dp_rank, stage), 1.0) if "compute" in kind else 1.0
        return factor * usual_s(kind, dp_rank, stage, step, micro_batch)

    result = explained(GeneratedJob(dp=40, pp=2, micro_batches=2, steps=2, seconds=seconds), tmp_path)

    assert result.worker_share == pytest.approx(1, abs=0.05)
    share = int(result.cause.partition("explains ")[2].partition(" %")[0])
    assert result.cause.startswith("Rank 47 ")
    assert 60 <= share <= 80


def test_transfers_vary_between_workers(tmp_path):
    """A slow network between stages is between them, and computation on them."""
    job = load_job(*GeneratedJob().run().write(tmp_path))

    for kind, where in (("forward-pp-comm", "between"), ("gc", "on"), ("grads-reduce-scatter", "between")):
        cause = cause_of(
            job, slowdown=1.5, by_kind={kind: 1.5}, worst=[], worst_share=0.1, worker_share=0.1, stage_share=0.1
        )
        assert cause.startswith(f"The duration of {kind} varies {where} many workers")


def test_different_lengths_of_sequences(tmp_path):
    result = explained(GeneratedJob(seconds=different_lengths), tmp_path)

    assert result.slowdown > 1.1
    assert "different lengths" in result.cause
    assert max(result.worker_share, result.stage_share) < 0.5


def test_one_worker_per_stage_cannot_be_told_from_its_stage(tmp_path):
    result = explained(GeneratedJob(dp=1, seconds=long_last_stage), tmp_path)

    assert "or its only worker is slow" in result.cause


def test_kind_of_operation(tmp_path):
    """A collective that is slow now and then keeps the median as its ideal time."""

    def seconds(kind: str, dp_rank: int, stage: int, step: int, micro_batch: int) -> float:
        return 3.0 if kind == "grads-reduce-scatter" and step == 1 else usual_s(kind, dp_rank, stage, step, micro_batch)

    result = explained(GeneratedJob(seconds=seconds), tmp_path)

    assert next(iter(result.by_optype)) == "grads-reduce-scatter"
    assert result.by_optype["grads-reduce-scatter"] == pytest.approx(result.slowdown)
    assert "grads-reduce-scatter" in result.cause


def test_scenarios_in_batches_are_those_at_once(tmp_path, monkeypatch):
    job = load_job(*GeneratedJob(seconds=slow_worker).run().write(tmp_path))
    at_once = explain_job(Simulator(job))
    monkeypatch.setattr("traceml.whatif.simulation._BATCH_BYTES", 1)

    assert explain_job(Simulator(job)) == at_once
