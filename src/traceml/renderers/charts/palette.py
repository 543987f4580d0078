"""Colors of charts, light and dark; phases have the same hues as in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

from traceml.diagnosis.facts.run_time import PARTS

__all__ = ["BY_CSS", "DARK", "LIGHT", "Theme", "css_variables"]

_FIXED = ("input_wait", "h2d", "forward", "backward", "optimizer", "comm", "checkpoint", "user", "other")


@dataclass(frozen=True, slots=True)
class Theme:
    """The colors of a light or a dark page.

    Attributes:
        text, muted, rule: text, axis labels, grid lines.
        phases: by phase, users: for the user's own phases.
        parts: by part of the run's time.
        lines: for other series: ranks, hosts, percentiles.
        heat: from zero to the maximum.
        worse: what went wrong, as a hang.
        page: background of a page.
    """

    text: str
    muted: str
    rule: str
    ground: str
    phases: Mapping[str, str]
    users: tuple[str, ...]
    parts: Mapping[str, str]
    lines: tuple[str, ...]
    heat: tuple[str, ...]
    worse: str
    page: str

    def of_phases(self, names: Iterable[str]) -> dict[str, str]:
        """Return a color per phase; the user's own phases get theirs in order of appearance."""
        colors: dict[str, str] = {}
        others = 0
        for name in names:
            if name in self.phases:
                colors[name] = self.phases[name]
            else:
                colors[name] = self.users[others % len(self.users)]
                others += 1

        return colors


def _named_colors(names: Sequence[str], *colors: str) -> Mapping[str, str]:
    return MappingProxyType(dict(zip(names, colors, strict=True)))


# `comm` is neutral: most of it is waiting for the rank that is slow in a phase of another color.
LIGHT = Theme(
    text="#1b2430",
    muted="#5d6b7c",
    rule="#dfe4ea",
    ground="#ffffff",
    phases=_named_colors(
        _FIXED, "#e0a100", "#a855c7", "#2f6fde", "#12a5b8", "#2f9e5b", "#76869b", "#d56bb3", "#7fb52d", "#cdd4dc"
    ),
    users=("#7fb52d", "#a58be0", "#c98a4b", "#5bb89a", "#8898c9"),
    parts=_named_colors(
        PARTS, "#e08a00", "#2f6fde", "#12a5b8", "#d56bb3", "#e0c200", "#a3adba", "#6e7f2f", "#dc4c46", "#d3d9e0"
    ),
    lines=("#2f6fde", "#e08a00", "#2f9e5b", "#dc4c46", "#8250df", "#12a5b8", "#b0568f", "#6e7f2f"),
    heat=("#eef2f6", "#fdeecb", "#fbd38a", "#f6ae55", "#ee8434", "#de5a2b", "#c23a2a", "#9c2030", "#701230"),
    worse="#c62828",
    page="#f5f7f9",
)
DARK = Theme(
    text="#e7ecf2",
    muted="#93a1b3",
    rule="#2b3645",
    ground="#151c26",
    phases=_named_colors(
        _FIXED, "#f2bd3a", "#c58be0", "#6aa0ff", "#3fcbdc", "#5cc98a", "#8898ad", "#f29ad0", "#a8d85a", "#4a5666"
    ),
    users=("#a8d85a", "#bda6f2", "#e0ab72", "#7fd6b9", "#a9b7e4"),
    parts=_named_colors(
        PARTS, "#f5ae45", "#6aa0ff", "#3fcbdc", "#f29ad0", "#e6d34a", "#6d7a8a", "#b5c66a", "#ff7a70", "#4a5666"
    ),
    lines=("#6aa0ff", "#f5ae45", "#5cc98a", "#ff7a70", "#b392f0", "#3fcbdc", "#e08fc0", "#b5c66a"),
    heat=("#1d2632", "#3a2f26", "#5e3f22", "#87501f", "#b2621f", "#d97a2b", "#f09a45", "#f8bd74", "#fde3b0"),
    worse="#ff7a70",
    page="#0d131b",
)


def css_variables(theme: Theme) -> str:
    """Return declarations of the CSS variables that `BY_CSS` uses."""
    return "".join(f"--tm-{name}:{color};" for name, color in _named(theme))


def _named(theme: Theme) -> Iterator[tuple[str, str]]:
    """Yield the colors of a theme with the names of their CSS variables."""
    for each in fields(theme):
        value = getattr(theme, each.name)
        if isinstance(value, str):
            yield each.name, value
        else:
            keyed = value.items() if isinstance(value, Mapping) else enumerate(value)
            yield from ((f"{each.name}-{key}", color) for key, color in keyed)


def _variables(name: str, value: Any) -> Any:
    """Return the value of a theme's field with CSS variables in place of its colors."""
    if isinstance(value, str):
        return f"var(--tm-{name})"

    if isinstance(value, tuple):
        return tuple(f"var(--tm-{name}-{number})" for number in range(len(value)))

    return MappingProxyType({key: f"var(--tm-{name}-{key})" for key in value})


BY_CSS = Theme(**{each.name: _variables(each.name, getattr(LIGHT, each.name)) for each in fields(Theme)})
"""For drawings in a page whose style sheet declares the `css_variables` of a theme."""
