"""The full-screen view."""

from __future__ import annotations

import os
import termios

from tests.renderers.reports import slow_rank, thousand_ranks
from traceml.display.terminal.fullscreen import FullScreen
from traceml.renderers.views import run_view


def test_screen_is_entered_and_left(terminal):
    """The view uses the alternate screen; leaving restores the normal one and the keyboard."""
    keyboard = terminal.file.fileno()
    before = termios.tcgetattr(keyboard)
    with FullScreen(terminal.console(), keys=keyboard) as screen:
        screen.draw(run_view(slow_rank()), footer="q quits")
        shown = terminal.visible_lines()

        assert terminal.screen.alternate
        assert shown[0].startswith("─ traceml ─ train")
        assert shown[10] == " q quits"
        assert termios.tcgetattr(keyboard)[3] & termios.ICANON == 0

    terminal.visible_lines()
    assert not terminal.screen.alternate
    assert termios.tcgetattr(keyboard) == before


def test_many_ranks_fill_the_screen(terminal):
    """The view keeps to the screen, the footer included."""
    with FullScreen(terminal.console(), keys=terminal.file.fileno()) as screen:
        screen.draw(run_view(thousand_ranks()), footer="q quits")

        shown = terminal.visible_lines()
        assert shown[0].startswith("─ traceml ─ train")
        assert shown[23] == " q quits"
        assert terminal.screen.history == []


def test_a_hint_that_does_not_fit_is_left_out_whole(terminal):
    """The part of it that fits is no word."""
    terminal.resize(60, 12)
    with FullScreen(terminal.console(), keys=terminal.file.fileno()) as screen:
        for last, expected in (("?: keys", 60), ("PgUp PgDn", 50)):
            screen.draw(run_view(slow_rank()), footer=f"q quits   {'tables' * 6}tab   {last}")
            assert len(terminal.visible_lines()[10]) == expected


def test_keys_are_read(terminal):
    """A key comes back at once; without one the wait ends in time."""
    with FullScreen(terminal.console(), keys=terminal.file.fileno()) as screen:
        assert screen.key(0.0) is None

        os.write(terminal.master, b"q")

        assert screen.key(5.0) == "q"


def test_smaller_view_leaves_nothing_behind(terminal):
    """The lines of an earlier, larger view are erased."""
    with FullScreen(terminal.console(), keys=terminal.file.fileno()) as screen:
        screen.draw(run_view(thousand_ranks()), footer="q quits")
        screen.draw(run_view(slow_rank()), footer="q quits")

        assert [line for line in terminal.visible_lines()[11:] if line] == []


def test_small_terminal_says_what_it_needs(terminal):
    """A terminal that is too small shows the size that the view needs."""
    terminal.resize(30, 6)
    with FullScreen(terminal.console(), keys=terminal.file.fileno()) as screen:
        screen.draw(run_view(slow_rank()), footer="q quits")

        assert terminal.visible_lines()[:2] == ["needs 60 x 9", " q quits"]


def test_terminal_without_a_size(terminal):
    """A terminal that reports 0 x 0 is treated as one of the usual size."""
    terminal.resize(0, 0)
    with FullScreen(terminal.console(width=80, height=24), keys=terminal.file.fileno()) as screen:
        screen.draw(run_view(slow_rank()), footer="q quits")

        assert terminal.visible_lines()[10] == " q quits"
