"""Reports as Markdown, for pull requests and job summaries, and the parts of Markdown documents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from traceml.formatting import (
    capitalized,
    duration_text,
    ms_text,
    part_words,
    percent_text,
    phase_label,
    plural,
    rate_text,
)
from traceml.renderers.views import RunView, run_view, visible_ranks
from traceml.renderers.wording import NO_LINES, gain_sentence, shown_lines, tracker_text
from traceml.runs.report.line_shares import all_lines
from traceml.runs.report.report_types import Report

__all__ = ["markdown_code", "markdown_list", "markdown_table", "plain_markdown", "report_markdown"]

_MAX_RANKS = 16


def report_markdown(report: Report, *, lines: bool = False) -> str:
    """Return a report: the verdict with its figures and advice, tables of steps, phases and ranks, other findings.

    Args:
        lines: add the table of sampled lines.
    """
    view = run_view(report)
    verdict = view.report.verdict
    texts = [
        f"**{verdict.kind}: {plain_markdown(verdict.headline)}**",
        "",
        *_paragraphs(verdict.summary, _labeled("Next", verdict.next), _labeled("Gain", gain_sentence(verdict) or "")),
        *_paragraphs(*view.remarks, *view.basis, capitalized(view.absent or "")),
        _outcome(view),
        *_parts("part of the run", "time", _time_rows(view)),
        *_parts("phase", "mean", _phase_rows(view)),
        *_rank_table(view),
        *markdown_list(_closing(view)),
        *(_line_table(report) if lines else ()),
    ]
    return "\n".join(texts) + "\n"


def _labeled(label: str, text: str) -> str:
    return f"{label}: {text}" if text else ""


def _paragraphs(*texts: str) -> Iterator[str]:
    for text in filter(None, texts):
        yield from (plain_markdown(text), "")


def _outcome(view: RunView) -> str:
    steps = view.report.steps
    facts = [plural(view.report.run.world_size, "rank")]
    if steps.count:
        facts += [
            plural(steps.count, "step"),
            f"{rate_text(view.steps_per_second)} steps/s",
            *(f"{name} {ms_text(ms)}" for name, ms in (("mean", steps.mean_ms), ("p99", steps.p99_ms))),
        ]

    return f"Run {markdown_code(view.report.run.id)}: {', '.join(facts)}, {view.outcome}"


def _time_rows(view: RunView) -> Iterator[Sequence[str]]:
    for part in view.time_parts if view.report.time is not None else ():
        yield part_words(part.part), duration_text(part.seconds), percent_text(part.share)


def _phase_rows(view: RunView) -> Iterator[Sequence[str]]:
    for phase in view.report.phases:
        yield phase_label(phase.phase), ms_text(phase.mean_ms), percent_text(phase.share)


def _parts(what: str, value: str, rows: Iterator[Sequence[str]]) -> list[str]:
    found = list(rows)
    return ["", *markdown_table((what, value, "share"), found)] if found else []


def _rank_table(view: RunView) -> list[str]:
    if len(view.ranks) < 2:
        return []

    phases = [phase.phase for phase in view.report.phases]
    rows = [(str(row.rank), *row.times(phases), row.memory) for row in visible_ranks(view.ranks, _MAX_RANKS)]
    hidden = len(view.ranks) - len(rows)
    head = ("rank", "step", *(plain_markdown(phase_label(phase)) for phase in phases), "memory")
    return ["", *markdown_table(head, rows), *(["", f"{plural(hidden, 'more rank')} in the report"] if hidden else ())]


def _line_table(report: Report) -> list[str]:
    rows = [
        (markdown_code(each.place or "libraries only"), phase_label(phase.phase), percent_text(each.share))
        for phase in all_lines(report)
        for each in shown_lines(phase)
    ]
    return ["", *(markdown_table(("line", "phase", "share of the phase"), rows) if rows else [NO_LINES])]


def _closing(view: RunView) -> Iterator[str]:
    ended = [row for row in view.ranks if row.end]
    yield from (f"rank {row.rank} on {row.host}: {row.end}" for row in ended[:_MAX_RANKS])
    if len(ended) > _MAX_RANKS:
        yield f"and {plural(len(ended) - _MAX_RANKS, 'more rank')} that ended"

    yield from (f"{other.kind}: {other.headline}" for other in view.others)
    yield from (tracker_text(tracker) for tracker in view.report.trackers)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table; the cells after the first are aligned to the right.

    Args:
        head: names of the columns, as Markdown.
        rows: texts of the cells.
    """
    yield _line(head)
    yield _line(["---", *["---:"] * (len(head) - 1)])
    yield from (_line([_cell(cell) for cell in row]) for row in rows)


def markdown_list(texts: Iterable[str]) -> list[str]:
    """Return the lines of a list below an empty one; none for an empty list."""
    found = [f"- {plain_markdown(text)}" for text in texts]
    return ["", *found] if found else []


def plain_markdown(text: str) -> str:
    """Return a text without meaning in Markdown or HTML: names and values are the user's."""
    return "".join(f"\\{sign}" if sign in "\\`*_[]<>|#~" else sign for sign in text)


class MarkdownText(str):
    """A text that is Markdown already."""

    __slots__ = ()


def markdown_code(text: str, before: str = "") -> MarkdownText:
    """Return a text as a code span.

    Args:
        before: Markdown in front of it.
    """
    content = text.replace("`", "'")
    return MarkdownText(f"{before}`{content}`")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|") if isinstance(text, MarkdownText) else plain_markdown(text)
