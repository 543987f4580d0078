"""Words for the gain of a finding, restarts of a job, the state of a tracker, and lines of code with their calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from traceml.diagnosis.findings import Finding
from traceml.formatting import (
    capitalized,
    count_text,
    duration_text,
    gain_text,
    has_gain,
    library_text,
    percent_text,
    phase_label,
    plural,
    ranks_text,
)
from traceml.runs.report.line_shares import LineShare, PhaseLines
from traceml.runs.report.report_types import RestartSection, TimeSection, TrackerSection

__all__ = [
    "NO_LINES",
    "cost_text",
    "gain_sentence",
    "goodput_text",
    "phase_heading",
    "restarts_text",
    "shown_calls",
    "shown_lines",
    "tracker_text",
]

NO_LINES = "No lines were sampled: the run only logs, is too short, or has a stack_interval of 0."
_ERROR_CHARS = 100
_SHOWN_RESTARTS = 3
_SHOWN_LINES, _MIN_LINE = 8, 0.01
_SHOWN_CALLS, _MIN_CALL = 3, 0.01


def cost_text(finding: Finding) -> str | None:
    """Return `40 % of step time`, or of what else the kind costs; None if there is no cost."""
    whole = finding.kind.rule.cost_of
    return f"{percent_text(finding.cost_share)} of {whole}" if finding.cost_share and whole else None


def gain_sentence(finding: Finding) -> str | None:
    """Return `steps are 1.3x faster once this is fixed`; None if there is no gain, or the finding says it."""
    if finding.gain is None or has_gain(finding.summary) or has_gain(finding.next):
        return None

    subject = "the run is" if finding.kind.rule.of_run else "steps are"
    return f"{subject} {gain_text(finding.gain)} once this is fixed"


def restarts_text(restarts: Sequence[RestartSection]) -> str:
    """Return the restarts of a job: `Restarted once: rank 1, RuntimeError at step 30 (lost 12 s)`."""
    many = "once" if len(restarts) == 1 else "twice" if len(restarts) == 2 else f"{len(restarts)} times"
    shown = "; ".join(_restart_text(each) for each in restarts[-_SHOWN_RESTARTS:])
    first = "last " if len(restarts) > _SHOWN_RESTARTS else ""
    return f"Restarted {many}: {first}{shown}"


def goodput_text(time: TimeSection) -> str:
    """Return what the attempts of a job were good for: `goodput 62 %, 24 of 120 steps were repeated, ...`."""
    made = time.productive_steps + time.repeated_steps
    text = f"goodput {percent_text(time.goodput)}, {count_text(time.repeated_steps)} of {plural(made, 'step')} repeated"
    if time.hang_s:
        text += f", hung for {duration_text(time.hang_s)}"

    if time.mtbf_s is None:
        return text

    each = f"{duration_text(time.mtbf_s)} of productive steps per failure"
    return f"{text}, {each} ({plural(time.failures, 'failure')})"


def _restart_text(restart: RestartSection) -> str:
    step = "before the first step" if restart.step is None else f"at step {count_text(restart.step)}"
    lost = "" if restart.lost_s is None else f" (lost {duration_text(restart.lost_s)})"
    whose = f"{ranks_text(restart.ranks)}, " if restart.ranks else ""
    return f"{whose}{restart.reason} {step}{lost}"


def tracker_text(tracker: TrackerSection, most_chars: int = _ERROR_CHARS) -> str:
    """Return the state of a tracker: `mlflow 12,340 delivered, 20 pending: refused the connection`.

    A run that logs nothing has values derived from its steps alone.
    """
    is_derived = tracker.derived > 0 and not (tracker.delivered or tracker.pending or tracker.failed)
    delivered = f"{count_text(tracker.derived)} derived values" if is_derived else count_text(tracker.delivered)
    parts = [f"{delivered} delivered"]
    if tracker.fallback:
        parts.append(f"{count_text(min(tracker.fallback, tracker.delivered))} of them to its fallback")

    if tracker.pending:
        parts.append(f"{count_text(tracker.pending)} pending")

    if tracker.failed:
        parts.append(f"{count_text(tracker.failed)} refused")

    error = tracker.error if len(tracker.error) <= most_chars else f"{tracker.error[:most_chars]}..."
    what = tracker.state if tracker.state in ("unauthorized", "broken") else ""
    why = ": ".join(text for text in (what, error) if text)
    return f"{tracker.backend} {', '.join(parts)}" + (f" ({why})" if why else "")


def phase_heading(phase: PhaseLines) -> str:
    """Return the heading of a phase's lines of code: `Forward, 12 s`; without its time where the hooks saw none."""
    took = f", {duration_text(phase.seconds)}" if phase.seconds else ""
    return f"{capitalized(phase_label(phase.phase))}{took}"


def shown_lines(phase: PhaseLines) -> list[LineShare]:
    """Return the lines of code that are worth showing of a phase."""
    return [line for line in phase.lines[:_SHOWN_LINES] if line.share >= _MIN_LINE]


def shown_calls(line: LineShare) -> Iterator[tuple[str, str]]:
    """Yield the library functions that a line of code calls most, each after its share of the phase: `5 % `.

    There is no share where one function has all of the line.
    """
    for call in line.calls[:_SHOWN_CALLS]:
        if call.share >= _MIN_CALL:
            share = "" if call.share > 0.99 * line.share else f"{percent_text(call.share)} "
            yield share, library_text(call.library)
