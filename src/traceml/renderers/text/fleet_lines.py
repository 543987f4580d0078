"""The fleet for a terminal: a run next to its history, and slow hosts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from rich.text import Text

from traceml.formatting import count_text, ms_text, phase_label, phase_words, plural
from traceml.renderers.printable import printable_copy
from traceml.renderers.text.card import wrapped_lines
from traceml.renderers.text.compared_runs import OUTCOME_STYLES
from traceml.renderers.text.comparison import change_text
from traceml.renderers.text.viewport import Viewport
from traceml.runs.fleet.fleet_types import STEP, FleetDocument, HostJudgment, PhaseHistory, RunHistory, SlowHost
from traceml.runs.fleet.phase_history import MIN_RUNS
from traceml.runs.fleet.slow_hosts import MIN_STEPS

__all__ = ["fleet_lines"]

_MAX_WIDTH = 100
_SHOWN = 20
_TOLD = 3  # unusual phases in a sentence
_TOO_SHORT = f"it has fewer than {MIN_STEPS} steps"


def fleet_lines(document: FleetDocument, viewport: Viewport) -> Iterator[Text]:
    """Yield the lines for a terminal, at most 100 columns wide."""
    document = printable_copy(document)
    width = min(viewport.width, _MAX_WIDTH)
    dates = f" from {_date(document.first_started)} to {_date(document.last_started)}" if document.first_started else ""
    yield from wrapped_lines(f"{plural(document.runs, 'run')}{dates} in {document.dataset}", width, "bold")
    if document.history is not None:
        yield Text()
        yield from _history(document.history, width)

    yield Text()
    yield from _hosts(document.hosts, width)
    for sentence in document.covers:
        yield Text()
        yield from wrapped_lines(sentence, width, "dim")

    for message in document.damage[:_SHOWN]:
        yield from wrapped_lines(f"left out: {message}", width, "yellow")


def _history(history: RunHistory, width: int) -> Iterator[Text]:
    model = ", ".join(filter(None, [history.script, history.model, plural(history.world_size, "rank")]))
    yield from wrapped_lines(f"Run {history.run}: {model}", width, "bold")
    yield from wrapped_lines(_history_sentence(history), width)
    if history.phases:
        yield Text(f"  {'':<14}{'this run':>10}{'usual':>10}{'usual range':>23}  change", style="dim")
        yield from (_phase(phase) for phase in history.phases)


def _history_sentence(history: RunHistory) -> str:
    others = _others_text(history.others) if history.others else ""
    if not history.phases:
        few = f"there are too few earlier runs like it ({history.runs})" if history.runs < MIN_RUNS else _TOO_SHORT
        return f"It is not compared: {few}.{others}"

    unusual = [phase for phase in history.phases if phase.outcome != "same"]
    words = [(each, "the step" if each.phase == STEP else phase_words(each.phase)) for each in unusual[:_TOLD]]
    told = [f"{word} is {each.outcome} than usual" for each, word in words]
    if more := len(unusual[_TOLD:]):
        told.append(f"{plural(more, 'other phase')} {'is' if more == 1 else 'are'} not as usual")

    outcome = _listed(told) if told else "every phase is as usual"
    return f"Next to {plural(history.runs, 'earlier run')} like it, {outcome}.{others}"


def _others_text(others: int) -> str:
    be, its = ("is", "its") if others == 1 else ("are", "their")
    count = plural(others, "other earlier run")
    return f" {count} of the script {be} not counted: {its} model, how that is trained, or the number of ranks differs."


def _listed(words: Sequence[str]) -> str:
    """Return `one`, `one and two`, `one, two and three`."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _phase(phase: PhaseHistory) -> Text:
    label = phase_label(phase.phase)
    span = f"{ms_text(phase.low_ms)} to {ms_text(phase.high_ms)}"
    line = Text(f"  {label[:13]:<14}{ms_text(phase.mean_ms):>10}{ms_text(phase.usual_ms):>10}{span:>23}  ")
    if phase.change is None:
        return line.append("new" if phase.mean_ms else "-")

    style = OUTCOME_STYLES.get(phase.outcome, "")
    line.append(change_text(phase.change), style=style)
    return line.append("" if phase.outcome == "same" else f"  {phase.outcome}", style=style)


def _hosts(hosts: HostJudgment, width: int) -> Iterator[Text]:
    if not hosts.judged:
        yield from wrapped_lines("Hosts: none has enough jobs on several hosts to be judged", width, "bold")
        return

    many = f"{len(hosts.slow)} of {plural(hosts.judged, 'judged host')}" if hosts.slow else "none of the judged hosts"
    verb = "were" if len(hosts.slow) > 1 else "was"
    yield from wrapped_lines(f"Hosts: {many} {verb} among the slowest in most of their last jobs", width, "bold")
    if hosts.slow:
        name = max(len("host"), *(len(slow.host) for slow in hosts.slow[:_SHOWN]))
        yield Text(f"  {'host':<{name}}  slow jobs  by chance  slower by  last      mostly in", style="dim")
        yield from (_host(slow, name) for slow in hosts.slow[:_SHOWN])

    if len(hosts.slow) > _SHOWN:
        yield Text(f"  and {count_text(len(hosts.slow) - _SHOWN)} more: --json lists all", style="dim")


def _host(slow: SlowHost, width: int) -> Text:
    jobs = f"{slow.slow_jobs} of {slow.jobs}"
    excess = f"{slow.excess:.1%}".replace("%", " %")
    text = f"  {slow.host:<{width}}  {jobs:>9}  {slow.expected_jobs:>9.1f}  {excess:>9}  {_date(slow.last_started)}  "
    return Text(text).append(phase_words(slow.phase))


def _date(started: float | None) -> str:
    return "an unknown day" if started is None else f"{datetime.fromtimestamp(started, UTC):%Y-%m-%d}"
