"""Findings about costs of all steps that are in a part of the run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.diagnosis.fabricated import Fault, Job, adds, window_of
from traceml.database.schema import EPOCHS
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.sampled_lines import SampledLine
from traceml.diagnosis.facts.trainings.models_and_loaders import LoaderFacts
from traceml.diagnosis.kinds import Kind
from traceml.diagnosis.ruleset import diagnose

LOADER = LoaderFacts(dataset="Photos", num_workers=0)


def adds_in(steps: slice, part: str, ms: float) -> Fault:
    """Return a fault in some of the steps of all ranks."""

    def fault(own: dict[str, np.ndarray[Any, Any]], random: np.random.Generator) -> None:
        own[part][:, steps] += ms

    return fault


@pytest.mark.parametrize("part", ["input_wait", "other"])
def test_a_cost_of_the_second_training_is_told_with_its_steps(part: str) -> None:
    """A pretraining computes; the fine-tuning after it reads, or logs, for as long as it computes."""
    job = Job(ranks=1, steps=400)
    facts = JobFacts(world_size=1, other_models=(300,), loader=LOADER)

    late, *_ = diagnose(window_of(job, adds_in(slice(300, 400), part, 14.0)), facts)
    always, *_ = diagnose(window_of(job, adds(part, 3.5)), facts)

    assert late.kind is always.kind is (Kind.INPUT_BOUND if part == "input_wait" else Kind.RESIDUAL_HEAVY)
    assert " % of it is from step 30" in late.summary
    assert late.evidence["since_step"] == pytest.approx(300, abs=2)
    assert "of it is" not in always.summary


def test_waits_of_the_first_epoch_alone_are_not_those_of_a_run_without_a_cache() -> None:
    """The machine takes cores in parts of the run, so that the steps of the first epoch are not the slowest ones."""
    job = Job(ranks=1, steps=400, wander=0.5, wander_steps=60)
    facts = JobFacts(world_size=1, loader=LOADER)

    found, *_ = diagnose(window_of(job, adds_in(slice(0, 60), "input_wait", 18.0), seed=3), facts)

    assert found.kind is Kind.INPUT_BOUND
    assert " % of it is before step 6" in found.summary
    assert found.next.startswith("If Photos fills a cache then")
    assert "workers_advised" not in found.evidence  # nor the gain of them in all steps
    assert found.speedup_if_fixed == pytest.approx(1 / (1 - 0.85 * found.cost_share), abs=0.002)


def test_what_every_nth_step_costs_is_not_what_the_others_do() -> None:
    """The code of the other steps becomes longer from step 300 on, by little beside a plot in each 50th."""
    job = Job(ranks=1, steps=400, own={"forward": 12.0, "backward": 20.0, "optimizer": 4.0, "other": 0.3})
    plots = adds("other", 400.0, every=50)

    found, *_ = diagnose(window_of(job, plots, adds_in(slice(300, 400), "other", 2.5)), JobFacts(world_size=1))

    assert found.evidence["every_n_steps"] == 50
    assert "of it is" not in found.summary


def test_a_cost_of_now_is_not_in_steps_that_are_over() -> None:
    """The live view judges the steps after the first epoch: they still wait, in each of them."""
    first, others = adds_in(slice(0, 60), "input_wait", 120.0), adds_in(slice(60, 400), "input_wait", 5.0)
    window = window_of(Job(ranks=1, steps=400), first, others)

    found, *_ = diagnose(window, JobFacts(loader=LOADER), window)

    assert (found.kind, found.evidence["steps"]) == (Kind.INPUT_BOUND, 340)
    assert found.cost_share == pytest.approx(0.27, abs=0.02)
    assert "of it is" not in found.summary
    assert "until_step" not in found.evidence
    assert "num_workers=1" in found.next


def test_a_rank_that_is_late_now_is_not_said_to_have_been_late() -> None:
    """It was late by far more in the first steps, which the live view no longer judges."""

    def late(own: dict[str, np.ndarray[Any, Any]], random: np.random.Generator) -> None:
        own["forward"][2] += np.where(np.arange(800) < 200, 20.0, 4.0)

    window = window_of(Job(ranks=4, steps=800), late)

    found, *_ = diagnose(window, JobFacts(world_size=4), window)

    assert (found.kind, found.ranks) == (Kind.COMPUTE_STRAGGLER, (2,))
    assert found.evidence["steps"] == 600
    assert "slow until" not in found.summary


def test_rare_long_waits_belong_to_the_rest_of_the_run() -> None:
    """The first steps wait for 5 ms each, then every tenth for 100 ms: no median has these, and most of the cost is."""

    def waits(own: dict[str, np.ndarray[Any, Any]], random: np.random.Generator) -> None:
        own["input_wait"][:, :80] += 5.0
        own["input_wait"][:, 80::10] += 100.0

    found, *_ = diagnose(window_of(Job(ranks=1, steps=400), waits), JobFacts(loader=LOADER))

    assert found.kind is Kind.INPUT_BOUND
    assert "of it is before" not in found.summary
    assert "until_step" not in found.evidence


@pytest.mark.parametrize(("every", "is_told"), [(10, False), (40, True)])
def test_a_rank_that_is_late_in_every_nth_step_afterwards_is_still_late(every: int, is_told: bool) -> None:
    """By 40 ms in every tenth step it is late by two thirds of the 6 ms before."""

    def late(own: dict[str, np.ndarray[Any, Any]], random: np.random.Generator) -> None:
        own["forward"][2, :300] += 6.0
        own["forward"][2, 300::every] += 40.0

    found, *_ = diagnose(window_of(Job(ranks=4, steps=800), late), JobFacts(world_size=4))

    assert (found.kind, found.ranks) == (Kind.COMPUTE_STRAGGLER, (2,))
    assert ("slow until step 30" in found.summary) is is_told


def test_waiting_for_an_iterator_is_not_dated_by_a_loader_beside_it() -> None:
    """The iterator takes half of each step; a loader of 0.15 ms per step, which ends at step 80, half a percent."""
    job = Job(ranks=1, steps=400, own={"input_wait": 0.0, "forward": 4.0, "backward": 8.0, "optimizer": 1.5})
    lines = [SampledLine(0, part, "a.py", 9, "main", None, 70) for part in ("input_wait", "backward")]
    of_loader = adds_in(slice(0, 80), "input_wait", 0.15)

    found, *_ = diagnose(window_of(job, adds("other", 14.0), of_loader), JobFacts(world_size=1, lines=lines))

    assert found.kind is Kind.INPUT_BOUND
    assert "for data of an iterator" in found.summary
    assert "of it is before" not in found.summary
    assert "until_step" not in found.evidence


@pytest.mark.parametrize(
    ("rare", "kind", "says"),
    [
        (adds("other", 120.0, every=10), Kind.RESIDUAL_HEAVY, "Every 10th step takes"),
        (adds("other", 140.0, chance=0.03), Kind.JITTER, " of 390 steps take 16"),
    ],
)
def test_steps_that_are_longer_than_the_slow_ones_are_told_beside_them(rare: Fault, kind: Kind, says: str) -> None:
    """A plot in each 10th step costs more than the list that grows from step to step."""

    def grows(own: dict[str, np.ndarray[Any, Any]], random: np.random.Generator) -> None:
        own["other"] += 0.05 * np.arange(own["other"].shape[1])

    found = {each.kind: each for each in diagnose(window_of(Job(ranks=1, steps=400), rare, grows), JobFacts())}

    assert found.keys() == {kind, Kind.SLOWDOWN}
    assert says in found[kind].summary
    assert found[Kind.SLOWDOWN].evidence["shape"] == "growth"


def test_workers_that_restart_are_told_beside_a_slow_first_epoch() -> None:
    """The first epochs fill a cache; each restarts its workers, for a third of the time."""
    rows = np.zeros(11, EPOCHS.dtype)
    rows["step"], rows["ns"], rows["create_ns"] = np.arange(11) * 20, 200.3e6, 200e6
    facts = JobFacts(loader=LoaderFacts(num_workers=2, persistent_workers=False), epochs=rows)
    starts, first = adds_in(slice(0, None, 20), "input_wait", 200.0), adds_in(slice(0, 60), "input_wait", 30.0)

    restarts, slower = diagnose(window_of(Job(ranks=1), starts, first), facts)

    assert "are restarted 10 times" in restarts.summary
    assert (slower.kind, slower.evidence["until_step"]) == (Kind.SLOWDOWN, pytest.approx(60, abs=2))


def test_only_the_ranks_that_became_slower_in_the_phase_are_told_of_it() -> None:
    """Another rank has longer batches from a later step on: no step took the mean of both ranks' data loading."""

    def faults(own: dict[str, np.ndarray[Any, Any]], random: np.random.Generator) -> None:
        own["input_wait"][2, 200:] += 20.0
        own["forward"][1, 400:] += 16.0

    found = diagnose(window_of(Job(ranks=4, steps=800), faults), JobFacts(world_size=4))

    assert [(each.ranks, each.phase) for each in found] == [((2,), "input_wait"), ((1,), "forward")]
    assert found[0].summary.endswith("It has been slow since step 200.")
