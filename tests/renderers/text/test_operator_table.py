"""Text of `traceml profile`."""

from __future__ import annotations

from traceml.renderers.text.operator_table import operator_lines, slowdown_line
from traceml.runs.export.top_operators import OperatorTable, OperatorTotal


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
