"""Several runs, each compared with the same baseline: their letters, and a table for terminals."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group
from rich.text import Text

from traceml.formatting import ms_text, value_text
from traceml.renderers.printable import printable_copy
from traceml.renderers.text.card import wrapped
from traceml.renderers.text.comparison import judged_changes
from traceml.renderers.text.viewport import Viewport
from traceml.runs.comparison.comparison_types import Comparison, Comparisons, run_letter
from traceml.runs.rows.metrics import is_loss

__all__ = ["OUTCOME_STYLES", "compared_losses", "compared_params", "compared_runs", "significance_word"]

_MAX_WIDTH = 120
OUTCOME_STYLES = {"slower": "bold red", "faster": "bold green"}
_SHOWN = 12
_COLUMNS = 27  # of the table without run, change and verdict
_ID_END = 5


def compared_runs(comparisons: Comparisons, viewport: Viewport) -> Group:
    """Return the table of runs for a terminal, at most 120 columns wide."""
    comparisons = printable_copy(comparisons)
    width = min(viewport.width, _MAX_WIDTH)
    lines = [*_table(comparisons, viewport), *_values(comparisons), *_notes(comparisons, width)]
    for line in lines:
        line.no_wrap = True
        line.truncate(width)

    return Group(*lines)


def significance_word(comparison: Comparison) -> str:
    """Return whether the change of the mean step time is significant: yes, no or unknown."""
    return {"slower": "yes", "faster": "yes", "same": "no", "unknown": "unknown"}[comparison.outcome]


def compared_losses(comparisons: Comparisons) -> list[tuple[str, list[str]]]:
    """Return the losses that all runs have: name, and its last value in the baseline and in each run."""
    each = [{row.name: row for row in comparison.metrics} for comparison in comparisons.comparisons]
    names = [name for name in each[0] if is_loss(name) and all(name in rows for rows in each)]
    return [(name, [value_text(each[0][name].a), *(value_text(rows[name].b) for rows in each)]) for name in names]


def compared_params(comparisons: Comparisons) -> list[tuple[str, list[str]]]:
    """Return the parameters that differ in some run: name, and its values in the baseline and in each run."""
    each = [{row.name: row for row in comparison.params} for comparison in comparisons.comparisons]
    found = []
    for name in dict.fromkeys(name for rows in each for name in rows):
        base = next(rows[name].a for rows in each if name in rows)
        values = [base, *(rows[name].b if name in rows else base for rows in each)]
        found.append((name, list(map(value_text, values))))

    return found


def _table(comparisons: Comparisons, viewport: Viewport) -> Iterator[Text]:
    first = comparisons.comparisons[0]
    runs = (first.a, *(each.b for each in comparisons.comparisons))
    changes = judged_changes(comparisons.comparisons)
    wide = max(9, 2 + max(map(len, changes)))
    room = min(viewport.width, _MAX_WIDTH) - _COLUMNS - wide - max(len(str(run.verdict)) for run in runs)
    ids = [_middle_cut(run.id, room, viewport.glyphs.ellipsis) for run in runs]
    width = max(map(len, ids))
    yield Text(f"    {'run':<{width}}{'step':>9}{'change':>{wide}}  {'significant':<12}verdict", style="dim")
    yield Text(f" A  {ids[0]:<{width}}{ms_text(first.step_time.mean.a_ms):>9}{'':{wide + 14}}{first.a.verdict}")
    for number, (each, change) in enumerate(zip(comparisons.comparisons, changes, strict=True)):
        mean = each.step_time.mean
        line = Text(f" {run_letter(number + 1):<2} {ids[number + 1]:<{width}}{ms_text(mean.b_ms):>9}")
        line.append(f"{change:>{wide}}", style=OUTCOME_STYLES.get(each.outcome, ""))
        yield line.append(f"  {significance_word(each):<12}{each.b.verdict}")


def _middle_cut(text: str, room: int, ellipsis: str) -> str:
    """Return a run's id that fits: its start, and the end that tells runs of one name apart."""
    if len(text) <= room:
        return text

    end = min(_ID_END, max(room - len(ellipsis), 1))
    return text[: max(room - len(ellipsis) - end, 0)] + ellipsis + text[-end:]


def _values(comparisons: Comparisons) -> Iterator[Text]:
    """Yield losses and differing parameters, the runs' values side by side."""
    rows = [(f"last {name}", values) for name, values in compared_losses(comparisons)]
    rows += compared_params(comparisons)
    if rows:
        yield Text()
        marks = " | ".join(run_letter(number) for number in range(len(comparisons.comparisons) + 1))
        yield Text(f" {'value':<26}{marks}", style="dim")

    for name, values in rows[:_SHOWN]:
        yield Text(f" {name[:25]:<26}{' | '.join(values)}")

    if len(rows) > _SHOWN:
        yield Text(f" and {len(rows) - _SHOWN} others: --json has them", style="dim")


def _notes(comparisons: Comparisons, width: int) -> Iterator[Text]:
    for number, each in enumerate(comparisons.comparisons, 1):
        letter = run_letter(number)
        for note in (*each.obstacles, *each.remarks):
            yield from (Text(f" {line}", style="yellow") for line in wrapped(f"{letter}: {note}", width - 2))
