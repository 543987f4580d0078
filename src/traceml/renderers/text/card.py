"""The verdict card: what limits a run, in half a screen, the verdict first."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from rich.cells import cell_len, chop_cells
from rich.console import Console, Group
from rich.text import Text

from traceml.database.states import RunStatus
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind
from traceml.formatting import (
    bytes_text,
    count_text,
    duration_text,
    ms_text,
    part_words,
    percent_text,
    phase_label,
    place_text,
    plural,
    printable,
    rate_text,
    short_label,
)
from traceml.inspection.user_files import working_folder
from traceml.renderers.text.bars import bar, mark, phase_color
from traceml.renderers.text.viewport import Viewport, column_text, plain_console
from traceml.renderers.views import (
    SMALL_SHARE,
    RankRow,
    RunView,
    run_view,
    verdict_look,
    visible_parts,
    visible_ranks,
)
from traceml.renderers.wording import gain_sentence, tracker_text
from traceml.run_folder import PAGE_NAME, REPORT_NAME, report_command
from traceml.runs.report.report_types import Report, TimePart, TimeSection, TrackerSection, read_report

__all__ = ["card", "print_card", "print_report", "time_text", "verdict_style", "wrapped", "wrapped_lines"]

_STYLES = {"critical": "bold red", "warning": "bold yellow", "info": "bold green"}

_MAX_WIDTH = 100  # longer lines are harder to read
# Where a line may end: not between a number and its unit.
_BREAKS = re.compile(r"(?<!\d)\s+|\s+(?!(?:%|[num]?s|min|h|(?:[KMGT]i?)?B)(?!\w))")
_LABEL = 8  # columns of the labels at the left
_RANK_ROWS = 8
_PHASE_COLUMNS = 5
_CELL = 10
_RANK_WIDTH = 7 + 2 * _CELL  # rank, step and memory


def print_card(report_path: Path, *, file: IO[str]) -> None:
    """Print the card of a report on disk, with its path and the command that shows it again.

    A run that failed before its first step gets one line: its own output says why.

    Args:
        report_path: the run's `report.json`.
        file: the output; colors and characters depend on it.

    Raises:
        StoreError: the file is not a report.
    """
    report = read_report(report_path)
    console = plain_console(file)
    if (line := run_view(report).ended_before_training) is None:
        print_report(report, report_path.parent, console=console)
    else:
        again = f"More: {report_command(_name_of(report_path.parent.resolve()))}"
        console.print(Text(f"traceml: {line} {again}"), soft_wrap=True)


def print_report(report: Report, run_dir: Path, *, console: Console) -> None:
    """Print the card of a report, with its path if it is written, and the command that shows it again."""
    folder = run_dir.resolve()
    path, page = folder / REPORT_NAME, folder / PAGE_NAME
    shown = card(
        run_view(report),
        Viewport.of(console),
        report_path=str(path) if path.exists() else "",
        page_path=str(page) if page.exists() else "",
        again=report_command(_name_of(folder)),
    )
    # Lines are fitted already; a path or a command is never cut, so that it can be copied.
    console.print(shown, soft_wrap=True)


def card(view: RunView, viewport: Viewport, *, report_path: str = "", page_path: str = "", again: str = "") -> Group:
    """Return the card of a run.

    Args:
        viewport: of the output; at most 100 columns are used.
        page_path: the report with charts, shown there too.
        again: the command that shows the card again.
    """
    width = min(viewport.width, _MAX_WIDTH)
    measured = [
        *_labeled("Time", time_text(view.report.time, width - _LABEL - 1), width),
        *([_steps_line(view, width, viewport)] if view.report.steps.count else []),
        *_data_lines(view, width, viewport),
        *_labeled("Basis", view.sample or "", width),
        *_labeled("Clock", view.untimed or "", width),
        *_phase_lines(view, width, viewport),
        *_rank_lines(view, width, viewport),
    ]
    lines = [
        _top(view, width, viewport),
        *_verdict_lines(view, width),
        *([Text(), *measured] if measured else []),
        *([Text()] if len(view.ranks) < 2 else []),  # the card of two ranks fits on 24 rows
        *_closing_lines(view, width),
    ]
    fitted = [viewport.cut(line, _MAX_WIDTH) for line in lines]
    copied = (("Report", report_path), ("Charts", page_path), ("Command", again))
    return Group(*fitted, *(line for label, text in copied for line in _copied(label, text)))


def _name_of(run_dir: Path) -> str:
    """Return the run for a command line: its id in the default folder of runs, else its path."""
    default = Path(working_folder() or os.sep, "traceml_runs").resolve()
    return run_dir.name if run_dir.parent == default else str(run_dir)


def _top(view: RunView, width: int, viewport: Viewport) -> Text:
    run, verdict, rule = view.report.run, view.report.verdict, viewport.glyphs.rule
    facts = [plural(run.world_size, "rank")]
    if len(run.hosts) > 1:
        facts.append(f"{len(run.hosts)} hosts")

    if view.report.steps.count:
        facts.append(plural(view.report.steps.count, "step"))

    left = Text(f"{rule} ").append("traceml", style="bold").append(f" {rule} ")
    left.append(verdict.kind, style=verdict_style(verdict)).append(" ")
    described = (f"{', '.join(facts)}, {view.outcome}", f"{facts[0]}, {view.outcome}", view.outcome, run.state)
    texts = [f" {text} {rule}" for text in described]
    right = next((text for text in texts if left.cell_len + 1 + len(text) <= width), rule)
    fill = max(width - left.cell_len - len(right), 1)
    return left.append(rule * fill, style="dim").append(right)


def verdict_style(verdict: Finding) -> str:
    """Return the style of a verdict's kind and headline."""
    return _STYLES.get(verdict_look(verdict.kind, verdict.severity), "bold")


def _verdict_lines(view: RunView, width: int) -> Iterator[Text]:
    verdict = view.report.verdict
    yield from wrapped_lines(verdict.headline, width, verdict_style(verdict), indent=1)
    yield from wrapped_lines(verdict.summary, width, indent=1)
    yield from _labeled("Next", verdict.next, width, style="bold")
    yield from _labeled("Gain", gain_sentence(verdict) or "", width)

    for note in view.remarks:
        yield from wrapped_lines(note, width, "yellow", indent=1)


def wrapped(text: str, width: int) -> list[str]:
    """Return the text in lines of at most `width` columns, broken between words; a longer word has a line of its own.

    A number stays with its unit. Chinese and Japanese have no spaces between words: they are broken anywhere.

    Of a path that is longer the middle is left out: its file and line always stay.
    """
    lines: list[str] = []
    for whole in _BREAKS.split(text.strip()) if text.strip() else ():
        word = place_text(whole, width) if "://" not in whole else whole
        if lines and cell_len(lines[-1]) + 1 + cell_len(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines += [word] if word.isascii() else chop_cells(word, width)

    return lines


def wrapped_lines(text: str, width: int, style: str = "", *, indent: int = 0) -> Iterator[Text]:
    """Return a text in lines of at most `width` columns, broken as by `wrapped`."""
    return (Text(" " * indent + line, style=style) for line in wrapped(text, width - indent))


def _labeled(label: str, text: str, width: int, *, style: str = "") -> Iterator[Text]:
    """Yield ` Label  text`, wrapped under the text; nothing for an empty text."""
    for number, line in enumerate(wrapped(text, width - _LABEL - 1)):
        yield Text(" ").append((label if number == 0 else "").ljust(_LABEL), style="dim").append(line, style=style)


def _copied(label: str, text: str) -> Iterator[Text]:
    """Yield a line to be copied from the screen: never wrapped, never cut."""
    if text:
        yield Text(" ", no_wrap=True).append(label.ljust(_LABEL), style="dim").append(printable(text), style="cyan")


def _steps_line(view: RunView, width: int, viewport: Viewport) -> Text:
    """Return speed and step times; those that find no room are left out, the 95th percentile first."""
    line = Text(" ").append("Steps".ljust(_LABEL), style="dim")
    line.append(f"{rate_text(view.steps_per_second)} steps/s", style="bold")
    times = {"mean": ms_text(view.report.steps.mean_ms), **dict(view.percentiles)}
    for left_out in ((), ("p95",), ("p95", "p50"), ("p95", "p50", "p99")):
        shown = "  ".join(f"{name} {time}" for name, time in times.items() if name not in left_out)
        if line.cell_len + 5 + len(shown) <= width:
            break

    return line.append(f"  {viewport.glyphs.dot}  {shown}")


def _data_lines(view: RunView, width: int, viewport: Viewport) -> Iterator[Text]:
    """Yield what the whole job trains on per second, where it is known."""
    parts = [f"{number} {unit}/s" for unit, number in view.data_rates]
    if parts:
        parts += [view.shared_data] if view.shared_data else []
        line = Text(" ").append("Data".ljust(_LABEL), style="dim").append(f"  {viewport.glyphs.dot}  ".join(parts))
        yield from [line] if line.cell_len <= width else _labeled("Data", ", ".join(parts), width)


def time_text(time: TimeSection | None, room: int = 200) -> str:
    """Return the wall time of a run and its largest parts; nothing if they are not known."""
    parts = visible_parts(time)
    if time is None or not parts:
        return ""

    whole = f"{duration_text(time.wall_s)}: "
    return f"{whole}{_parts_text(parts, room - len(whole))}"


def _parts_text(parts: Sequence[TimePart], room: int) -> str:
    """Return the parts of the run's time in one line: the steps, and the largest that find room; the rest is summed."""
    shown: list[TimePart] = []
    for part in sorted(parts, key=lambda part: (part.part != "steps", -part.share)):
        if not shown or len(_joined([*shown, part], parts)) <= room:
            shown.append(part)

    return _joined(shown, parts)


def _joined(shown: Sequence[TimePart], parts: Sequence[TimePart]) -> str:
    texts = [f"{part_words(part.part)} {percent_text(part.share)}" for part in parts if part in shown]
    if len(shown) < len(parts):
        texts.append(f"rest {percent_text(sum(part.share for part in parts if part not in shown))}")

    return ", ".join(texts)


def _phase_lines(view: RunView, width: int, viewport: Viewport) -> Iterator[Text]:
    shown = view.shown_phases
    if not shown:
        return

    name = max(10, *(cell_len(phase_label(phase.phase)) for phase in shown))
    name = min(name, 24, max(width - 29, 10))  # a bar and the mean find room on a narrow screen
    room = width - name - 21
    blamed = view.report.verdict.phase
    for phase in shown:
        label = column_text(phase_label(phase.phase), name)
        line = Text(" ").append(label, style="bold" if phase.phase == blamed else "")
        line.append("  ").append(bar(phase.share, room, viewport, style=phase_color(phase.phase)))
        yield line.append(f" {percent_text(phase.share):>6} {ms_text(phase.mean_ms):>9}")


def _rank_lines(view: RunView, width: int, viewport: Viewport) -> Iterator[Text]:
    if len(view.ranks) < 2:
        return

    columns = _column_phases(view, max(min((width - _RANK_WIDTH) // _CELL, _PHASE_COLUMNS), 1))
    heading = "".join(column_text(_column_label(phase), _CELL, right=True) for phase in columns)
    yield Text(f"   rank{'step':>{_CELL}}{heading}{'memory':>{_CELL}}", style="dim")
    rows = visible_ranks(view.ranks, _RANK_ROWS)
    for row in rows:
        yield _rank_line(row, columns, viewport)

    if hidden := len(view.ranks) - len(rows):
        yield Text(
            f"   {viewport.glyphs.ellipsis} {plural(hidden, 'more rank')} in the report",
            style="dim",
        )


def _column_phases(view: RunView, most: int) -> list[str]:
    """Return the phases that get a column, in the report's order: the verdict's own, and the largest on any rank."""
    largest: dict[str, float] = {}
    for row in view.ranks:
        for phase, share in row.shares:
            largest[phase] = max(share, largest.get(phase, 0.0))

    order = sorted(largest, key=lambda phase: (phase != view.report.verdict.phase, -largest[phase]))
    chosen = {phase for phase in order[:most] if largest[phase] >= SMALL_SHARE}
    return [phase for phase in largest if phase in chosen]


def _column_label(phase: str) -> str:
    label = phase_label(phase)
    return label if cell_len(label) < _CELL else column_text(short_label(phase), _CELL - 1).rstrip()


def _rank_line(row: RankRow, columns: Sequence[str], viewport: Viewport) -> Text:
    line = Text().append(f" {mark(row, viewport)} {row.rank:>4}", style="bold red" if row.slowest or row.end else "")
    return line.append("".join(f"{cell:>{_CELL}}" for cell in (*row.times(columns), row.memory)))


def _closing_lines(view: RunView, width: int) -> Iterator[Text]:
    # A lost rank of the verdict is shown at the top already.
    shown = view.report.verdict.ranks if view.report.verdict.kind is Kind.RANK_LOST else ()
    ended = [row for row in view.ranks if row.end and row.rank not in shown]
    for row in ended[:4]:
        where = f" on {row.host}" if row.host else ""
        yield from _labeled("Ended", f"rank {row.rank}{where}: {row.end}", width)

    if len(ended) > 4:
        yield from _labeled("", f"and {plural(len(ended) - 4, 'more rank')}", width)

    if view.absent:
        yield from _labeled("Missing", view.absent, width, style="yellow")

    for other in view.others[:2]:
        yield from _labeled("Also", f"{other.kind}: {other.headline}", width)

    if memory := _memory_text(view):
        yield from _labeled("Memory", memory, width)

    for number, tracker in enumerate(view.report.trackers):
        style = "yellow" if tracker.needs_attention else ""
        yield from _labeled("" if number else "Sent", tracker_text(tracker), width, style=style)

    if view.report.run.state != RunStatus.RUNNING:
        yield from _delivery_lines(view.report.trackers, width)

    yield from _labeled("Tracing", _telemetry_text(view), width)


def _delivery_lines(trackers: Sequence[TrackerSection], width: int) -> Iterator[Text]:
    """Yield what happens to the rows that trackers lack."""
    lacking = [tracker for tracker in trackers if tracker.pending]
    if not all(tracker.is_delivering for tracker in lacking):
        broken = any(tracker.is_broken for tracker in lacking)
        when = " once that is fixed; with --backend NAME, to another tracker" if broken else ""
        yield from _labeled("", f"traceml sync delivers the pending rows{when}", width, style="bold")
    elif lacking:
        yield from _labeled("", "delivery continues; if it is cut off, traceml sync delivers the rest", width)


def _memory_text(view: RunView) -> str:
    """Return the largest peaks of resident and of device memory, with their ranks."""
    where = " (rank {})" if len(view.ranks) > 1 else ""
    return ", ".join(f"{name} {bytes_text(size)}{where.format(rank)}" for name, size, rank in view.memory_peaks)


def _telemetry_text(view: RunView) -> str:
    telemetry = view.report.telemetry
    lost = telemetry.rows_lost
    rows = f"{plural(telemetry.rows_stored, 'row')} stored, "
    rows += "losses unknown" if lost is None else f"{count_text(lost)} lost" if lost else "none lost"
    rows += f", {count_text(telemetry.rows_thinned)} old rows removed" if telemetry.rows_thinned else ""
    failed = "".join(f"; errors in {package}: {count}" for package, count in sorted(telemetry.failures.items()))
    return f"{rows}; overhead {view.overhead}{failed}"
