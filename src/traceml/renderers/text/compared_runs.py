"""Several runs, each compared with the same baseline: their letters, and a table for terminals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich.cells import cell_len
from rich.console import Group
from rich.text import Text

from traceml.formatting import ms_text, value_text
from traceml.renderers.printable import printable_copy
from traceml.renderers.text.card import wrapped_lines
from traceml.renderers.text.comparison import step_changes
from traceml.renderers.text.viewport import Viewport, column_text
from traceml.runs.comparison.comparison_types import Comparison, Comparisons, RunSide, run_letter
from traceml.runs.rows.metrics import is_loss

__all__ = ["OUTCOME_STYLES", "compared_losses", "compared_params", "compared_rows", "compared_runs"]

_MAX_WIDTH = 120
OUTCOME_STYLES = {"slower": "bold red", "faster": "bold green"}
_SURE = {"slower": "yes", "faster": "yes", "same": "no", "unknown": "unknown"}
_SHOWN = 12
_COLUMNS = 27  # of the table without run, change and verdict
_ID_END = 5


class ComparedRow(NamedTuple):
    """A row of the table of runs: the baseline, or one that is compared with it."""

    letter: str
    side: RunSide
    step: str
    change: str = ""
    significant: str = ""
    outcome: str = ""
    notes: Sequence[str] = ()


def compared_runs(comparisons: Comparisons, viewport: Viewport) -> Group:
    """Return the table of runs for a terminal, at most 120 columns wide."""
    comparisons = printable_copy(comparisons)
    rows = compared_rows(comparisons.comparisons)
    notes = _notes(rows, min(viewport.width, _MAX_WIDTH))
    lines = [*_table(rows, viewport), *_values(comparisons.comparisons), *notes]
    return Group(*(viewport.cut(line, _MAX_WIDTH) for line in lines))


def compared_rows(comparisons: Sequence[Comparison]) -> list[ComparedRow]:
    """Return a row for each run; a change that is not of the mean step beside it says so."""
    first = comparisons[0]
    rows = [ComparedRow("A", first.a, ms_text(first.step_time.mean.a_ms))]
    changes = step_changes(each.judged for each in comparisons)
    for number, (each, (change, _)) in enumerate(zip(comparisons, changes, strict=True), 1):
        rows.append(
            ComparedRow(
                run_letter(number),
                each.b,
                ms_text(each.step_time.mean.b_ms),
                f"{change}/sample" if each.sample_time else change,
                _SURE[each.outcome],
                each.outcome,
                each.notes,
            )
        )

    return rows


def compared_losses(comparisons: Sequence[Comparison]) -> list[tuple[str, list[str]]]:
    """Return the losses that all runs have: name, and its last value in the baseline and in each run."""
    each = [{row.name: row for row in comparison.metrics} for comparison in comparisons]
    names = [name for name in each[0] if is_loss(name) and all(name in rows for rows in each)]
    return [(name, [value_text(each[0][name].a), *(value_text(rows[name].b) for rows in each)]) for name in names]


def compared_params(comparisons: Sequence[Comparison]) -> list[tuple[str, list[str]]]:
    """Return the parameters that differ in some run: name, and its values in the baseline and in each run."""
    each = [{row.name: row for row in comparison.params} for comparison in comparisons]
    found = []
    for name in dict.fromkeys(name for rows in each for name in rows):
        base = next(rows[name].a for rows in each if name in rows)
        values = [base, *(rows[name].b if name in rows else base for rows in each)]
        found.append((name, list(map(value_text, values))))

    return found


def _table(rows: Sequence[ComparedRow], viewport: Viewport) -> Iterator[Text]:
    wide = max(9, 2 + max(len(row.change) for row in rows))
    room = min(viewport.width, _MAX_WIDTH) - _COLUMNS - wide - max(len(str(row.side.verdict)) for row in rows)
    ids = [_middle_cut(row.side.id, room, viewport.glyphs.ellipsis) for row in rows]
    width = max(map(cell_len, ids))
    yield Text(f"    {'run':<{width}}{'step':>9}{'change':>{wide}}  {'significant':<12}verdict", style="dim")
    for row, run_id in zip(rows, ids, strict=True):
        line = Text(f" {row.letter:<2} {column_text(run_id, width)}{row.step:>9}")
        line.append(f"{row.change:>{wide}}", style=OUTCOME_STYLES.get(row.outcome, ""))
        yield line.append(f"  {row.significant:<12}{row.side.verdict}")


def _middle_cut(text: str, room: int, ellipsis: str) -> str:
    """Return a run's id that fits: its start, and the end that tells runs of one name apart."""
    if cell_len(text) <= room:
        return text

    end = min(_ID_END, max(room - len(ellipsis), 1))
    return column_text(text, max(room - len(ellipsis) - end, 0)) + ellipsis + text[-end:]


def _values(comparisons: Sequence[Comparison]) -> Iterator[Text]:
    """Yield losses and differing parameters, the runs' values side by side."""
    rows = [(f"last {name}", values) for name, values in compared_losses(comparisons)]
    rows += compared_params(comparisons)
    if rows:
        yield Text()
        marks = " | ".join(run_letter(number) for number in range(len(comparisons) + 1))
        yield Text(f" {'value':<26}{marks}", style="dim")

    for name, values in rows[:_SHOWN]:
        yield Text(f" {name[:25]:<26}{' | '.join(values)}")

    if len(rows) > _SHOWN:
        yield Text(f" and {len(rows) - _SHOWN} others: --json has them", style="dim")


def _notes(rows: Sequence[ComparedRow], width: int) -> Iterator[Text]:
    for row in rows:
        for note in row.notes:
            yield from wrapped_lines(f"{row.letter}: {note}", width - 1, "yellow", indent=1)
