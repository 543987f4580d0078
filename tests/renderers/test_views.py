"""View models from reports."""

from __future__ import annotations

from tests.renderers.reports import finding, killed_rank, report, slow_rank, thousand_ranks
from traceml.renderers.text.card import verdict_style
from traceml.renderers.views import run_view, verdict_look, visible_parts, visible_ranks
from traceml.runs.report.report_types import Report, TimePart, TimeSection


def test_straggler_is_marked():
    """The rank that the verdict calls slow is marked, whatever its step time."""
    view = run_view(slow_rank())

    assert [row.rank for row in view.ranks if row.slowest] == [1]
    assert view.report.verdict.gain == 4.69
    assert [other.kind for other in view.others] == ["JITTER"]


def test_phases_of_cpu_time_are_part_of_what_figures_rest_on():
    """Each screen shows the basis of a run: the page of a run left out that its device was not timed."""
    made = slow_rank()
    assert run_view(made).basis == []

    made.steps.untimed_device = "mps"
    assert run_view(made).basis == ["Device times: not measured on mps; phases show CPU time"]


def test_slowest_by_own_work_without_a_verdict():
    """Without a verdict on a rank, the one whose own work stands out is marked, if any."""
    even = report([{"forward": 5.0, "comm": 1.0}, {"forward": 5.2, "comm": 0.8}])
    uneven = report([{"forward": 5.0, "comm": 2.0}, {"forward": 7.0}])

    assert not any(row.slowest for row in run_view(even).ranks)
    assert [row.rank for row in run_view(uneven).ranks if row.slowest] == [1]


def test_the_rank_that_a_hang_is_blamed_on_is_marked():
    """No other one, however much it worked before; none where all ranks are blamed."""
    uneven = [{"forward": 5.0, "comm": 2.0}, {"forward": 7.0}]
    by_first, by_both = (report(uneven, finding("HANG", ranks=ranks)) for ranks in ((0,), (0, 1)))

    assert [row.rank for row in run_view(by_first).ranks if row.slowest] == [0]
    assert not any(row.slowest for row in run_view(by_both).ranks)


def test_single_rank_is_never_marked():
    """A single rank cannot be the slowest."""
    assert not run_view(report([{"forward": 5.0}])).ranks[0].slowest


def test_ranks_that_ended_badly_say_how():
    """A killed rank says by which signal, after which step and in which phase."""
    assert run_view(killed_rank()).ranks[1].end == "killed by SIGKILL, last step 36, in forward"


def test_shares_add_up():
    """A rank's shares add up to one, and its step is the sum of its phases."""
    row = run_view(slow_rank()).ranks[0]

    assert abs(sum(share for _, share in row.shares) - 1) < 1e-9
    assert row.work_ms < row.step_ms


def test_visible_ranks_keep_lost_slow_and_fast():
    """When not all fit, lost ranks come first, then the slowest and the fastest; order is by rank."""
    made = thousand_ranks()
    made.ranks[900].state = "lost"
    rows = run_view(made).ranks

    shown = visible_ranks(rows, 8)

    assert len(shown) == 8
    assert {617, 900} <= {row.rank for row in shown}
    assert [row.rank for row in shown] == sorted(row.rank for row in shown)
    assert visible_ranks(rows[:5], 8) == rows[:5]
    assert len(visible_ranks(rows, 1)) == 1


def test_ranks_that_were_never_heard_of_are_reported():
    """A rank that never reported is named."""
    made = thousand_ranks()
    assert run_view(made).absent is None

    made.run.state = "finished"
    del made.ranks[617], made.ranks[3]
    assert run_view(made).absent == "no data from ranks 3, 617 (of 1,000)"
    del made.ranks[40:]
    assert run_view(made).absent == "no data from ranks 3, 41-999 (of 1,000)"
    made.run.state = "running"
    assert run_view(made).absent.startswith("no data yet from ranks 3, ")


def test_a_report_without_ranks_misses_none():
    """Without any known rank none is missing."""
    made = Report.empty("x")
    made.run.world_size = 8
    assert run_view(made).absent is None


def test_gain_of_nothing_is_not_reported():
    """A speed-up below half a percent is not a gain."""
    assert run_view(report([{"forward": 1.0}], finding(speedup_if_fixed=1.001))).report.verdict.gain is None


def test_a_verdict_that_judges_nothing_is_not_green():
    """It is `info`, as a healthy run is, but has no color."""
    unknown, healthy = (run_view(each).report.verdict for each in (Report.empty("x"), report([{"forward": 1.0}])))

    assert [verdict_look(each.kind, each.severity) for each in (unknown, healthy)] == ["", "info"]
    assert [verdict_style(each) for each in (unknown, healthy)] == ["bold", "bold green"]


def test_live_view_holds_the_trend():
    """The live view is the report so far and the rates."""
    view = run_view(slow_rank(), [1.0, 2.0])

    assert view.rates == (1.0, 2.0)
    assert view.report == run_view(slow_rank()).report


def test_the_time_of_a_hang_is_apart() -> None:
    """It is in a step that was open, after the last one that ended; or in `restart`, where another attempt followed."""
    parts = [TimePart("steps", 20.0, 0.2), TimePart("idle", 80.0, 0.8)]

    def shown(hang_s: float) -> list[tuple[str, float]]:
        section = TimeSection(wall_s=100.0, parts=parts, hang_s=hang_s)
        return [(part.part, part.seconds) for part in visible_parts(section)]

    assert shown(75.0) == [("steps", 20.0), ("hang", 75.0), ("idle", 5.0)]
    assert shown(0.0) == shown(90.0) == [("steps", 20.0), ("idle", 80.0)]
