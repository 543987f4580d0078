"""Tables of the HTML report: phases, ranks, stacks, memory, and facts to repeat the run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from traceml.formatting import (
    bytes_text,
    capitalized,
    count_text,
    ms_text,
    percent_text,
    phase_label,
    plural,
)
from traceml.renderers.about_text import about_facts
from traceml.renderers.charts.figures import DRAWN_METRICS
from traceml.renderers.charts.palette import BY_CSS
from traceml.renderers.charts.run_charts import metric_count
from traceml.renderers.charts.svg_marks import escaped
from traceml.renderers.views import RankRow, RunView, visible_ranks
from traceml.renderers.wording import phase_heading, shown_calls, shown_lines, tracker_text
from traceml.runs.about import About
from traceml.runs.report.line_shares import LineShare, all_lines
from traceml.runs.rows.series import RunSeries

__all__ = ["line_list", "memory_facts", "phase_table", "rank_table", "run_facts", "stacks"]

_RANKS = 32
_STACKS = 4
_LONGEST_VALUE = 400


def phase_table(view: RunView) -> Iterator[str]:
    """Yield the phases of a mean step."""
    if not view.report.phases:
        return

    colors = BY_CSS.of_phases(phase.phase for phase in view.report.phases)
    yield '<div class="card scroll"><table><tr><th>phase</th><th>mean per step</th><th>share of step</th></tr>'
    for phase in view.report.phases:
        name = f'<i style="--c:{colors[phase.phase]}"></i>{escaped(phase_label(phase.phase))}'
        marked = ' class="marked"' if phase.phase == view.report.verdict.phase else ""
        yield f"<tr{marked}><td>{name}</td><td>{ms_text(phase.mean_ms)}</td><td>{percent_text(phase.share)}</td></tr>"

    yield "</table></div>"


def rank_table(view: RunView) -> Iterator[str]:
    """Yield a row per rank; of very many, those that ended badly, the slowest and some others."""
    rows = visible_ranks(view.ranks, _RANKS)
    if not rows:
        return

    phases = [phase.phase for phase in view.shown_phases]
    titles = "".join(f"<th>{escaped(phase_label(phase))}</th>" for phase in phases)
    yield '<div class="card scroll"><table><tr><th>rank</th><th class="words">host</th><th>steps</th><th>step</th>'
    yield f'{titles}<th>resident</th><th>device</th><th class="words">state</th></tr>'
    yield from (_rank(row, phases) for row in rows)
    yield "</table></div>"
    if hidden := len(view.ranks) - len(rows):
        yield f'<p class="more">{plural(hidden, "more rank")} in report.json.</p>'

    if view.absent:
        yield f'<p class="more">{escaped(capitalized(view.absent))}.</p>'


def _rank(row: RankRow, phases: Sequence[str]) -> str:
    cells = [*row.times(phases), bytes_text(row.rss_bytes), bytes_text(row.cuda_bytes)]
    marked = ' class="marked"' if row.slowest or row.end else ""
    state = row.end or ("slowest" if row.slowest else row.state)
    numbers = "".join(f"<td>{escaped(cell)}</td>" for cell in cells)
    return (
        f'<tr{marked}><td>{row.rank}</td><td class="words">{escaped(row.host)}</td><td>{count_text(row.steps)}</td>'
        f'{numbers}<td class="words">{escaped(state)}</td></tr>'
    )


def line_list(view: RunView) -> Iterator[str]:
    """Yield the lines of the user's code by phase, each with a bar as wide as its share of the phase."""
    phases = all_lines(view.report)
    colors = BY_CSS.of_phases(phase.phase for phase in phases)
    for phase in phases:
        head = escaped(phase_heading(phase))
        rows = "".join(map(_line, shown_lines(phase)))
        yield f'<div class="card lines" style="--c:{colors[phase.phase]}"><h3><i></i>{head}</h3>{rows}</div>'


def _line(each: LineShare) -> str:
    called = "".join(f"<small>{share}in {escaped(library)}</small>" for share, library in shown_calls(each))
    place = escaped(each.place or "libraries only")
    width = f"--w:{100 * each.share:.1f}%"
    return f'<p style="{width}"><b>{percent_text(each.share)}</b><span>{place}{called}</span></p>'


def stacks(view: RunView) -> Iterator[str]:
    """Yield the stacks of the first ranks that ended badly, where they are known."""
    ended = [rank for rank in view.report.ranks if rank.exit.stack]
    for rank in ended[:_STACKS]:
        yield f'<div class="card"><h3>rank {rank.rank}</h3><pre>{escaped(rank.exit.stack_text)}</pre></div>'


def memory_facts(view: RunView, series: RunSeries) -> Iterator[str]:
    """Yield peaks of memory, state of trackers, rows stored and lost."""
    undrawn = metric_count(series) - DRAWN_METRICS
    rows = [
        *((name, f"{bytes_text(size)} (rank {rank})") for name, size, rank in view.memory_peaks),
        *((f"tracker {tracker.backend}", tracker_text(tracker)) for tracker in view.report.trackers),
        ("rows stored", count_text(view.report.telemetry.rows_stored)),
        ("rows lost", count_text(view.report.telemetry.rows_lost)),
        ("metrics not drawn", count_text(undrawn) if undrawn > 0 else None),
    ]
    yield from _facts(rows)


def run_facts(view: RunView, about: About) -> Iterator[str]:
    """Yield command, source, versions, machine, model."""
    params = view.report.setup.params or about.params
    parameters = ", ".join(f"{name} {value}" for name, value in params.items())
    yield from _facts([*about_facts(view, about), ("parameters", parameters)])


def _facts(rows: Iterable[tuple[str, Any]]) -> Iterator[str]:
    shown = [(name, str(value)) for name, value in rows if value]
    if shown:
        cells = (f"<tr><td>{escaped(name)}</td><td>{escaped(_shortened(value))}</td></tr>" for name, value in shown)
        yield f'<div class="card scroll"><table class="facts">{"".join(cells)}</table></div>'


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]} ..."
