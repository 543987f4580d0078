"""The cost of judging late ranks one by one: what all others do is computed once, not for each of them."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, ValuesView

from tests.diagnosis.fabricated import Job, adds, window_of
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.rules.stragglers.late_ranks import find_late
from traceml.diagnosis.steps.own_work import own_work_of

RANKS = 200
MANY = 10_000


class CountedShares(dict[int, float]):
    """Shares of ranks, and how often they were read as a whole."""

    reads = 0

    def __iter__(self) -> Iterator[int]:
        self.reads += 1
        return super().__iter__()

    def items(self) -> ItemsView[int, float]:  # type: ignore[override]
        self.reads += 1
        return super().items()

    def values(self) -> ValuesView[int, float]:  # type: ignore[override]
        self.reads += 1
        return super().values()


def shares_of(ranks: int) -> CountedShares:
    return CountedShares((rank, 0.01 * (rank % 7)) for rank in range(ranks))


def reads_of(late: int) -> tuple[int, int]:
    """Return how often the shares of all ranks are read while some are found to be late."""
    ready, wall = shares_of(RANKS), shares_of(RANKS)
    facts = JobFacts(world_size=RANKS, wait_of_ready_time=ready, wait_of_wall_time=wall)
    window = window_of(Job(ranks=RANKS, steps=40), adds("forward", 10.0, tuple(range(late))))
    (found,) = find_late(own_work_of(window, facts), facts)

    assert found.rows.tolist() == list(range(late))
    return ready.reads, wall.reads


def test_more_late_ranks_read_the_others_as_often() -> None:
    """Three times as many late ranks cost no further look at the waiting of all ranks."""
    assert reads_of(20) == reads_of(60)


def test_each_of_ten_thousand_ranks_is_compared_with_the_others() -> None:
    """All comparisons together read the shares of all ranks a fixed number of times."""
    few, many = shares_of(10), shares_of(MANY)
    for shares in (few, many):
        facts = JobFacts(wait_of_ready_time=shares, wait_of_wall_time=shares)
        medians = [facts.core_wait_of_others([rank]) for rank in range(len(shares))]

        assert None not in medians
        assert facts.without_core == frozenset()
        assert not facts.oversubscribed

    assert many.reads == few.reads
