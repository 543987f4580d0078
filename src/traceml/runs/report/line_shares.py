"""Sampled lines of a report by phase, with the time that each phase took by the hooks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

from traceml.database.schema import LINE_AFTER_STEPS, LINE_OUTSIDE, LINE_PHASES, LINE_STARTUP, LINE_WORKERS, Phase
from traceml.runs.json_document import JsonDocument
from traceml.runs.report.report_types import LineSection, Report

__all__ = ["LibraryCall", "LineShare", "LinesDocument", "PhaseLines", "all_lines", "lines_by_phase", "lines_of_workers"]

_USER = Phase.USER.label
_STARTUP, _OUTSIDE = LINE_PHASES[LINE_STARTUP], LINE_PHASES[LINE_OUTSIDE]
_WORKERS = LINE_PHASES[LINE_WORKERS]
_OUTSIDE_PARTS = ("evaluation", "between_epochs", "restart")


class LibraryCall(msgspec.Struct, frozen=True):
    """A library function that a line of the user's code had called.

    Attributes:
        library: `FILE:LINE FUNCTION`.
        share: share of the phase, 0..1.
    """

    library: str
    share: float


class LineShare(msgspec.Struct, frozen=True):
    """A line of the user's code in a phase.

    Attributes:
        place: `FILE:LINE FUNCTION`; None if only libraries ran.
        file, line, function: its parts.
        calls: the library functions that it had called, the most frequent first.
        share: share of the phase, 0..1.
    """

    place: str | None
    file: str | None
    line: int | None
    function: str | None
    calls: tuple[LibraryCall, ...]
    share: float


class PhaseLines(msgspec.Struct, frozen=True):
    """The lines of one phase, the most frequent first.

    Attributes:
        phase: a phase, `other`, `startup`, `outside` (between steps), `after` (after the last step), or `workers`
            (loader workers that make batches, beside the training).
        samples: samples of the phase.
        seconds: time of the phase on one rank, by the hooks; None if unknown.
        lines: its lines.
    """

    phase: str
    samples: int
    seconds: float | None
    lines: tuple[LineShare, ...]


class LinesDocument(JsonDocument, msgspec.Struct, kw_only=True):
    """The result of `traceml report --lines --json`: sampled lines by phase, the most frequent first, workers last."""

    schema: Literal["traceml.lines/1"] = "traceml.lines/1"
    run: str
    phases: list[PhaseLines]

    @classmethod
    def of(cls, report: Report) -> LinesDocument:
        """Return the sampled lines of a report."""
        return cls(run=report.run.id, phases=all_lines(report))


def all_lines(report: Report) -> list[PhaseLines]:
    """Return the lines of the training threads by phase, and last those of the loader workers."""
    return [*lines_by_phase(report), *lines_of_workers(report)]


def lines_of_workers(report: Report) -> list[PhaseLines]:
    """Return the lines of the loader workers; none if none were sampled."""
    lines = [each for each in report.lines if each.phase == _WORKERS]
    return [PhaseLines(_WORKERS, sum(each.samples for each in lines), None, tuple(_merged(lines)))] if lines else []


def lines_by_phase(report: Report) -> list[PhaseLines]:
    """Return the sampled lines of the training threads by phase, the phase with the most samples first."""
    phases: dict[str, list[LineSection]] = {}
    for each in report.lines:
        if each.phase != _WORKERS:
            phases.setdefault(each.phase, []).append(each)

    known = _seconds(report)
    found = [
        PhaseLines(phase, sum(each.samples for each in lines), known.get(phase), tuple(_merged(lines)))
        for phase, lines in phases.items()
    ]
    return sorted(found, key=lambda each: -each.samples)


def _merged(lines: Iterable[LineSection]) -> list[LineShare]:
    """Return each line once, with the library functions that it had called."""
    places: dict[str | None, list[LineSection]] = {}
    for each in lines:
        places.setdefault(_place(each), []).append(each)

    merged = [
        LineShare(place, first.file, first.line, first.function, _calls(of_place), sum(each.share for each in of_place))
        for place, of_place in places.items()
        for first in of_place[:1]
    ]
    return sorted(merged, key=lambda each: -each.share)


def _calls(lines: Iterable[LineSection]) -> tuple[LibraryCall, ...]:
    shares: dict[str, float] = {}
    for each in lines:
        if each.library is not None:
            shares[each.library] = shares.get(each.library, 0.0) + each.share

    return tuple(LibraryCall(*call) for call in sorted(shares.items(), key=lambda call: -call[1]))


def _place(each: LineSection) -> str | None:
    if each.file is None or each.line is None or each.function is None:
        return None

    return f"{each.file}:{each.line} {each.function}"


def _seconds(report: Report) -> dict[str, float]:
    """Return the seconds of each phase on one rank; the user's phases together."""
    labels = {phase.label for phase in Phase} | {"other"}
    seconds: dict[str, float] = {}
    for phase in report.phases:
        name = phase.phase if phase.phase in labels else _USER
        seconds[name] = seconds.get(name, 0.0) + phase.mean_ms * report.steps.count / 1e3

    if report.time is not None:
        parts = {part.part: part.seconds for part in report.time.parts}
        seconds[_STARTUP] = parts.get("startup", 0.0)
        seconds[_OUTSIDE] = sum(parts.get(part, 0.0) for part in _OUTSIDE_PARTS)
        # Code that an evaluation leads to is outside, also after the last step.
        after = LINE_AFTER_STEPS if any(each.phase == LINE_AFTER_STEPS for each in report.lines) else _OUTSIDE
        seconds[after] = seconds.get(after, 0.0) + parts.get("idle", 0.0)

    return seconds
