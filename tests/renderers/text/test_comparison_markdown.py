"""Comparisons as Markdown."""

from __future__ import annotations

from tests.diagnosis.fabricated import Job
from tests.runs.fabricated_store import store_run
from traceml.renderers.text.comparison_markdown import comparison_markdown, comparisons_markdown
from traceml.runs.comparison.compare import compare_runs
from traceml.runs.comparison.comparison_types import Comparisons, MetricChange, ParamChange, StatisticChange


def test_names_of_the_user_stay_text(tmp_path):
    """A name with signs of Markdown or HTML neither opens a cell, nor a link, nor a tag."""
    found = compare_runs(*(store_run(tmp_path / name, Job(steps=100), seed=1) for name in ("a", "b")))
    found.metrics = [MetricChange(name="a|b", a=1.0, b=1.0, change=0.0)]
    found.params = [
        ParamChange(name="<img src=x>", a="[x](http://y)", b=2),
        ParamChange(name="`<b>", a=1, b=2),  # begins like a code span
    ]

    for shown in (comparison_markdown(found), comparisons_markdown(Comparisons(baseline="a", comparisons=[found]))):
        assert "\\<img src=x\\>" in shown
        assert "\\[x\\](http://y)" in shown
        assert "\\`\\<b\\>" in shown
    assert "| a\\|b | 1 | 1 | 0 % |" in comparison_markdown(found)


def test_changes_of_a_sample_are_told_from_those_of_a_step(tmp_path):
    """The mean step, which stands beside it, may have changed the other way."""
    found = compare_runs(*(store_run(tmp_path / name, Job(steps=100), seed=1) for name in ("a", "b")))
    found.sample_time = StatisticChange(a_ms=1.5, b_ms=1.0, change=-1 / 3, low=-0.4, high=-0.2, p=0.001, real=True)

    shown = comparisons_markdown(Comparisons(baseline="a", comparisons=[found]))

    assert "| -33 %/sample |" in shown
    assert f"| B `{found.b.id}` |" in shown  # a code span, as that of A
