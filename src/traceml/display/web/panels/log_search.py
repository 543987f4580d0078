"""Lines of a run's log files that are searched for."""

from __future__ import annotations

import re
from pathlib import Path

from traceml.runs.log_tails import LogTail, log_tails

__all__ = ["LEVELS", "search_logs"]

_SEARCHED_BYTES = 4 << 20
_FOUND_LINES = 500
_ERROR = r"\b(?:\w+(?:Error|Exception)|(?i:error|critical|fatal|exception|traceback))\b"
_WARNING = r"\b(?:\w+Warning|(?i:warn|warning))\b"

LEVELS: dict[str, re.Pattern[str] | None] = {
    "all": None,
    "warning": re.compile(f"{_ERROR}|{_WARNING}"),
    "error": re.compile(_ERROR),
}
"""Least level of the lines to show -> what such a line contains."""


def search_logs(run_dir: Path, words: str, level: str) -> list[LogTail]:
    """Return the lines of each log file's last 4 MiB that contain all words and have at least a level.

    Args:
        words: with spaces between them; case does not matter.
        level: a key of `LEVELS`.
    """
    wanted, pattern = words.lower().split(), LEVELS.get(level)

    def fits(line: str) -> bool:
        lower = line.lower()
        return all(word in lower for word in wanted) and (pattern is None or pattern.search(line) is not None)

    found = []
    for tail in log_tails(run_dir, _SEARCHED_BYTES):
        lines = [line for line in tail.text.splitlines() if fits(line)]
        found.append(LogTail(tail.name, "\n".join(lines[-_FOUND_LINES:]), tail.cut or len(lines) > _FOUND_LINES))

    return found
