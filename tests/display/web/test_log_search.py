"""Search of log files."""

from __future__ import annotations

import os

import pytest

from traceml.display.web.panels.log_search import search_logs
from traceml.runs.log_tails import log_tails

LINES = ["step 1 fine", "UserWarning: slow loader", "ValueError: bad", "Traceback (most recent call last):", "terror"]


@pytest.mark.parametrize(
    ("words", "level", "found"),
    [
        ("", "all", LINES),
        ("", "warning", LINES[1:4]),
        ("", "error", LINES[2:4]),
        ("SLOW loader", "all", LINES[1:2]),
        ("slow", "error", []),
        ("", "unknown", LINES),
    ],
)
def test_lines_are_found_by_words_and_level(tmp_path, words, level, found):
    """Every word must be in the line; a warning is below an error; part of a word is no level."""
    (tmp_path / "logs" / "h0").mkdir(parents=True)
    (tmp_path / "logs" / "h0" / "rank_0.log").write_text("\n".join(LINES))

    tail = search_logs(tmp_path, words, level)[0]
    assert (tail.name, tail.text.splitlines(), tail.cut) == ("h0/rank_0.log", found, False)


def test_lines_before_the_end_of_a_file_are_found(tmp_path):
    """The page shows 16 KiB of a file, and searches 4 MiB of it."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "output.log").write_text("early error\n" + "fine\n" * 10_000)

    assert "early" not in log_tails(tmp_path)[0].text
    assert search_logs(tmp_path, "early", "error")[0].text == "early error"


def test_logs_are_regular_files_of_the_run(tmp_path):
    """A run's folder may come from elsewhere: a link out of it is not shown, and a pipe in it is not waited for."""
    (tmp_path / "run" / "logs").mkdir(parents=True)
    (tmp_path / "secret.log").write_text("of another folder")
    (tmp_path / "run" / "logs" / "link.log").symlink_to(tmp_path / "secret.log")
    os.mkfifo(tmp_path / "run" / "logs" / "pipe.log")
    (tmp_path / "run" / "logs" / "own.log").write_text("fine")

    assert [(tail.name, tail.text) for tail in log_tails(tmp_path / "run")] == [("own.log", "fine")]
