"""Flame graph of a run's sampled lines as one HTML file, which opens without a network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from traceml.formatting import duration_text, percent_text, phase_label, plural
from traceml.renderers.charts.palette import BY_CSS
from traceml.renderers.charts.svg_marks import escaped
from traceml.renderers.written_page import static_text, written_page
from traceml.runs.export.flame_graph import StackFrame, weighted_stacks
from traceml.runs.report.line_shares import lines_by_phase
from traceml.runs.report.report_types import Report
from traceml.version import __version__

__all__ = ["flame_page"]

_MIN_SHARE = 0.0005  # narrower frames have no pixel


@dataclass(slots=True)
class _FlameNode:
    """A frame, its time with all it calls, and the frames it calls."""

    frame: StackFrame
    weight: float = 0.0
    calls: dict[StackFrame, _FlameNode] = field(default_factory=dict)


def flame_page(report: Report) -> str:
    """Return the sampled lines of a report as a page: phases, lines and library functions, as wide as their time.

    Without sampled lines the page says so.
    """
    top = _tree(weighted_stacks(report))
    phases = lines_by_phase(report)
    samples = sum(phase.samples for phase in phases)
    timed = all(phase.seconds is not None for phase in phases)
    title = escaped(report.run.name)
    about = f"{plural(samples, 'sample')} of the training threads, by phase and line of code"
    body = "".join(_drawn(each, top.weight, timed, None) for each in _largest(top))
    return written_page(
        f"{title}: flame graph",
        static_text("flame.css"),
        f"<h1>{title}</h1><p>{about}. Click a frame to enlarge it, Escape to go back.</p>"
        f'<div class="row" id="graph">{body or "No lines were sampled."}</div>'
        f"<footer>traceml {escaped(__version__)}</footer>",
        static_text("flame.js"),
    )


def _tree(stacks: Iterable[tuple[tuple[StackFrame, ...], float]]) -> _FlameNode:
    top = _FlameNode(StackFrame("all"))
    for stack, weight in stacks:
        node = top
        node.weight += weight
        for frame in stack:
            node = node.calls.setdefault(frame, _FlameNode(frame))
            node.weight += weight

    return top


def _largest(node: _FlameNode) -> Iterator[_FlameNode]:
    return iter(sorted(node.calls.values(), key=lambda each: -each.weight))


def _drawn(node: _FlameNode, whole: float, timed: bool, color: str | None) -> str:
    """Return a frame above those it calls; without times the weights are samples."""
    if node.weight < _MIN_SHARE * whole:
        return ""

    color = color or _phase_color(node.frame.name)
    share = percent_text(node.weight / whole)
    size = duration_text(node.weight) if timed else plural(round(node.weight), "sample")
    place = f"\n{node.frame.file}:{node.frame.line}" if node.frame.file else ""
    calls = "".join(_drawn(each, whole, timed, color) for each in _largest(node))
    return (
        f'<div class="frame" style="flex-grow:{node.weight / whole:.6f};--color:{color}">'
        f'<button title="{escaped(f"{node.frame.name}: {share}, {size}{place}")}">{escaped(node.frame.name)}</button>'
        f'<div class="row">{calls}</div></div>'
    )


def _phase_color(name: str) -> str:
    """Return the color of a phase, by the label that its frame has."""
    labels = {phase_label(phase): color for phase, color in BY_CSS.phases.items()}
    return labels.get(name, BY_CSS.phases["other"])
