"""The live view below a script's output."""

from __future__ import annotations

import os

import pytest
from rich.console import Console

from tests.renderers.reports import healthy, slow_rank, thousand_ranks
from traceml.display.terminal.bottom_panel import BottomPanel
from traceml.renderers.views import run_view

PANEL = 10  # two ranks


@pytest.fixture
def driver(terminal):
    made = BottomPanel(terminal.console())
    yield made
    made.close()


def view(make=slow_rank):
    return run_view(make(), [30.0, 40.0])


def test_view_is_at_the_bottom_and_output_above(terminal, driver):
    """The panel takes the bottom rows; output starts where the cursor was."""
    driver.write(b"epoch 0\n")
    driver.update(view())
    driver.write(b"epoch 1\n")

    shown = terminal.visible_lines()
    assert shown[:3] == ["epoch 0", "epoch 1", ""]
    assert shown[24 - PANEL].startswith("─ traceml ─ train")
    assert "Rank 1 is slow in forward" in shown[-4]
    assert shown[-1].startswith(" tracing no row lost")


def test_output_passes_unchanged(terminal, driver):
    """Every byte of the script reaches the terminal in order."""
    driver.update(view())
    terminal.visible_lines()
    terminal.raw = b""
    data = b"\x1b[31mred\x1b[0m \xc3\xa9 \xff\x00\r\t50%|##\x1b[A\n"

    driver.write(data)

    assert terminal.read() == data


def test_long_output_scrolls_above_the_view(terminal, driver):
    """Output scrolls within its rows, the view stays, and no line is lost from the history."""
    driver.update(view())
    for number in range(100):
        driver.write(b"line %d\n" % number)
        if number % 7 == 0:
            driver.update(view())
            terminal.read()  # the kernel keeps 15 KiB of what nobody reads, then writers wait

    shown = terminal.visible_lines()
    above = shown[: 24 - PANEL]
    assert above[-2:] == ["line 99", ""]
    assert [line for line in terminal.screen.history + above if line] == [f"line {number}" for number in range(100)]
    assert shown[24 - PANEL].startswith("─ traceml ─ train")


def test_progress_bar_stays_on_its_line(terminal, driver):
    """A bar that returns to the start of its line continues there between draws."""
    driver.write(b"start\n")
    for percent in range(0, 101, 10):
        driver.write(b"\r%3d%%|%s" % (percent, b"#" * (percent // 10)))
        driver.update(view())

    driver.write(b"\ndone\n")

    assert terminal.visible_lines()[:4] == ["start", "100%|##########", "done", ""]


def test_partial_line_goes_on(terminal, driver):
    """A line written in parts is whole, also when a view is drawn in between."""
    driver.write(b"loss ")
    driver.update(view())
    driver.write(b"0.31")
    driver.update(view())
    driver.write(b" ok\n")

    assert terminal.visible_lines()[0] == "loss 0.31 ok"


def test_view_never_splits_a_sequence(terminal, driver):
    """A draw waits while the script is within an escape sequence or a character, but not forever."""
    driver.update(view())
    terminal.read()
    for part, rest in (
        (b"\x1b[3", b"2m"),
        (b"\x1b", b"[0m"),
        (b"\xc3", b"\xa9"),
        (b"\xe2\x94", b"\x80"),
        (b"\x1b]0;title", b"\x07"),
    ):
        driver.write(part)
        driver.update(view())
        driver.write(rest)

        assert terminal.read() == part + rest
        driver.update(view())
        assert b"traceml" in terminal.read()

    driver.write(b"\x1b[3")
    for _ in range(5):
        driver.update(view())

    assert b"traceml" in terminal.read(show=False)


def test_close_gives_the_terminal_back(terminal, driver):
    """After close the panel is gone, the whole screen scrolls, and the cursor is at the start of a line."""
    driver.write(b"last words")
    driver.update(view())

    driver.close()
    driver.close()
    os.write(terminal.file.fileno(), b"$ ")

    assert terminal.visible_lines()[:3] == ["last words", "$", ""]
    assert not any("traceml" in line for line in terminal.visible_lines())
    assert terminal.screen.bottom == 24


def test_close_adds_no_empty_line(terminal, driver):
    """When the script ended its last line, what follows comes right below it."""
    driver.write(b"last words\n")
    driver.update(view())

    driver.close()
    os.write(terminal.file.fileno(), b"$ ")

    assert terminal.visible_lines()[:3] == ["last words", "$", ""]


def test_height_is_fixed_between_draws(terminal, driver):
    """The panel does not move while the job has the same ranks."""
    tops = set()
    for _ in range(5):
        driver.write(b"x\n")
        driver.update(view())
        tops.add(next(row for row, line in enumerate(terminal.visible_lines()) if "traceml" in line))

    assert tops == {24 - PANEL}


def test_panel_grows_with_the_ranks_and_leaves_room(terminal, driver):
    """More ranks take more rows, and the script keeps at least five."""
    driver.write(b"epoch 0\n")
    driver.update(view(healthy))
    driver.update(view(thousand_ranks))
    driver.write(b"epoch 1\n")

    shown = terminal.visible_lines()
    assert shown[:3] == ["epoch 0", "epoch 1", ""]
    assert sum("traceml" in line for line in shown) == 1
    assert shown[5].startswith("─ traceml")
    assert any("more, steps of" in line for line in shown)


def test_resize_redraws(terminal, driver):
    """After a resize the panel is at the new bottom, also when the script prints first."""
    driver.update(view())
    terminal.visible_lines()
    terminal.resize(100, 30)
    terminal.screen.rows, terminal.screen.columns, terminal.screen.bottom = 30, 100, 30
    for row in terminal.screen.cells:
        row += [" "] * 20
    terminal.screen.cells += [[" "] * 100 for _ in range(6)]

    driver.write(b"after\n")
    driver.update(view())

    shown = terminal.visible_lines()
    assert shown[0] == "after"
    assert [row for row, line in enumerate(shown) if "traceml" in line] == [30 - PANEL]
    assert len(shown[30 - PANEL]) == 100


@pytest.mark.parametrize("size", [(50, 24), (80, 10)])
def test_small_terminal_has_no_view(terminal, driver, size):
    """In a small terminal the script has the whole screen."""
    terminal.resize(*size)

    driver.update(view())
    driver.write(b"hello\n")

    assert not driver.visible
    assert terminal.read() == b"hello\n"


def test_pipe_gets_the_output_and_nothing_else():
    """In a pipe no view is written, and the script's bytes pass."""
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as file:
        driver = BottomPanel(Console(file=file))
        driver.update(view())
        driver.write(b"\xffhello\n")
        driver.update(view())
        driver.close()

    with os.fdopen(reader, "rb") as pipe:
        assert pipe.read() == b"\xffhello\n"


def test_terminal_that_goes_away_is_left_alone():
    """A closed terminal raises nothing: the job must not end with it."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as file:
        driver = BottomPanel(Console(file=file, force_terminal=True))
        driver.write(b"hello\n")
        driver.update(view())
        driver.close()


def test_no_color_is_honoured(terminal, monkeypatch):
    """With NO_COLOR no color is written."""
    monkeypatch.setenv("NO_COLOR", "1")
    console = Console(file=terminal.file, force_terminal=True, color_system="256", legacy_windows=False)
    driver = BottomPanel(console)

    driver.update(view())

    terminal.visible_lines()
    driver.close()
    assert b"\x1b[31" not in terminal.raw
    assert b"\x1b[1;31" not in terminal.raw
    assert b"48;5" not in terminal.raw
