"""Tables of profiles: the longest operators, what a profile cost, and the sampled lines of code by phase."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.console import Console
from rich.text import Text

from traceml.formatting import (
    factor_text,
    line_text,
    ms_text,
    percent_text,
    phase_label,
    place_text,
    plural,
    printable,
    ranks_text,
)
from traceml.renderers.views import RunView
from traceml.renderers.wording import NO_LINES, shown_calls, shown_lines
from traceml.runs.export.top_operators import OperatorTable, OperatorTotal
from traceml.runs.report.line_shares import PhaseLines, lines_by_phase, lines_of_workers

__all__ = ["line_table", "operator_lines", "print_lines", "slowdown_line"]

_SHOWN = 15
_NAME_WIDTH = 44
_INDENT = 10


def operator_lines(table: OperatorTable) -> list[str]:
    """Return the 15 longest operators, one per line, with times per step."""
    steps, has_device = max(table.steps, 1), table.has_device
    device_head = f"{'device':>10}" if has_device else ""
    lines = [f"{'per step':>8}{'':>3}{'CPU':>9}{device_head}{'calls':>8}  operator"]
    order = table.ordered()
    whole = sum(total.device_ns if has_device else max(total.self_ns, 0) for _, total in order) or 1
    for name, total in order[:_SHOWN]:
        share = (total.device_ns if has_device else max(total.self_ns, 0)) / whole
        device = f"{ms_text(total.device_ns / steps / 1e6):>10}" if has_device else ""
        cpu = ms_text(max(total.self_ns, 0) / steps / 1e6)
        calls = f"{total.calls / steps:.0f}" if total.calls else ""
        lines.append(printable(f"{percent_text(share):>8}{cpu:>12}{device}{calls:>8}  {_name(name, total)}"))

    return lines


def slowdown_line(slowdown: Mapping[int, float | None]) -> str:
    """Return how much longer the profiled steps took; empty if unknown.

    Args:
        slowdown: by rank, profiled step time / step time before.
    """
    known = {rank: value for rank, value in slowdown.items() if value is not None}
    if not known:
        return ""

    worst = max(known, key=lambda rank: known[rank])
    if known[worst] < 1.05:
        return "Steps took as long as before while profiled."

    where = f" (on {ranks_text([worst])})" if len(known) > 1 else ""
    return f"Steps took {factor_text(known[worst])} as long while profiled{where}; the diagnosis leaves them out."


def _name(name: str, total: OperatorTotal) -> str:
    if total.place is None:
        return name

    return f"{name:<{_NAME_WIDTH}} {line_text(*total.place)}"


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
        yield Text(NO_LINES)
        return

    total = sum(phase.samples for phase in phases)
    room = 10_000 if width is None else width - _INDENT
    for phase in phases:
        share = percent_text(phase.samples / total)
        yield Text(f"{phase_label(phase.phase)}: {share} of {plural(total, 'sample')}", style="bold")
        yield from _rows(phase, room)

    for phase in lines_of_workers(view.report):
        yield Text(f"{phase_label(phase.phase)}: {plural(phase.samples, 'sample')}", style="bold")
        yield from _rows(phase, room)


def _rows(phase: PhaseLines, room: int) -> Iterator[Text]:
    for each in shown_lines(phase):
        yield Text(f"  {percent_text(each.share):>6}  {place_text(each.place or 'libraries only', room)}")
        for share, library in shown_calls(each):
            yield Text(f"          {share}in {place_text(library, room - len(share) - 3)}", style="dim")
