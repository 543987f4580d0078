"""Tables of profiles."""

from __future__ import annotations

from traceml.renderers.text.profile_tables import line_table, operator_lines, slowdown_line
from traceml.renderers.views import run_view
from traceml.runs.export.top_operators import OperatorTable, OperatorTotal
from traceml.runs.report.report_types import LineSection, Report


def test_times_are_per_step() -> None:
    """The longest first, with its line; a device column only where there is a device."""
    table = OperatorTable()
    table.steps = 4
    table.by_name["aten::mm"] = OperatorTotal(calls=8, self_ns=12_000_000)
    table.by_name["aten::mm"].places[("/x/train.py", 7, "step")] += 3
    table.by_name["aten::add"] = OperatorTotal(calls=4, self_ns=4_000_000)
    lines = operator_lines(table)

    assert lines[1].split() == ["75", "%", "3.00", "ms", "2", "aten::mm", "train.py:7", "step"]
    assert lines[2].split() == ["25", "%", "1.00", "ms", "1", "aten::add"]
    assert "device" not in lines[0]
    table.by_name["aten::add"].device_ns = 8_000_000
    assert operator_lines(table)[1].split()[:5] == ["100", "%", "1.00", "ms", "2.00"]


def test_the_slow_down_is_reported() -> None:
    """Of the rank that it hit most; where it is not known, nothing is said."""
    assert slowdown_line({0: 2.13}) == "Steps took 2.1x as long while profiled; the diagnosis leaves them out."
    assert "2.1x as long while profiled (on rank 1)" in slowdown_line({0: 1.2, 1: 2.13})
    assert slowdown_line({0: 0.97}) == "Steps took as long as before while profiled."
    assert slowdown_line({0: None}) == ""


def table(*lines: LineSection) -> list[str]:
    report = Report.empty("run")
    report.lines = list(lines)
    return [line.plain for line in line_table(run_view(report))]


def line(phase: str, function: str | None, samples: int, share: float, library: str | None = None) -> LineSection:
    place = {"file": "/home/me/train.py", "line": 7, "function": function} if function else {}
    return LineSection(phase=phase, samples=samples, share=share, library=library, **place)


def test_phases_and_lines_are_in_order_of_time():
    """Lines with the same place are one, with the library functions that they call; tiny ones are left out."""
    shown = table(
        line("forward", "forward", 20, 1.0, "/venv/lib/python3.11/site-packages/torch/nn/linear.py:9 Linear.forward"),
        line("other", "update", 50, 0.625),
        line("other", "load", 20, 0.25, "/usr/lib/python3.11/json/decoder.py:3 decode"),
        line("other", "load", 5, 0.0625, "/usr/lib/python3.11/pathlib.py:5 read_text"),
        line("other", "load", 4, 0.05),
        line("other", "tiny", 1, 0.005),
        line("startup", None, 10, 1.0),
        line("workers", "decode", 60, 1.0),
    )

    assert shown == [
        "other: 73 % of 110 samples",
        "    62 %  /home/me/train.py:7 update",
        "    36 %  /home/me/train.py:7 load",
        "          25 % in json/decoder.py:3 decode",
        "          6 % in pathlib.py:5 read_text",
        "forward: 18 % of 110 samples",
        "   100 %  /home/me/train.py:7 forward",
        "          in torch/nn/linear.py:9 Linear.forward",
        "start-up: 9 % of 110 samples",
        "   100 %  libraries only",
        "loader workers, while they make batches: 60 samples",
        "   100 %  /home/me/train.py:7 decode",
    ]


def test_a_run_without_samples_says_why():
    """Instead of an empty screen."""
    assert table() == ["No lines were sampled: the run only logs, is too short, or has a stack_interval of 0."]
