"""Ends of log files."""

from __future__ import annotations

import os

import pytest

from traceml.run_folder import OUTPUT_LOG
from traceml.runs.log_tails import log_tails, output_lines, search_logs


def write(run_dir, text: str) -> None:
    file = run_dir / OUTPUT_LOG
    file.parent.mkdir()
    file.write_bytes(text.encode())


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("fine\n", "fine\n"),
        ("of Windows\r\nfine\r\n", "of Windows\nfine\n"),
        ("\r 0%|\r50%|#\r100%|##\nsaved\n", "100%|##\nsaved\n"),
        ("\r 0%|\r50%|#", "50%|#"),
        (" 0%|\r50%|#\r", "50%|#"),
        ("\x1b[1;31mERROR\x1b[0m bad\x1b[K\n", "ERROR bad\n"),
        ("\x1b]8;;https://a.example\x1b\\link\x1b]8;;\x1b\\ \x1b]0;title\x07end\n", "link end\n"),
        ("up\n\x1b[Adown\n", "up\ndown\n"),
        ("[32m] and 3 [K are text\n", "[32m] and 3 [K are text\n"),
    ],
)
def test_a_text_is_what_a_terminal_leaves(tmp_path, written, shown):
    """Without colors, and of a line that was drawn again and again what came last; all else is kept."""
    write(tmp_path, written)

    assert [(tail.text, tail.cut) for tail in log_tails(tmp_path)] == [(shown, False)]


def test_a_progress_bar_hides_no_line_before_it(tmp_path):
    """Its many states are one line, so lines that were written long before it are the end of the file."""
    write(tmp_path, "begun\n" + "".join(f"\r{done:4} of 2000 batches, 3.1 s" for done in range(2001)) + "\nsaved\n")

    assert output_lines(tmp_path) == ["begun", "2000 of 2000 batches, 3.1 s", "saved"]


def test_one_endless_line_has_an_end(tmp_path):
    """Also a line that is longer than the part that is shown."""
    write(tmp_path, "x" * 400_000)

    (tail,) = log_tails(tmp_path)
    assert tail.cut
    assert tail.text == "x" * 16_384


def test_output_that_is_not_kept_has_no_lines(tmp_path):
    """A run without a live view, and a link out of the run's folder."""
    assert output_lines(tmp_path) == []
    (tmp_path / "secret").write_text("of another folder")
    (tmp_path / "run" / "logs").mkdir(parents=True)
    (tmp_path / "run" / OUTPUT_LOG).symlink_to(tmp_path / "secret")
    assert output_lines(tmp_path / "run") == []


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
