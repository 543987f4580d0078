"""Contents of the tables of `traceml top`."""

from __future__ import annotations

from tests.renderers.reports import healthy, killed_rank, slow_rank, too_early
from traceml.renderers.text.top_tables import (
    BarCell,
    TrendCell,
    logs_table,
    memory_table,
    metrics_table,
    phases_table,
    ranks_table,
    system_table,
)
from traceml.renderers.views import run_view
from traceml.runs.report.report_types import GpuSection, HostSection, MetricSection, Report, SystemSection
from traceml.runs.rows.messages import RunMessage


def cells(table, row):
    return [cell for cell in table.rows[row].cells if isinstance(cell, str)]


def test_phases_name_the_ranks_at_both_ends():
    table = phases_table(slow_rank())

    assert cells(table, 1) == ["forward", "10.5 ms", "42 %", "550 us r0", "20.4 ms r1"]
    assert isinstance(table.rows[1].cells[3], BarCell)


def test_ranks_tell_work_from_waiting():
    """The slow rank and one that was killed stand out, with what happened."""
    assert cells(ranks_table(run_view(slow_rank())), 1)[3:] == ["24.6 ms", "22.8 ms", "1.75 ms", "finished, slowest"]
    killed = ranks_table(run_view(killed_rank())).rows[1]
    assert (killed.style, "SIGKILL" in killed.cells[-1]) == ("bold red", True)


def test_memory_tells_growth():
    report = slow_rank()
    first, second = report.memory.by_rank
    second.rss_slope_bytes_per_step, second.cuda_peak_bytes = 4096.0, 1 << 30
    first.rss_slope_bytes_per_step = None
    table = memory_table(report)

    assert cells(table, 0) == ["0", "412 MiB", "-", "-"]
    assert cells(table, 1) == ["1", "413 MiB", "+4 KiB", "1.00 GiB"]


def test_metrics_with_their_trend():
    """Metrics are sorted by name; a value that is not finite is marked."""
    report = healthy()
    report.metrics = {
        "loss": MetricSection(last=0.123456789, min=0.1, max=2.0, count=1200),
        "grad": MetricSection(count=3),
    }
    table = metrics_table(report, {"loss": [2.0, 1.0]})

    assert cells(table, 0) == ["grad", "-", "-", "-", "3"]
    assert table.rows[0].style == "bold red"
    assert cells(table, 1) == ["loss", "0.12346", "0.1", "2", "1,200"]
    assert table.rows[1].cells[-1] == TrendCell((2.0, 1.0))


def test_system_lists_devices_below_their_host():
    report = healthy()
    gpu = GpuSection(index=0, utilization_pct=80.0, memory_used_bytes=1, memory_total_bytes=2, temperature_c=61.4)
    report.system = SystemSection([HostSection(host="node1", cpu_pct=50.0, memory_pct=25.0, gpus=[gpu])])
    table = system_table(report)

    assert cells(table, 0) == ["node1", "50 %", "25 %", "-", "-"]
    assert cells(table, 1) == ["  gpu 0", "80 %", "50 %", "61 C", "-"]


def test_logs_tell_whom_they_are_about():
    table = logs_table([RunMessage(0.0, 3, "warning", "be careful"), RunMessage(0.0, None, "end", "state finished")])

    assert [row.cells[1:] for row in table.rows] == [("3", "warning", "be careful"), ("", "end", "state finished")]
    assert [row.style for row in table.rows] == ["yellow", ""]


def test_logs_begin_with_the_scripts_newest_output():
    """The last hundred lines; what a terminal would obey is shown as its escape."""
    table = logs_table(
        [RunMessage(0.0, None, "end", "state finished")], [f"step {step}" for step in range(150)] + ["\x1b[2J"]
    )

    kinds = [row.cells[2] for row in table.rows]
    assert kinds == ["output"] * 100 + ["end"]
    assert [row.cells[3] for row in table.rows[:2]] == ["\\x1b[2J", "step 149"]


def test_before_the_first_step_tables_say_so():
    """An empty table has a message, also before there is a report."""
    for report in (too_early(), Report.empty("x")):
        made = [phases_table(report), ranks_table(run_view(report)), memory_table(report), metrics_table(report, {}),
                system_table(report), logs_table([])]  # fmt: skip
        assert all(not table.rows and table.empty for table in made)
