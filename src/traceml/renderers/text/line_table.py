"""Table of the lines of code in which the training threads were seen, by phase."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from traceml.formatting import count_text, percent_text, phase_label
from traceml.renderers.views import RunView
from traceml.runs.report.report_types import LineSection

__all__ = ["line_table", "print_lines"]

_LINES_PER_PHASE = 8
_LEAST_SHARE = 0.01
_PHASE_OF = {"startup": "before the first step", "outside": "between steps"}


def print_lines(view: RunView, *, console: Console) -> None:
    """Print the table.

    Args:
        view: the run.
        console: the output.
    """
    for line in line_table(view):
        console.print(line, soft_wrap=True)


def line_table(view: RunView) -> Iterator[Text]:
    """Yield the lines of the table: for each phase, its most frequent lines of the user's code.

    Args:
        view: the run.
    """
    sampled = view.report.lines
    if not sampled:
        yield Text("No lines were sampled: the run was too short, or `stack_interval` is 0.")
        return

    phases: dict[str, list[LineSection]] = {}
    for each in sampled:
        phases.setdefault(each.phase, []).append(each)

    total = sum(each.samples for each in sampled)
    for phase, lines in sorted(phases.items(), key=lambda item: -_samples(item[1])):
        share = percent_text(_samples(lines) / total)
        title = _PHASE_OF.get(phase) or phase_label(phase)
        yield Text(f"{title}: {share} of {count_text(total)} samples", style="bold")
        yield from _rows(lines)


def _samples(lines: list[LineSection]) -> int:
    return sum(each.samples for each in lines)


def _rows(lines: list[LineSection]) -> Iterator[Text]:
    places: dict[str, list[LineSection]] = {}
    for each in lines:
        places.setdefault(_place(each), []).append(each)

    for place, of_place in list(places.items())[:_LINES_PER_PHASE]:
        share = sum(each.share for each in of_place)
        if share >= _LEAST_SHARE:
            yield Text(f"  {percent_text(share):>6}  {place}")
            if of_place[0].library:
                yield Text(f"          in {_library(of_place[0].library)}", style="dim")


def _place(each: LineSection) -> str:
    if each.file is None or each.line is None or each.function is None:
        return "libraries only"

    return f"{each.file}:{each.line} {each.function}"


def _library(text: str) -> str:
    """Return `torch/nn/functional.py:12 relu` of a library's function."""
    for folder in ("/site-packages/", "/dist-packages/"):
        text = text.rpartition(folder)[2]

    return text
