"""Ranks of which one calls another number of collectives from a step on, as their rows arrive."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from traceml.database.schema import STEPS, pack_bits
from traceml.diagnosis.facts.progress.step_sequences import StepSequences


def add(found: StepSequences, rank: int, numbers: Sequence[int], first: int = 0) -> None:
    """Add steps of a rank with these numbers of collectives."""
    rows = np.zeros(len(numbers), STEPS.dtype)
    rows["step"] = np.arange(first, first + len(numbers))
    rows["bits"] = [pack_bits(1, 0, number) for number in numbers]
    found.add(np.full(len(numbers), rank), rows)


@pytest.mark.parametrize("many", [1, 3, 100, 200])
def test_the_first_step_of_a_lasting_difference_is_found(many: int) -> None:
    """However many rows come at a time, from one rank after the other."""
    found, ones, others = StepSequences(), [*range(5, 205)], [*range(5, 55), *range(54, 204)]
    for first in range(0, 200, many):
        add(found, 0, ones[first : first + many], first)
        add(found, 1, others[first : first + many], first)

    assert found.diverged is not None
    assert (found.diverged.agreed, found.diverged.since) == (49, 50)
    assert found.diverged.collectives == {0: 55, 1: 54}


def test_a_difference_that_ends_is_none() -> None:
    """One rank calls a collective a step later than the others."""
    found = StepSequences()
    add(found, 0, [5, 6, 8, 9])
    add(found, 1, [5, 6, 7, 9])
    add(found, 2, [5, 6, 8, 9])

    assert found.diverged is None


@pytest.mark.parametrize(("counts", "usual"), [((16, 16, 16, 4), 16.0), ((0, 0), 1.0), ((), 1.0)])
def test_the_usual_number_of_batches_of_a_step_is_known(counts: tuple[int, ...], usual: float) -> None:
    """The last step of an epoch may have fewer; a step without backward has none."""
    found = StepSequences()
    if counts:
        rows = np.zeros(len(counts), STEPS.dtype)
        rows["step"], rows["bits"] = np.arange(len(counts)), [pack_bits(count, 0) for count in counts]
        found.add(np.zeros(len(counts), np.int64), rows)

    assert found.micro_batches == usual


@pytest.mark.parametrize("numbers", [([5, 6], [7, 8]), ([0, 0], [0, 1])])
def test_ranks_that_never_agreed_are_not_apart(numbers: tuple[list[int], list[int]]) -> None:
    """Stages of a pipeline; and steps without numbers."""
    found = StepSequences()
    for rank, of_rank in enumerate(numbers):
        add(found, rank, of_rank)

    assert found.diverged is None


def test_a_rank_that_starts_again_is_compared_anew() -> None:
    """All ranks of a restarted job begin at step 0."""
    found = StepSequences()
    for rank in (0, 1):
        add(found, rank, [5, 6 + rank])

    assert found.diverged is not None
    found.forget()
    for rank in (0, 1):
        add(found, rank, [5, 6, 7])

    assert found.diverged is None


def test_steps_of_a_sample_tell_the_latest_possible_one() -> None:
    """Of a long run not all rows are read."""
    found = StepSequences()
    for rank in (0, 1):
        add(found, rank, [5])
        add(found, rank, [45 - rank], 40)

    assert found.diverged is not None
    assert (found.diverged.agreed, found.diverged.since) == (0, 40)


def test_thousands_of_ranks_have_room_for_some_steps() -> None:
    """The ring is shorter, and ranks may arrive one after another."""
    found, ranks = StepSequences(), np.arange(5000)
    for step in range(200):
        rows = np.zeros(len(ranks), STEPS.dtype)
        rows["step"], rows["bits"] = step, pack_bits(1, 0, step + 5)
        rows["bits"][7] -= (step > 150) << 32
        found.add(ranks, rows)

    assert found.diverged is not None
    assert found.diverged.since == 151
