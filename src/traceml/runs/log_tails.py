"""Ends of a run's log files, as a terminal would show them, and search in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from traceml.run_folder import LOGS_FOLDER, OUTPUT_LOG
from traceml.trusted_files import is_file_inside

__all__ = ["LEVELS", "LogTail", "log_tails", "output_lines", "search_logs"]

_TAIL_BYTES = 16 * 1024
_READ_BYTES = 256 * 1024  # at least: of a progress bar that is drawn again and again, one line is left
_LOG_FILES = 8
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[ -/]*[0-Z\\^-~])")

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


@dataclass(frozen=True, slots=True)
class LogTail:
    """The end of a file in the run's `logs`; `cut` where earlier lines are missing."""

    name: str
    text: str
    cut: bool


def log_tails(run_dir: Path, limit_bytes: int = _TAIL_BYTES) -> list[LogTail]:
    """Return the ends of the newest log files of a run, by name."""
    folder = run_dir / LOGS_FOLDER
    try:
        found = [file for file in folder.rglob("*.log") if is_file_inside(file, run_dir)]
        files = sorted(found, key=lambda file: file.stat().st_mtime)[-_LOG_FILES:]
        return sorted((_tail(folder, file, limit_bytes) for file in files), key=lambda tail: tail.name)
    except OSError:
        return []  # a file was removed meanwhile


def output_lines(run_dir: Path) -> list[str]:
    """Return the last lines of the script's output that are not empty; none where it is not kept."""
    file = run_dir / OUTPUT_LOG
    try:
        tail = _tail(file.parent, file, _TAIL_BYTES) if is_file_inside(file, run_dir) else None
    except OSError:
        return []

    return [line for line in tail.text.splitlines() if line.strip()] if tail is not None else []


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


def _tail(folder: Path, file: Path, limit_bytes: int) -> LogTail:
    at_most = max(limit_bytes, _READ_BYTES)
    with file.open("rb") as opened:
        size = opened.seek(0, 2)
        opened.seek(max(0, size - at_most))
        text = _as_shown(opened.read(at_most).decode("utf-8", "replace"))

    cut = size > at_most or len(text) > limit_bytes
    end = text[-limit_bytes:]
    return LogTail(str(file.relative_to(folder)), end.partition("\n")[2] or end if cut else text, cut)


def _as_shown(text: str) -> str:
    """Return a text without colors, and of each line what was written last from its beginning."""
    plain = _ESCAPES.sub("", text).replace("\r\n", "\n")
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in plain.split("\n"))
