"""Comparison of two runs, in sentences and in a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.console import Group
from rich.text import Text

from traceml.formatting import (
    bytes_text,
    capitalized,
    ms_text,
    phase_label,
    phase_words,
    plural,
    ranks_text,
    value_text,
)
from traceml.renderers.printable import printable_copy
from traceml.renderers.text.card import time_text, wrapped, wrapped_lines
from traceml.renderers.text.viewport import Viewport, column_text
from traceml.runs.comparison.comparison_types import Comparison, StatisticChange

__all__ = [
    "change_text",
    "compared_card",
    "compared_headline",
    "compared_sentences",
    "delta_text",
    "interval_text",
    "judged_time_words",
    "significance_text",
    "step_changes",
    "step_time_rows",
]

_MAX_WIDTH = 100
_SHOWN_PHASES = 6
_SHOWN_RANKS = 6
_SHOWN_METRICS = 6
_SHOWN_PARAMS = 8
# A rank is named when its work grew this much more than the median rank's, as a share of A's step.
_STANDS_OUT = 0.05
_STYLES = {"slower": "bold red", "faster": "bold green", "same": "bold", "unknown": "bold yellow"}


def change_text(change: float | None, *, as_factor: bool = False) -> str:
    """Return a change as `+4.2 %`, `-12 %`, or `3.1x` where it is large.

    Args:
        change: as a share.
        as_factor: use a factor for small ones too, where another number next to it is one.
    """
    if change is None:
        return "-"

    if change >= 1 or as_factor:
        return f"{change + 1:.3g}x"

    percent = 100 * change
    if abs(percent) < 0.05:
        return "0 %"

    return f"{percent:+.1f} %" if abs(percent) < 9.95 else f"{percent:+.0f} %"


def delta_text(ms: float) -> str:
    """Return a difference of times: `+4.95 ms`, `-114 us`, `0 us`."""
    sign = "+" if ms > 0 else "-" if ms < 0 else ""
    return f"{sign}{ms_text(abs(ms))}"


def _step_change_text(row: StatisticChange) -> str:
    """Return the change of a statistic in the unit of its interval."""
    return step_changes([row])[0][0]


def step_changes(rows: Iterable[StatisticChange]) -> list[tuple[str, str]]:
    """Return the changes and intervals of a table, all in one unit: factors where one of them is a doubling."""
    rows = list(rows)
    as_factor = any(max(row.change or 0.0, row.high or 0.0) >= 1 for row in rows)
    return [
        (change_text(row.change, as_factor=as_factor), interval_text(row.low, row.high, as_factor=as_factor))
        for row in rows
    ]


def step_time_rows(comparison: Comparison) -> list[tuple[str, StatisticChange, str, str]]:
    """Return the table of step times: name, statistic, change and interval; the last row may be of a sample."""
    rows = comparison.step_time.items()
    rows += [("per sample", comparison.sample_time)] if comparison.sample_time else []
    changes = step_changes(row for _, row in rows)
    return [(name, row, *texts) for (name, row), texts in zip(rows, changes, strict=True)]


def significance_text(row: StatisticChange) -> str:
    """Return whether a change is significant: `yes, p = 0.001`, or `unknown`."""
    return row.significant if row.p is None else f"{row.significant}, p = {row.p:.2g}"


def interval_text(low: float | None, high: float | None, *, as_factor: bool = False) -> str:
    """Return an interval of changes, both ends in one unit: `-3.0 % and +4.2 %`, or `0.9x and 3.1x`.

    Args:
        low: the lower end, as a share.
        high: the upper end.
        as_factor: use factors for a small one too, where another number beside it is one.
    """
    if low is None or high is None:
        return "-"

    ends = (change_text(end, as_factor=as_factor or high >= 1) for end in (low, high))
    return " and ".join(ends)


def compared_headline(comparison: Comparison) -> str:
    """Return the result in one sentence without a period."""
    mean, outcome = comparison.judged, comparison.outcome
    unit = comparison.unit
    sizes = f"{ms_text(mean.a_ms)} -> {ms_text(mean.b_ms)}"
    if comparison.obstacles and mean.p is not None:
        return f"The machine may be the difference: a {unit} takes {sizes} ({_step_change_text(mean)})"

    if comparison.obstacles and mean.change is not None:
        return f"A and B are not comparable; a {unit} takes {sizes} ({_step_change_text(mean)})"

    if outcome == "unknown":
        return "Too few steps to tell whether the two differ"

    if outcome == "same":
        return f"No significant difference in {judged_time_words(comparison)}: {sizes} ({_step_change_text(mean)})"

    return f"B is {outcome}: a {unit} takes {sizes} ({_step_change_text(mean)})"


def judged_time_words(comparison: Comparison) -> str:
    """Return the time whose mean determines the outcome: `step time`, or `time per sample`."""
    return "time per sample" if comparison.unit == "sample" else "step time"


def compared_sentences(comparison: Comparison) -> list[str]:
    """Return the details, a sentence each: confidence, phase or rank, verdict."""
    mean = comparison.judged
    sentences = []
    if mean.p is not None:
        between = interval_text(mean.low, mean.high)
        sentences.append(f"With 99 % confidence the change is between {between} (p = {mean.p:.2g}).")

    if comparison.outcome in ("slower", "faster"):
        sentences += list(_rank_sentence(comparison)) or list(_phase_sentence(comparison))

    verdict = comparison.verdict
    if verdict.changed:
        sentences.append(f"The verdict went from {verdict.a} to {verdict.b}.")

    return sentences


def compared_card(comparison: Comparison, viewport: Viewport) -> Group:
    """Return the comparison for a terminal, at most 100 columns wide."""
    comparison = printable_copy(comparison)
    lines = [
        *_head(comparison, min(viewport.width, _MAX_WIDTH), viewport),
        Text(),
        *_times(comparison),
        Text(),
        *_phase_rows(comparison),
        *_rank_rows(comparison),
        *_rest(comparison),
    ]
    return Group(*(viewport.cut(line, _MAX_WIDTH) for line in lines))


def _head(comparison: Comparison, width: int, viewport: Viewport) -> Iterator[Text]:
    yield Text(f"{viewport.glyphs.rule * 2} traceml compare ", style="bold").append(
        viewport.glyphs.rule * (width - 19), "dim"
    )
    for which, run in (("A", comparison.a), ("B", comparison.b)):
        facts = f"{plural(run.world_size, 'rank')}, {plural(run.steps, 'step')}, {run.state}"
        yield Text(f" {which}  ", style="dim").append(run.id).append(f"  {facts}", "dim")
        if text := time_text(run.time, width - 4):
            yield Text(f"    {text}", style="dim")

    yield Text()
    yield from wrapped_lines(compared_headline(comparison), width, _STYLES[comparison.outcome], indent=1)
    for sentence in compared_sentences(comparison):
        yield from wrapped_lines(sentence, width, indent=1)

    for note in comparison.notes:
        for number, line in enumerate(wrapped(note, width - 9)):
            yield Text(" Note    " if not number else " " * 9, style="dim").append(line, "yellow")


def _times(comparison: Comparison) -> Iterator[Text]:
    yield Text(f" {'step time':<14}{'A':>10}{'B':>10}{'change':>10}  significant", style="dim")
    for name, row, change, _ in step_time_rows(comparison):
        style = "bold red" if (row.change or 0) > 0 else "bold green"
        yield _row(name, row.a_ms, row.b_ms, change, significance_text(row), style if row.real else "")


def _row(label: str, a_ms: float | None, b_ms: float | None, change: str, after: str, style: str) -> Text:
    line = Text(f" {label:<14}{ms_text(a_ms):>10}{ms_text(b_ms):>10}")
    return line.append(f"{change:>10}", style=style).append(f"  {after}", style="dim")


def _phase_rows(comparison: Comparison) -> Iterator[Text]:
    rows = comparison.phases[:_SHOWN_PHASES]
    if rows:
        yield Text(f" {'phase':<14}{'A':>10}{'B':>10}{'B - A':>10}", style="dim")

    for row in rows:
        line = Text(f" {column_text(phase_label(row.phase), 14)}{ms_text(row.a_ms):>10}{ms_text(row.b_ms):>10}")
        yield line.append(f"{delta_text(row.delta_ms):>10}")


def _rank_rows(comparison: Comparison) -> Iterator[Text]:
    ranks = [row for row in comparison.ranks if row.change is not None]
    if len(ranks) < 2:
        return

    yield Text()
    yield Text(f" {'own work':<14}{'A':>10}{'B':>10}{'change':>10}", style="dim")
    for row in sorted(ranks, key=lambda row: -abs(row.change or 0.0))[:_SHOWN_RANKS]:
        most = f"most in {phase_label(row.phase or '')}" if row.phase_delta_ms else ""
        yield _row(f"rank {row.rank}", row.a_work_ms, row.b_work_ms, change_text(row.change), most, "")

    if len(ranks) > _SHOWN_RANKS:
        others = plural(len(ranks) - _SHOWN_RANKS, "rank")
        yield Text(f" and {others} that changed less: --json has all", style="dim")


def _rest(comparison: Comparison) -> Iterator[Text]:
    yield Text()
    for what, row in comparison.memory.items():
        if row.a is not None and row.b is not None:
            line = Text(f" {what:<14}{bytes_text(row.a):>10}{bytes_text(row.b):>10}")
            yield line.append(f"{change_text(row.change):>10}")

    verdict = comparison.verdict
    yield Text(f" {'verdict':<14}{verdict.a} -> {verdict.b}")
    yield from _metric_rows(comparison)
    yield from _param_rows(comparison)


def _metric_rows(comparison: Comparison) -> Iterator[Text]:
    heading = f"{'last value':<22}{'A':>12}{'B':>12}{'change':>10}"
    lines = [
        f"{column_text(row.name, 21)} {value_text(row.a):>12}{value_text(row.b):>12}{change_text(row.change):>10}"
        for row in comparison.metrics
    ]
    return _first_lines(heading, lines, _SHOWN_METRICS, "metric")


def _param_rows(comparison: Comparison) -> Iterator[Text]:
    lines = [f"{column_text(row.name, 21)} {value_text(row.a)} -> {value_text(row.b)}" for row in comparison.params]
    return _first_lines(f"{'parameter':<22}A -> B", lines, _SHOWN_PARAMS, "parameter")


def _first_lines(heading: str, lines: Sequence[str], most: int, noun: str) -> Iterator[Text]:
    """Show the first lines of a list, and how many more there are; nothing of an empty list."""
    if lines:
        yield Text()
        yield Text(f" {heading}", style="dim")

    for line in lines[:most]:
        yield Text(f" {line}")

    if len(lines) > most:
        yield Text(f" and {plural(len(lines) - most, f'other {noun}')}: --json has all", style="dim")


def _phase_sentence(comparison: Comparison) -> Iterator[str]:
    mean, (of_a, of_b) = comparison.judged, comparison.units_per_step
    gap = (mean.b_ms or 0.0) - (mean.a_ms or 0.0)
    deltas = {row.phase: row.b_ms / of_b - row.a_ms / of_a for row in comparison.phases}
    phase = max(deltas, key=lambda phase: deltas[phase] * (1 if gap > 0 else -1), default=None)
    if phase is None or abs(deltas[phase]) < 0.1 * abs(gap):
        return

    more = "more" if deltas[phase] > 0 else "less"
    yield f"The largest part of it is {phase_words(phase)}: {ms_text(abs(deltas[phase]))} {more} per {comparison.unit}."


def _rank_sentence(comparison: Comparison) -> Iterator[str]:
    ranks = [row for row in comparison.ranks if row.change is not None]
    step = comparison.step_time.mean.a_ms
    if len(ranks) < 2 or not step or comparison.sample_time:
        return

    sign = 1 if comparison.outcome == "slower" else -1
    ordered = sorted(ranks, key=lambda row: sign * row.delta_ms)
    usual, largest = (sign * row.delta_ms for row in (ordered[(len(ordered) - 1) // 2], ordered[-1]))
    if largest - usual <= _STANDS_OUT * step:
        return

    most = [row for row in ordered if sign * row.delta_ms - usual >= (largest - usual) / 2]
    named = ranks_text(row.rank for row in most)
    whose, them = (f"{capitalized(named)}'s own work", "it") if len(most) == 1 else (f"The own work of {named}", "them")
    delta_ms = sum(sign * row.delta_ms for row in most) / len(most)
    part = f"{ms_text(delta_ms)}, most of it in {phase_words(most[-1].phase or '')}"
    change, others = ("grew", f"wait for {them}") if sign > 0 else ("fell", f"waited for {them} in A")
    yield f"{whose} {change} by {part}; the others {others}."
