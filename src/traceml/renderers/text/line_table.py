"""Table of the lines of code in which the training threads were seen, by phase."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from traceml.formatting import percent_text, phase_label, place_text, plural
from traceml.renderers.views import RunView
from traceml.renderers.words import shown_calls, shown_lines
from traceml.runs.report.line_shares import PhaseLines, lines_by_phase

__all__ = ["line_table", "print_lines"]

_INDENT = 10


def print_lines(view: RunView, *, console: Console) -> None:
    """Print the table."""
    # A line in a file is never cut, so that it can be copied.
    width = console.width if console.is_terminal else None
    for line in line_table(view, width):
        console.print(line, soft_wrap=True)


def line_table(view: RunView, width: int | None = None) -> Iterator[Text]:
    """Yield the lines of the table: for each phase, its most frequent lines of the user's code.

    Args:
        width: columns; long paths are shortened in the middle.
    """
    phases = lines_by_phase(view.report)
    if not phases:
        yield Text("No lines were sampled: the run was too short, or `stack_interval` is 0.")
        return

    total = sum(phase.samples for phase in phases)
    room = 10_000 if width is None else width - _INDENT
    for phase in phases:
        share = percent_text(phase.samples / total)
        yield Text(f"{phase_label(phase.phase)}: {share} of {plural(total, 'sample')}", style="bold")
        yield from _rows(phase, room)


def _rows(phase: PhaseLines, room: int) -> Iterator[Text]:
    for each in shown_lines(phase):
        yield Text(f"  {percent_text(each.share):>6}  {place_text(each.place or 'libraries only', room)}")
        for share, library in shown_calls(each):
            yield Text(f"          {share}in {place_text(library, room - len(share) - 3)}", style="dim")
