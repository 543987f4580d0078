"""The live view: a running job in a panel of fixed height, so that the screen does not jump."""

from __future__ import annotations

from collections.abc import Iterator

from rich.text import Text

from traceml.formatting import (
    bytes_text,
    count_text,
    duration_text,
    ms_text,
    percent_text,
    plural,
    rate_text,
    short_label,
)
from traceml.renderers.text.bars import mark, phase_color, sparkline, stacked, stacked_parts
from traceml.renderers.text.card import verdict_style, wrapped
from traceml.renderers.text.viewport import Viewport, column_text
from traceml.renderers.views import RankRow, RunView, visible_ranks
from traceml.renderers.wording import tracker_text

__all__ = [
    "MIN_HEIGHT",
    "MIN_WIDTH",
    "live_lines",
    "note_text",
    "panel_height",
    "rule_line",
    "speed_line",
    "verdict_line",
]

_MAX_RANK_ROWS = 16
MIN_WIDTH = 60
_NEXT_ROWS = 2
_FRAME_ROWS = 5 + _NEXT_ROWS  # rule, speed, heading, verdict, next, tracing
_TIME_ROWS = 1  # left out on the smallest screen
_LABEL = 9
_MIN_TREND, _MAX_TREND = 6, 40
MIN_HEIGHT = _FRAME_ROWS + 1
_RANK_CELLS = 8 + 11 + 11  # mark and rank, step time, memory


def panel_height(ranks: int, rows: int) -> int:
    """Return the height of the panel for a number of ranks, at most `rows`."""
    wanted = min(ranks, _MAX_RANK_ROWS) + (1 if ranks > _MAX_RANK_ROWS else 0)
    return max(min(_FRAME_ROWS + _TIME_ROWS + wanted, rows), MIN_HEIGHT)


def live_lines(now: RunView, viewport: Viewport) -> list[Text]:
    """Return the panel's lines: `panel_height` of the run's ranks and `viewport.height`, each at most its width."""
    ranks = max(len(now.ranks), now.report.run.world_size)
    height = panel_height(ranks, viewport.height)
    time = [_time_line(now, viewport)] if height > MIN_HEIGHT else []
    lines = [
        rule_line(now, viewport),
        speed_line(now, viewport),
        _heading(now, viewport),
        *_rank_lines(now, height - _FRAME_ROWS - len(time), viewport),
        *time,
        verdict_line(now),
        *_next(now, viewport),
        _tracing(now, viewport),
    ]
    return [viewport.cut(line) for line in lines]


def rule_line(now: RunView, viewport: Viewport) -> Text:
    """Return the top line: name of the run, number of ranks, state."""
    rule, run = viewport.glyphs.rule, now.report.run
    left = Text(f"{rule} ", style="dim").append("traceml", style="bold not dim").append(f" {rule} ")
    name = run.name if len(run.name) <= 28 else run.name[:27] + viewport.glyphs.ellipsis[:1]
    left.append(name, style="not dim").append(" ")
    attempt = f", attempt {run.attempt + 1}" if run.attempt else ""
    hosts = f" on {len(run.hosts)} hosts" if len(run.hosts) > 1 else ""
    ranks = f"{plural(run.world_size, 'rank')}{hosts}{attempt}"
    right = f" {ranks}, {run.state} {duration_text(run.duration_s)} {rule}"
    return left.append(rule * max(viewport.width - left.cell_len - len(right), 1)).append(right)


def speed_line(now: RunView, viewport: Viewport) -> Text:
    """Return the line on speed, with its trend."""
    head = f" {rate_text(now.steps_per_second):>6} steps/s "
    cells = _speed_cells(now, viewport.width - len(head) - _MIN_TREND)
    rest = sum(map(len, cells))
    line = Text(head, style="bold")
    trend = max(min(viewport.width - len(head) - rest, _MAX_TREND), _MIN_TREND)
    line.append(sparkline(now.rates, trend, viewport), style="cyan not bold")
    return line.append("".join(cells), style="not bold")


def _speed_cells(now: RunView, room: int) -> list[str]:
    """Return the figures next to the speed that fit in the space."""
    steps = now.report.steps
    data = [f"  {number:>7} {unit}/s" for unit, number in now.data_rates[:1]]
    step, p99 = f"  step {ms_text(steps.mean_ms):>7}", f"  p99 {ms_text(steps.p99_ms):>7}"
    count = f"  {plural(steps.count, 'step'):>12}"
    for cells in ([step, p99, *data, count], [step, *data, count], [step, count]):
        if sum(map(len, cells)) <= room:
            return cells

    return [step]


def _heading(now: RunView, viewport: Viewport) -> Text:
    """Return the column heads, with the legend of the phases in the middle."""
    line = Text(f"   rank{'step':>11} ", style="dim")
    room = viewport.width - _RANK_CELLS - 2
    legend = Text()
    for row in now.shown_phases:
        label = short_label(row.phase)
        if legend.cell_len + len(label) + 2 > room:
            continue

        legend.append(" ")
        if viewport.color:
            legend.append(viewport.glyphs.bar, style=phase_color(row.phase))

        legend.append(label)

    legend.append(" " * max(room - legend.cell_len, 0))
    return line.append(legend).append(f"{'memory':>11}")


def _rank_lines(now: RunView, rows: int, viewport: Viewport) -> Iterator[Text]:
    """Yield exactly `rows` lines: ranks, a line that counts the rest, blanks for ranks that have not connected."""
    shown = visible_ranks(now.ranks, rows if len(now.ranks) <= rows else max(rows - 1, 1))
    drawn = 0
    for row in shown[:rows]:
        yield _rank_line(row, viewport)
        drawn += 1

    hidden = len(now.ranks) - len(shown)
    if hidden and drawn < rows:
        yield _hidden_line(now, hidden, viewport)
        drawn += 1
    elif not now.ranks and drawn < rows:
        yield Text("   waiting for the first steps", style="dim")
        drawn += 1

    for _ in range(rows - drawn):
        yield Text()


def _rank_line(row: RankRow, viewport: Viewport) -> Text:
    style = "bold red" if row.slowest or row.end else ""
    line = Text(f" {mark(row, viewport)} {row.rank:>4}", style=style)
    line.append(f"{ms_text(row.step_ms) if row.phases else '-':>11}  ", style="default not bold" if style else "")
    room = viewport.width - _RANK_CELLS - 2
    line.append(column_text(row.end, room) if row.end else stacked(row.shares, room, viewport))
    return line.append(f"{bytes_text(row.cuda_bytes or row.rss_bytes):>11}", style="default not bold" if style else "")


def _hidden_line(now: RunView, hidden: int, viewport: Viewport) -> Text:
    times = [row.step_ms for row in now.ranks if row.phases]
    between = f", steps of {ms_text(min(times))} to {ms_text(max(times))}" if times else ""
    return Text(f"   {viewport.glyphs.ellipsis} {count_text(hidden)} more{between}", style="dim")


def _time_line(now: RunView, viewport: Viewport) -> Text:
    """Return the line on where the run's time went so far."""
    line = Text().append(" time".ljust(_LABEL), style="dim")
    if not now.time_parts:
        return line

    shares = [(part.part, part.share) for part in now.time_parts]
    in_steps = sum(share for part, share in shares if part == "steps")
    label = f" {percent_text(in_steps):>6} in steps"
    line.append(stacked_parts(shares, max(viewport.width - _LABEL - len(label), 0), viewport))
    return line.append(label)


def verdict_line(now: RunView) -> Text:
    """Return the line of the verdict so far."""
    verdict = now.report.verdict
    return Text(" so far  ", style="dim").append(verdict.headline, style=f"{verdict_style(verdict)} not dim")


def note_text(now: RunView) -> Text:
    """Return what there is to say about the whole run, above all its restarts; empty if there is nothing."""
    return Text("; ".join(now.notes), style="yellow")


def _next(now: RunView, viewport: Viewport) -> Iterator[Text]:
    """Yield the advice; in a run with a note, the last row is for the note."""
    rows = _NEXT_ROWS - bool(now.notes)
    lines = wrapped(now.report.verdict.next, viewport.width - _LABEL)
    for number in range(rows):
        text = lines[number] if number < len(lines) else ""
        if number == rows - 1 and len(lines) > rows:
            text = " ".join(lines[number:])  # cut at the end of the screen

        yield Text().append((" next" if number == 0 else "").ljust(_LABEL), style="dim").append(text)

    if now.notes:
        yield Text().append(" note".ljust(_LABEL), style="dim").append(note_text(now))


def _tracing(now: RunView, viewport: Viewport) -> Text:
    telemetry = now.report.telemetry
    lost = telemetry.rows_lost
    line = Text(" tracing ", style="dim")
    is_unknown = lost is None and telemetry.rows_stored is not None  # else there is no report yet
    words = "losses unknown" if is_unknown else f"{plural(lost, 'row')} lost" if lost else "no row lost"
    line.append(words, style="bold red not dim" if lost or is_unknown else "")
    line.append(f" of {count_text(telemetry.rows_stored)}")
    line.append(f" {viewport.glyphs.dot} overhead {now.overhead}")
    for tracker in now.report.trackers:
        line.append(f" {viewport.glyphs.dot} ").append(
            tracker_text(tracker), style="bold yellow not dim" if tracker.needs_attention else ""
        )

    return line
