"""Comparisons as Markdown, for pull requests and job summaries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from traceml.formatting import bytes_text, ms_text, phase_label, value_text
from traceml.renderers.printable import printable_copy
from traceml.renderers.text.card import time_text
from traceml.renderers.text.compared_runs import compared_losses, compared_params, compared_rows
from traceml.renderers.text.comparison import (
    change_text,
    compared_headline,
    compared_sentences,
    delta_text,
    step_time_rows,
)
from traceml.renderers.text.report_markdown import markdown_code, markdown_list, markdown_table, plain_markdown
from traceml.runs.comparison.comparison_types import Comparison, Comparisons, RunSide

__all__ = ["comparison_markdown", "comparisons_markdown"]

_SHOWN = 8


def comparison_markdown(comparison: Comparison) -> str:
    """Return the comparison of two runs: the result, a table, parameters, notes."""
    comparison = printable_copy(comparison)
    sentences = [f"{plain_markdown(sentence)}  " for sentence in compared_sentences(comparison)]
    lines = [
        f"**{plain_markdown(compared_headline(comparison))}**",
        "",
        *([*sentences, ""] if sentences else ()),
        f"A: {_about(comparison.a)}  ",
        f"B: {_about(comparison.b)}",
        "",
        *markdown_table(("", "A", "B", "change", "99 % between", "significant"), _rows(comparison)),
        *_differing(comparison),
        *markdown_list(comparison.notes),
    ]
    return "\n".join(lines) + "\n"


def comparisons_markdown(comparisons: Comparisons) -> str:
    """Return several runs that are compared with one baseline: a row for each, parameters, notes."""
    comparisons = printable_copy(comparisons)
    rows = compared_rows(comparisons.comparisons)
    cells = [
        (markdown_code(row.side.id, f"{row.letter} "), row.step, row.change, row.significant, row.side.verdict)
        for row in rows
    ]
    values = [*compared_losses(comparisons.comparisons), *compared_params(comparisons.comparisons)]
    letters = [row.letter for row in rows]
    lines = [
        *markdown_table(("run", "step time", "change", "significant", "verdict"), cells),
        *(["", *markdown_table(("", *letters), [(name, *of_runs) for name, of_runs in values])] if values else ()),
        *markdown_list(f"{row.letter}: {note}" for row in rows for note in row.notes),
    ]
    return "\n".join(lines) + "\n"


def _about(run: RunSide) -> str:
    text = time_text(run.time)
    return f"{markdown_code(run.id)}, {text}" if text else markdown_code(run.id)


def _rows(comparison: Comparison) -> Iterator[Sequence[str]]:
    for name, row, change, between in step_time_rows(comparison):
        yield f"step time, {name}", ms_text(row.a_ms), ms_text(row.b_ms), change, between, row.significant

    for phase in comparison.phases[:_SHOWN]:
        yield phase_label(phase.phase), ms_text(phase.a_ms), ms_text(phase.b_ms), delta_text(phase.delta_ms), "", ""

    for label, size in comparison.memory.items():
        if size.a is not None and size.b is not None:
            yield label, bytes_text(size.a), bytes_text(size.b), change_text(size.change), "", ""

    for metric in comparison.metrics[:_SHOWN]:
        yield metric.name, value_text(metric.a), value_text(metric.b), change_text(metric.change), "", ""

    yield "verdict", comparison.verdict.a, comparison.verdict.b, "", "", ""


def _differing(comparison: Comparison) -> list[str]:
    rows = [(row.name, value_text(row.a), value_text(row.b)) for row in comparison.params]
    return ["", *markdown_table(("parameter", "A", "B"), rows)] if rows else []
