"""Which rank prints that the job is stuck, and when."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from traceml.aggregator.checks.job_notices import JobNotices
from traceml.database.snapshots.rank_snapshot import RankSnapshot
from traceml.diagnosis.facts.job_facts_builder import JobFactsBuilder
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind, Severity

HANG = Finding(kind=Kind.HANG, severity=Severity.CRITICAL, summary="Stuck.", next="Look.", ranks=(1,))
LOST = Finding(kind=Kind.RANK_LOST, severity=Severity.CRITICAL, summary="Lost.", next="Look.", ranks=(1,))
FINE = Finding(kind=Kind.HEALTHY, severity=Severity.INFO, summary="Fine.", next="None.")


class Rank:
    """A connected rank that keeps what it is told."""

    def __init__(self, rank: int) -> None:
        self.rank, self.peer = rank, self
        self.told: list[dict[str, Any]] = []

    def send(self, message: dict[str, Any]) -> None:
        assert message["name"] == "notice"
        self.told.append(message["args"])


def notices_of(
    *ranks: Rank,
    silent: Rank | None = None,
    now_s: Callable[[], float] = time.monotonic,
    on_mute: Callable[[dict[str, Any]], object] | None = None,
    has_absent: bool = False,
) -> tuple[JobNotices, Any]:
    builder = JobFactsBuilder(len(ranks))
    run: Any = SimpleNamespace(
        path=Path("/runs/a"), attempt=0, connected_ranks=ranks, live=SimpleNamespace(facts_builder=builder)
    )
    watch: Any = SimpleNamespace(is_silent=lambda stream: stream is silent, has_absent=has_absent)
    return JobNotices(run, watch, now_s, on_mute), run


def test_one_rank_tells_it_once_and_that_it_is_over() -> None:
    ranks = Rank(1), Rank(0)
    notices, _ = notices_of(*ranks)
    for findings in ([], [FINE], [HANG], [HANG, FINE], [FINE], [FINE, HANG], [HANG]):
        notices.check(findings)

    assert ranks[0].told == []
    assert [each.get("headline") for each in ranks[1].told] == [HANG.headline, None, HANG.headline]
    assert {each["run_dir"] for each in ranks[1].told} == {"/runs/a"}


def test_a_rank_that_cannot_print_is_not_asked() -> None:
    """C code has the GIL there; if no other can, a later check asks again."""
    silent, other = Rank(0), Rank(1)
    notices, run = notices_of(silent, silent=silent)
    notices.check([HANG])
    run.connected_ranks = (silent, other)
    notices.check([HANG])

    assert (len(silent.told), len(other.told)) == (0, 1)


def test_the_launcher_prints_where_no_rank_can() -> None:
    """Once, too; a job without connected ranks is over, and a rank that can print again says that it goes on."""
    rank, told = Rank(0), list[dict[str, Any]]()
    notices, run = notices_of(rank, silent=rank, on_mute=told.append)
    run.connected_ranks = ()
    notices.check([HANG])
    assert told == []

    run.connected_ranks = (rank,)
    for _ in range(2):
        notices.check([HANG])

    assert told == [{"kind": "HANG", "headline": HANG.headline, "run_dir": "/runs/a"}]
    assert rank.told == []


@pytest.mark.parametrize("has_absent", [True, False])
def test_the_launcher_prints_for_a_rank_that_never_connected(has_absent: bool) -> None:
    """C code took the GIL before; without such a process the job is over."""
    told = list[dict[str, Any]]()
    notices, _ = notices_of(on_mute=told.append, has_absent=has_absent)
    for _ in range(2):
        notices.check([HANG])

    assert len(told) == has_absent


def test_a_job_without_progress_does_not_go_on() -> None:
    """Also if the verdict is another one, as of a rank that computes again for a moment."""
    rank = Rank(0)
    notices, run = notices_of(rank)
    notices.check([HANG])
    progress = run.live.facts_builder.progress
    for ended in (False, True):
        progress.take_snapshot(RankSnapshot(at_ns=1, rank=0, quiet_s=70.0, ended=ended))
        notices.check([FINE])
        assert ([*map(len, rank.told)] == [3, 1]) == ended


def test_each_attempt_that_hangs_is_told() -> None:
    """The end of the attempt before is no progress of the job."""
    rank = Rank(0)
    notices, run = notices_of(rank)
    notices.check([HANG])
    run.attempt = 1
    notices.check([FINE])
    notices.check([HANG])

    assert [each.get("headline") for each in rank.told] == [HANG.headline] * 2


def test_a_lost_rank_is_reported_where_nobody_ends_the_others() -> None:
    """A launcher usually does within 30 s."""
    now_s, rank = [100.0], Rank(0)
    notices, _ = notices_of(rank, now_s=lambda: now_s[0])
    counts = []
    for seconds, findings in (
        (0, [LOST]),
        (35, [LOST]),
        (1, [FINE]),
        (1, [LOST]),
        (39, [LOST]),
        (1, [LOST]),
        (9, [LOST]),
    ):
        now_s[0] += seconds
        notices.check(findings)
        counts.append(len(rank.told))

    assert counts == [0, 0, 0, 0, 0, 1, 1]
    assert (rank.told[0]["kind"], rank.told[0]["headline"]) == ("RANK_LOST", LOST.headline)
