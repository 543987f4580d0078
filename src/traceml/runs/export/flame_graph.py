"""Sampled lines as a flame graph: a speedscope file, or a trace for Perfetto.

Each stack is phase, line of the user's code, library function. Its width is the phase's time by the hooks, divided by
the samples of its lines.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from traceml.formatting import library_text, phase_label
from traceml.runs.report.line_shares import LineShare, PhaseLines, lines_by_phase
from traceml.runs.report.report_types import Report
from traceml.version import __version__

__all__ = ["FLAME_GRAPHS", "StackFrame", "perfetto", "speedscope", "weighted_stacks"]

_SCHEMA = "https://www.speedscope.app/file-format-schema.json"


class StackFrame(NamedTuple):
    """A frame of a stack, as both formats name it."""

    name: str
    file: str | None = None
    line: int | None = None


def speedscope(report: Report) -> dict[str, Any]:
    """Return the lines of a report as a speedscope file."""
    stacks = list(weighted_stacks(report))
    frames = list(dict.fromkeys(frame for stack, _ in stacks for frame in stack))
    number = {frame: at for at, frame in enumerate(frames)}
    return {
        "$schema": _SCHEMA,
        "name": report.run.name,
        "exporter": f"traceml {__version__}",
        "activeProfileIndex": 0,
        "shared": {"frames": [{k: v for k, v in frame._asdict().items() if v is not None} for frame in frames]},
        "profiles": [
            {
                "type": "sampled",
                "name": f"{report.run.name}: time of one rank by phase and line",
                "unit": "seconds",
                "startValue": 0,
                "endValue": sum(weight for _, weight in stacks),
                "samples": [[number[frame] for frame in stack] for stack, _ in stacks],
                "weights": [weight for _, weight in stacks],
            }
        ],
    }


def perfetto(report: Report) -> dict[str, Any]:
    """Return the lines of a report as trace events: slices inside each other, as wide as their time."""
    name = f"{report.run.name}: time by phase and line"
    events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": 0, "tid": 0, "args": {"name": name}}]
    began_s = 0.0
    open_until: dict[tuple[StackFrame, ...], dict[str, Any]] = {}
    for stack, weight in weighted_stacks(report):
        for depth, frame in enumerate(stack, start=1):
            path = stack[:depth]
            if path not in open_until:
                place = {"file": frame.file, "line": frame.line} if frame.file else {}
                open_until[path] = _slice(frame.name, began_s, place)
                events.append(open_until[path])

            open_until[path]["dur"] += round(weight * 1e6)

        began_s += weight

    return {"traceEvents": events, "displayTimeUnit": "ms"}


FLAME_GRAPHS = {"speedscope": speedscope, "perfetto": perfetto}
"""Format -> function that returns a report's lines in it."""


def _slice(name: str, began_s: float, place: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "X", "name": name, "cat": "lines", "pid": 0, "tid": 0, "ts": round(began_s * 1e6), "dur": 0,
            "args": place}  # fmt: skip


def weighted_stacks(report: Report) -> Iterator[tuple[tuple[StackFrame, ...], float]]:
    """Yield stacks with their seconds, a phase after the other; where times are unknown, with their samples."""
    phases = lines_by_phase(report)
    timed = all(each.seconds is not None for each in phases)
    for phase in phases:
        whole = phase.seconds if timed and phase.seconds is not None else float(phase.samples)
        known = sum(each.share for each in phase.lines)
        for each in phase.lines if whole else ():  # a sampled phase may have no time, as the end of a run without steps
            called = [(_library(call.library), call.share) for call in each.calls]
            own = each.share - sum(share for _, share in called)
            stack, second = _stack(phase, each), whole / max(known, 1e-9)
            yield from (((*stack, frame), second * share) for frame, share in called)
            if own > 1e-9 or not called:
                yield stack, second * own


def _stack(phase: PhaseLines, each: LineShare) -> tuple[StackFrame, ...]:
    frames = [StackFrame(phase_label(phase.phase))]
    if each.file is not None and each.function is not None:
        name = each.file.rpartition("/")[2]
        frames.append(StackFrame(f"{each.function} ({name}:{each.line})", each.file, each.line))

    return tuple(frames)


def _library(text: str) -> StackFrame:
    """Return the frame of `FILE:LINE FUNCTION`."""
    place, _, function = text.rpartition(" ")
    file, _, line = place.rpartition(":")
    return StackFrame(f"{function} ({library_text(place)})", file, int(line) if line.isdecimal() else None)
