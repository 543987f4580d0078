"""Findings about memory that goes back and forth between torch and the driver, and where they must stay silent."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from tests.diagnosis.memory.memories import GB, device
from traceml.diagnosis.facts.device_events import TurnoverHistory
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.job_facts_builder import JobFactsBuilder
from traceml.diagnosis.facts.memory_growth import MemoryHistory
from traceml.diagnosis.facts.sampled_lines import SampledLine
from traceml.diagnosis.kinds import Kind, Severity
from traceml.diagnosis.memory.pressure import allocator_churn

EMPTY_CACHE = "/x/torch/cuda/memory.py:222 empty_cache"


def interval(first: int, last: int, requested: int, given_back: int) -> dict[str, int | str]:
    return {
        "kind": "segments", "device": 0, "from_step": first, "step": last, "requested": requested,
        "given_back": given_back,
    }  # fmt: skip


def emptied(*, ranks: tuple[int, ...] = (0,), each: int = 120, last: int = 210) -> TurnoverHistory:
    """Return the turnover of ranks that empty the cache in each step, in two intervals of ten steps."""
    history = TurnoverHistory()
    for rank in ranks:
        history.add(rank, interval(last - 20, last - 10, each, each))
        history.add(rank, interval(last - 10, last, each + 5, each))

    return history


def test_emptying_the_cache_in_the_loop_is_reported_with_its_line():
    """The line that called, as samples saw it; only of the rank itself."""
    lines = (
        SampledLine(1, "other", "/x/train.py", 41, "main", EMPTY_CACHE, 12),
        SampledLine(1, "other", "/x/train.py", 9, "main", "/x/torch/cuda/memory.py:80 memory_stats", 90),
        SampledLine(0, "other", "/x/train.py", 7, "main", EMPTY_CACHE, 50),
    )
    facts = JobFacts(world_size=2, turnover=emptied(ranks=(1,)), latest=(219, 219), lines=lines)
    found = allocator_churn(facts)

    assert (found.kind, found.severity, found.ranks) == (Kind.ALLOCATOR_CHURN, Severity.WARNING, (1,))
    assert found.summary == (
        "Rank 1 gives 12.0 blocks of device memory per step back to the driver and requests as many again: "
        "empty_cache() is called at train.py:41 main."
    )
    assert found.evidence["line"] == 41


def test_without_a_line_all_causes_are_reported():
    """Samples may miss a short call."""
    found = allocator_churn(JobFacts(turnover=emptied(), latest=(219,)))

    assert "or garbage_collection_threshold" in found.summary
    assert found.ranks == ()
    assert "line" not in found.evidence


def once() -> TurnoverHistory:
    """Return the turnover of a rank that emptied the cache at its evaluation."""
    history = TurnoverHistory()
    history.add(0, interval(100, 110, 80, 80))
    history.add(0, interval(110, 210, 3, 2))
    return history


def first_only() -> TurnoverHistory:
    history = TurnoverHistory()
    history.add(0, interval(100, 110, 80, 80))
    return history


def test_an_allocator_that_lacked_memory_gave_it_back_itself():
    """Unless a call of empty_cache() was seen."""
    memory = device(MemoryHistory(), [60 * GB] * 3, retries=1)
    facts = JobFacts(turnover=emptied(), latest=(219,), memory=memory)
    assert allocator_churn(facts) is None

    seen = (SampledLine(0, "other", "/x/train.py", 7, "main", EMPTY_CACHE, 50),)
    assert allocator_churn(replace(facts, lines=seen)) is not None


@pytest.mark.parametrize(
    ("turnover", "latest"),
    [
        (TurnoverHistory(), 219),
        (emptied(each=5), 219),
        (once(), 219),
        (first_only(), 112),
        (emptied(last=210), 2000),
    ],
    ids=["none", "every other step", "once", "one interval", "long ago"],
)
def test_what_is_not_in_the_loop_is_silent(turnover: TurnoverHistory, latest: int):
    """Now and then, at an evaluation, at the start, or no longer."""
    assert allocator_churn(JobFacts(turnover=turnover, latest=(latest,))) is None


def test_a_device_that_lacks_memory_is_not_reported_twice():
    """torch itself empties the cache then, which is MEMORY_PRESSURE."""
    full = device(MemoryHistory(), [70 * GB] * 20, retries=40)

    assert allocator_churn(JobFacts(turnover=emptied(), latest=(219,), memory=full)) is None


def test_rows_are_taken_until_the_rank_starts_again():
    """Damaged ones are left out."""
    builder = JobFactsBuilder(1)
    for first in (0, 10):
        builder.info(0, interval(first, first + 10, 50, 50))

    builder.info(0, {**interval(20, 30, 0, 0), "requested": None})
    assert allocator_churn(builder.build([20])) is not None

    builder.join(0)
    assert allocator_churn(builder.build([20])) is None
