"""A rank's steady excess in one part of the step."""

from __future__ import annotations

import numpy as np
import pytest

from tests.diagnosis.fabricated import Fault, Job, adds, window_of
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.rules.stragglers.excess_tests import mean_and_error, steady_excesses
from traceml.diagnosis.steps.own_work import OwnWork, own_work_of


def work(job: Job, *faults: Fault) -> OwnWork:
    return own_work_of(window_of(job, *faults), JobFacts(world_size=job.ranks))


@pytest.mark.parametrize("callback_every", [1, 4])
@pytest.mark.parametrize("part", ["forward", "backward", "other"])
def test_the_rank_and_the_part_are_found(part, callback_every):
    """A tenth of a step more in one part is found, with its size; also where backward is measured on some steps."""
    (found,) = steady_excesses(work(Job(ranks=4, callback_every=callback_every), adds(part, 1.5, (2,))), 1e6)

    assert found is not None
    assert (found.row, found.part) == (2, part)
    assert found.mean_ns == pytest.approx(1.5e6, rel=0.25)
    assert found.dominance > 0.9


@pytest.mark.parametrize("seed", range(3))
def test_equal_ranks_have_none(seed):
    """Noise alone is no steady excess, however small a mean may be."""
    window = window_of(Job(ranks=8, sigma=0.5), seed=seed)

    assert steady_excesses(own_work_of(window, JobFacts(world_size=8)), 0.0) == []


def test_an_excess_of_half_the_run_is_not_steady():
    """What one rank had for a while only, such as a busy core, is left out."""

    def fault(own, random):
        own["forward"][1, 110:] += 3.0

    assert steady_excesses(work(Job(), fault), 1e6) == []


def test_two_equally_late_ranks_are_none():
    """The largest excess has to be distinct."""
    assert steady_excesses(work(Job(ranks=4), adds("forward", 2.0, (1, 2))), 1e6) == []


def test_noise_that_lasts_has_a_larger_error():
    """The same values in blocks have a larger standard error than in any order."""
    random = np.random.default_rng(0)
    blocks = np.repeat(random.normal(0.3e6, 1e6, 20), 20)

    assert mean_and_error(blocks)[1] > 2 * mean_and_error(random.permutation(blocks))[1]
