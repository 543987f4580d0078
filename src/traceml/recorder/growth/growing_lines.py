"""Line of the user's code that adds to a variable, where only one line does."""

from __future__ import annotations

import linecache
import re
from collections.abc import Sequence

from traceml.recorder.growth.library_holders import FIGURES, HOOKS, PARAMETER_GROUPS

__all__ = ["appending_line"]

_MAX_LINES = 20_000
_METHODS = "append|appendleft|extend|add|insert|update|setdefault"
_JOINS = "(?:concat|concatenate|cat|append|stack|vstack|hstack|join|merge)"
_CALLS = {
    HOOKS: re.compile(r"\.register_\w*hook\s*\("),
    PARAMETER_GROUPS: re.compile(r"\.add_param_group\s*\("),
    FIGURES: re.compile(r"\.(?:figure|subplots|subplot_mosaic)\s*\("),
}
_FUNCTION = re.compile(r"(\s*)(?:async\s+)?def\s+(\w+)")


def appending_line(file: str, path: str, kind: str = "", *, is_copied: bool = False) -> tuple[int, str] | None:
    """Return the only line of a file that adds to a container, and its function; None without one, or with several.

    Args:
        path: expression that reaches the container; its last name is searched.
        kind: of the container; those of libraries are added to by their functions.
        is_copied: whether a longer one takes its place.
    """
    lines = linecache.getlines(file)[:_MAX_LINES]
    found = [] if is_copied else _matching(lines, _CALLS.get(kind) or _additions(path))
    found = found or _matching(lines, _copies(path))  # a list may be copied, too
    return (found[0], _function_of(lines, found[0])) if len(found) == 1 else None


def _matching(lines: Sequence[str], adds: re.Pattern[str]) -> list[int]:
    return [number for number, line in enumerate(lines, 1) if adds.search(line.partition("#")[0])]


def _additions(path: str) -> re.Pattern[str]:
    """Return a pattern of the ways to add to a container that an expression reaches."""
    holder = re.sub(r"\[.*\]$", "", path)  # a key may have a dot, as the name of a layer
    name = holder.rpartition(".")[2]
    before = r"\." if "." in holder else r"(?<![\w.])"
    element = r"\s*(?:\[[^\]]*\]\s*)"
    return re.compile(
        rf"{before}{re.escape(name)}(?:{element}?\.\s*(?:{_METHODS})\s*\(|{element}=(?!=)|{element}?\+=)"
        rf"|(?<![\w.]){re.escape(path)}\s*=\s*{re.escape(path)}\s*\+"
    )


def _copies(path: str) -> re.Pattern[str]:
    """Return a pattern of the ways to put a longer copy in the place of what an expression reaches."""
    name = rf"(?<![\w.]){re.escape(path)}"
    return re.compile(rf"{name}\s*(?:\+=|=(?!=)\s*(?:[\w.]*{_JOINS}\s*\(|.*{name}(?![\w.])))")


def _function_of(lines: Sequence[str], number: int) -> str:
    indent = _indent(lines[number - 1]) + 1  # the line itself may begin with `def`
    for line in reversed(lines[:number]):
        if line.strip() and _indent(line) < indent:
            indent = _indent(line)
            if match := _FUNCTION.match(line):
                return match[2]

    return "<module>"


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())
