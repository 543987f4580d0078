"""Comparisons as Markdown, for pull requests and job summaries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from traceml.formatting import bytes_text, ms_text, phase_label, value_text
from traceml.renderers.printable import printable_copy
from traceml.renderers.text.card import time_text
from traceml.renderers.text.compared_runs import compared_losses, compared_params, significance_word
from traceml.renderers.text.comparison import (
    change_text,
    compared_headline,
    compared_sentences,
    delta_text,
    step_changes,
    step_time_rows,
)
from traceml.renderers.text.markdown import markdown_code, markdown_table, plain_markdown
from traceml.runs.comparison.comparison_types import Comparison, Comparisons, RunSide, run_letter

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
        *_notes([*comparison.obstacles, *comparison.remarks]),
    ]
    return "\n".join(lines) + "\n"


def comparisons_markdown(comparisons: Comparisons) -> str:
    """Return several runs that are compared with one baseline: a row for each, parameters, notes."""
    comparisons = printable_copy(comparisons)
    first = comparisons.comparisons[0]
    changes = step_changes(each.judged for each in comparisons.comparisons)
    rows = [(f"A `{markdown_code(first.a.id)}`", ms_text(first.step_time.mean.a_ms), "", "", first.a.verdict)]
    rows += [
        (
            f"{run_letter(number)} `{markdown_code(each.b.id)}`",
            ms_text(each.step_time.mean.b_ms),
            change,
            significance_word(each),
            each.b.verdict,
        )
        for number, (each, (change, _)) in enumerate(zip(comparisons.comparisons, changes, strict=True), 1)
    ]
    values = [*compared_losses(comparisons), *compared_params(comparisons)]
    letters = [run_letter(number) for number in range(len(comparisons.comparisons) + 1)]
    notes = [
        f"{letter}: {note}"
        for letter, each in zip(letters[1:], comparisons.comparisons, strict=True)
        for note in (*each.obstacles, *each.remarks)
    ]
    lines = [
        *markdown_table(("run", "step time", "change", "significant", "verdict"), rows),
        *(["", *markdown_table(("", *letters), [(name, *of_runs) for name, of_runs in values])] if values else ()),
        *_notes(notes),
    ]
    return "\n".join(lines) + "\n"


def _about(run: RunSide) -> str:
    text = time_text(run.time)
    return f"`{markdown_code(run.id)}`, {text}" if text else f"`{markdown_code(run.id)}`"


def _rows(comparison: Comparison) -> Iterator[Sequence[str]]:
    rows = step_time_rows(comparison)
    for (name, row), (change, between) in zip(rows, step_changes(row for _, row in rows), strict=True):
        real = {True: "yes", False: "no", None: "unknown"}[row.real]
        yield f"step time, {name}", ms_text(row.a_ms), ms_text(row.b_ms), change, between, real

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


def _notes(notes: Sequence[str]) -> list[str]:
    return ["", *(f"- {plain_markdown(note)}" for note in notes)] if notes else []
