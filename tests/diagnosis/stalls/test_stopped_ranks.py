"""Findings about ranks that were stopped and went on, and steps that they must not explain."""

from __future__ import annotations

import pytest

from tests.diagnosis.fabricated import Job, adds, window_of
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.job_facts_builder import JobFactsBuilder
from traceml.diagnosis.facts.run_time import RunTime
from traceml.diagnosis.facts.wall_parts import Stop
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind, Severity
from traceml.diagnosis.ruleset import diagnose

ALONE = Job(ranks=1, grouped=False)
PAIR = Job(ranks=2)
STOP = Stop(30.0, "steps", 55, 58, 1000.0)
QUIET = {Kind.HEALTHY, Kind.COMPUTE_BOUND}


def pause(step: int, rank: int = 0, ms: float = 30_000):
    """Return a fault: one long forward."""

    def fault(own, _) -> None:
        own["forward"][rank, step] += ms

    return fault


def found(job: Job, *faults, wall_s: float | None = 100.0, **facts) -> list[Finding]:
    time = None if wall_s is None else RunTime.of(wall_s, {"steps": wall_s})
    return diagnose(
        window_of(job, *faults),
        JobFacts(world_size=job.ranks, backend="nccl" if job.grouped else None, time=time, **facts),
    )


def test_a_stopped_rank_is_reported_with_its_step():
    """The rank, how long, and in which step; the others waited."""
    (verdict, *others) = found(PAIR, pause(57, 1), stops={1: [STOP]})

    assert (verdict.kind, verdict.severity, verdict.ranks) == (Kind.STOPPED, Severity.WARNING, (1,))
    assert verdict.headline == "Rank 1 was stopped for 30 s"
    assert verdict.summary == (
        "Rank 1 was stopped for 30 s, in step 58: the process did not run, and neither computed nor waited for a core. "
        "The other ranks had to wait."
    )
    assert verdict.cost_share == pytest.approx(0.3)
    assert verdict.evidence["began_s"] == 1000.0
    assert not {each.kind for each in others} & {Kind.JITTER, Kind.COMPUTE_STRAGGLER, Kind.STRAGGLER}


def test_ranks_that_go_on_do_not_wait():
    """Without a process group the others have short steps meanwhile."""
    (verdict, *_) = found(Job(ranks=2, grouped=False), pause(57, 1), stops={1: [STOP]})

    assert verdict.kind is Kind.STOPPED
    assert "wait" not in verdict.summary.replace("nor waited for a core", "")


def test_the_step_of_a_stop_blames_nobody():
    """Beside a real straggler, only that is told of the steps."""
    kinds = [each.kind for each in found(PAIR, pause(57, 1), adds("forward", 12, (0,)), stops={1: [STOP]})]

    assert kinds[:2] == [Kind.COMPUTE_STRAGGLER, Kind.STOPPED]


def test_a_long_step_without_a_stop_is_no_stop():
    """The rank worked, or waited."""
    assert Kind.STOPPED not in {each.kind for each in found(PAIR, pause(57, 1), stops={1: []})}


@pytest.mark.parametrize(
    ("seconds", "wall_s", "severity"),
    [
        (4.0, 100.0, None),
        (4.0, 20.0, Severity.WARNING),
        (5.0, 1000.0, Severity.INFO),
        (150.0, 1000.0, Severity.WARNING),
    ],
)
def test_short_stops_are_not_reported(seconds: float, wall_s: float, severity: Severity | None):
    """From five seconds or a tenth of the run on; the tenth makes it a warning."""
    stop = STOP._replace(seconds=seconds)
    (told,) = [each for each in found(ALONE, wall_s=wall_s, stops={0: [stop]}) if each.kind is Kind.STOPPED] or [None]

    assert (told and told.severity) == severity


def test_a_suspended_machine_is_reported_as_such():
    """Its clock tells; nobody sent a signal, and no step was long."""
    stop = Stop(3600.0, "suspended", 57, 57)
    (verdict, *_) = found(PAIR, wall_s=7200.0, stops={0: [stop._replace(began_s=5.0)], 1: [stop._replace(began_s=5.5)]})

    assert verdict.headline == "The machine of ranks 0, 1 was suspended for 1:00:00"
    assert "SIGSTOP" not in verdict.next
    assert "lid" in verdict.next


def test_several_stops_are_summed():
    """Of the rank that lost most."""
    stops = {0: [STOP._replace(began_s=500.0)], 1: [STOP, Stop(10.0, "steps", 90, 90, 2000.0)]}
    verdict = found(PAIR, wall_s=200.0, stops=stops)[0]

    assert verdict.ranks == (1,)
    assert "stopped 2 times for 40 s, the longest 30 s, in step 58" in verdict.summary


def test_a_suspended_machine_did_not_sleep_for_the_time_of_a_signal() -> None:
    """What is told is of one kind, the longest; the cost is of all."""
    stops = [Stop(60.0, "suspended", 57, 57), STOP]
    verdict = found(PAIR, wall_s=200.0, stops={1: stops})[0]

    assert verdict.headline == "The machine of rank 1 was suspended for 60 s"
    assert "stopped for 60 s, at step 57: the machine was suspended" in verdict.summary
    assert (verdict.evidence["stops"], verdict.cost_share) == (1, pytest.approx(0.45))


def test_while_the_run_goes_on_old_stops_are_forgotten():
    """The window shows what is so now."""
    last = window_of(ALONE).steps[-1]

    assert Kind.STOPPED not in {each.kind for each in found(ALONE, wall_s=None, stops={0: [Stop(9.0, "steps", 2, 2)]})}
    now = Stop(9.0, "steps", int(last) - 1, int(last))
    assert found(ALONE, pause(int(last), ms=9000), wall_s=None, stops={0: [now]})[0].kind is Kind.STOPPED


def test_a_stop_before_the_first_step():
    """It belongs to the start-up, of which no step is long."""
    verdict = found(ALONE, stops={0: [Stop(20.0, "startup", -1, -1, 3.0)]})[0]

    assert "stopped for 20 s, before the first step" in verdict.summary


def test_the_rows_of_a_rank_are_taken():
    """Rows of an earlier version have no time and one step."""
    builder = JobFactsBuilder(1)
    builder.info(0, {"kind": "stopped", "seconds": 8.0, "part": "steps", "step": 9, "from_step": 7, "began_s": 4.5})
    builder.info(0, {"kind": "stopped", "seconds": 2, "part": "steps", "step": 30})

    assert builder.build().stops == {0: [Stop(8.0, "steps", 7, 9, 4.5), Stop(2.0, "steps", 30, 30)]}
