"""Comparisons as Markdown, for pull requests and job summaries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from traceml.formatting import bytes_text, ms_text, phase_label
from traceml.renderers.printable import printable_copy
from traceml.renderers.text.compared_runs import compared_losses, compared_params, significance_word
from traceml.renderers.text.comparison import (
    change_text,
    compared_headline,
    compared_sentences,
    interval_text,
    step_change_text,
    value_text,
)
from traceml.runs.comparison.comparison_types import Comparison, Comparisons

__all__ = ["comparison_markdown", "comparisons_markdown"]

_SHOWN = 8


def comparison_markdown(comparison: Comparison) -> str:
    """Return the comparison of two runs: the result, a table, parameters, notes."""
    comparison = printable_copy(comparison)
    lines = [
        f"**{_plain(compared_headline(comparison))}**",
        "",
        *(f"{_plain(sentence)}  " for sentence in compared_sentences(comparison)),
        "",
        f"A: `{_code(comparison.a.id)}`, B: `{_code(comparison.b.id)}`",
        "",
        *_table(("", "A", "B", "change", "99 % between", "significant"), _rows(comparison)),
        *_differing(comparison),
        *_notes([*comparison.obstacles, *comparison.remarks]),
    ]
    return "\n".join(lines) + "\n"


def comparisons_markdown(comparisons: Comparisons) -> str:
    """Return several runs that are compared with one baseline: a row for each, parameters, notes."""
    comparisons = printable_copy(comparisons)
    first = comparisons.comparisons[0]
    rows = [(f"A `{_code(first.a.id)}`", ms_text(first.step_time.mean.a_ms), "", "", first.a.verdict)]
    rows += [
        (
            f"`{_code(each.b.id)}`",
            ms_text(each.step_time.mean.b_ms),
            step_change_text(each.step_time.mean),
            significance_word(each),
            each.b.verdict,
        )
        for each in comparisons.comparisons
    ]
    values = [*compared_losses(comparisons), *compared_params(comparisons)]
    runs = ["A", *(f"`{_code(each.b.id)}`" for each in comparisons.comparisons)]
    notes = [f"{each.b.id}: {note}" for each in comparisons.comparisons for note in (*each.obstacles, *each.remarks)]
    lines = [
        *_table(("run", "step time", "change", "significant", "verdict"), rows),
        *(["", *_table(("", *runs), [(name, *of_runs) for name, of_runs in values])] if values else ()),
        *_notes(notes),
    ]
    return "\n".join(lines) + "\n"


def _rows(comparison: Comparison) -> Iterator[Sequence[str]]:
    for name, row in comparison.step_time.items():
        real = {True: "yes", False: "no", None: "unknown"}[row.real]
        between = interval_text(row.low, row.high)
        yield f"step time, {name}", ms_text(row.a_ms), ms_text(row.b_ms), step_change_text(row), between, real

    for phase in comparison.phases[:_SHOWN]:
        change = f"{'+' if phase.delta_ms >= 0 else '-'}{ms_text(abs(phase.delta_ms))}"
        yield phase_label(phase.phase), ms_text(phase.a_ms), ms_text(phase.b_ms), change, "", ""

    for label, size in comparison.memory.items():
        if size.a is not None and size.b is not None:
            yield label, bytes_text(size.a), bytes_text(size.b), change_text(size.change), "", ""

    for metric in comparison.metrics[:_SHOWN]:
        yield metric.name, value_text(metric.a), value_text(metric.b), change_text(metric.change), "", ""

    yield "verdict", comparison.verdict.a, comparison.verdict.b, "", "", ""


def _differing(comparison: Comparison) -> list[str]:
    rows = [(row.name, value_text(row.a), value_text(row.b)) for row in comparison.params]
    return ["", *_table(("parameter", "A", "B"), rows)] if rows else []


def _notes(notes: Sequence[str]) -> list[str]:
    return ["", *(f"- {_plain(note)}" for note in notes)] if notes else []


def _table(head: Sequence[str], rows: Iterator[Sequence[str]] | Sequence[Sequence[str]]) -> Iterator[str]:
    yield _line(head)
    yield _line(["---", *["---:"] * (len(head) - 1)])
    yield from (_line([_cell(cell) for cell in row]) for row in rows)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    """Return a text that stays in its cell; a code span is kept."""
    return text.replace("|", "\\|") if text.startswith(("`", "A `")) else _plain(text)


def _plain(text: str) -> str:
    """Return a text without meaning in Markdown or HTML: names and values are the user's."""
    return "".join(f"\\{sign}" if sign in "\\`*_[]<>|#~" else sign for sign in text)


def _code(text: str) -> str:
    return text.replace("`", "'")
