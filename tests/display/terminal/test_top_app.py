"""Tables of `traceml top` and their keys."""

from __future__ import annotations

import os

import pytest

from tests.runs.export.exported import rich_run
from traceml.display.terminal.fullscreen import FullScreen
from traceml.display.terminal.top_app import TABS, TopApp
from traceml.runs.live_run import LiveRun


class Shown:
    """`traceml top` on a small terminal, without its loop."""

    def __init__(self, terminal, run_dir) -> None:
        self.terminal = terminal
        self.live = LiveRun(run_dir)
        self.screen = FullScreen(terminal.console(), keys=terminal.file.fileno())
        self.screen.__enter__()
        self.top = TopApp(self.live)
        self.top.refresh()

    def press(self, *keys: str) -> list[str]:
        for key in keys:
            self.top.press(key, self.screen)

        self.top.draw(self.screen)
        return self.terminal.visible_lines()

    def close(self) -> None:
        self.live.close()
        self.screen.__exit__()


@pytest.fixture
def show(terminal):
    shown: list[Shown] = []

    def start(run_dir) -> Shown:
        shown.append(Shown(terminal, run_dir))
        return shown[-1]

    yield start
    for each in shown:
        each.close()


def heads(lines):
    return " ".join(lines[3].split())


def test_keys_switch_tables(tmp_path, show):
    """Each letter shows its table, with the job's line above and the verdict below."""
    shown = show(rich_run(tmp_path / "run"))

    assert "rank step" in " ".join(shown.press()[2].split())
    seen = {key: heads(shown.press(key)) for key in "prmtls"}
    assert seen == {
        "p": "phase mean share min max",
        "r": "rank host steps step own work waiting state",
        "m": "rank peak RSS growth per step device peak",
        "t": "metric last min max values over its steps",
        "l": "time rank kind",
        "s": "host util memory temp power",
    }
    lines = shown.press("r")
    assert lines[0].startswith("─ traceml ─ train")
    assert lines[2] == " overview  phases [ranks] memory  metrics  logs  system"
    assert lines[-3].startswith(" so far  ")
    assert "q quits" in lines[-1]


def test_logs_show_what_the_script_printed(tmp_path, show):
    """As a terminal would show it: of a progress bar its last state, without colors."""
    run_dir = rich_run(tmp_path / "run")
    (run_dir / "logs").mkdir(exist_ok=True)
    (run_dir / "logs" / "output.log").write_bytes(b"\x1b[32mloading\x1b[0m\r\n\r 10%|#    \r100%|#####\nsaved\n")
    lines = show(run_dir).press("l")

    assert [line.split() for line in lines[4:7]] == [
        ["output", "saved"],
        ["output", "100%|#####"],
        ["output", "loading"],
    ]


def test_tab_goes_round(tmp_path, show):
    """Tab and the arrows lead through all tables and back to the first."""
    shown = show(rich_run(tmp_path / "run"))
    names = [shown.press("tab")[2] for _ in TABS]

    assert [f"[{tab.name}]" in line for tab, line in zip(TABS[1:], names, strict=False)] == [True] * 6
    assert "rank" in names[-1]  # the overview
    assert "[system]" in shown.press("left")[2]
    assert "[logs]" in shown.press("backtab")[2]


def test_many_ranks_are_paged(tmp_path, show):
    """Page keys move by one page and stop at both ends."""
    shown = show(rich_run(tmp_path / "run", ranks=100, steps=60, user_ms=0))
    first = shown.press("r")

    def numbers(lines):
        return [int(line.split()[0]) for line in lines[4:-3]]

    assert numbers(first) == list(range(17))
    assert numbers(shown.press("pagedown")) == list(range(17, 34))
    assert numbers(shown.press("down", "j", "up")) == list(range(18, 35))
    assert numbers(shown.press("end")) == list(range(83, 100))
    assert numbers(shown.press("pagedown", "down")) == list(range(83, 100))
    assert numbers(shown.press("pageup")) == list(range(66, 83))
    assert numbers(shown.press("home", "up")) == list(range(17))
    assert shown.press("g")[-2] == " rows 1-17 of 100"


def test_help_explains_the_keys(tmp_path, show):
    """The next key closes the help and does nothing else."""
    shown = show(rich_run(tmp_path / "run"))
    shown.press("m")

    assert any("o p r m t l s               the table with this letter" in line for line in shown.press("?"))
    assert "[memory]" in shown.press("p")[2]


def test_every_size_is_drawn(tmp_path, show, terminal):
    """After a resize the next draw fits; a small terminal shows the size that is needed."""
    shown = show(rich_run(tmp_path / "run"))
    shown.press("r")
    for columns, rows in ((60, 9), (80, 24), (70, 12)):
        terminal.resize(columns, rows)
        assert shown.screen.key(1.0) == "resize"
        lines = shown.press("resize")
        assert "[ranks]" in lines[2]
        assert "q quits" in lines[rows - 1]

    terminal.resize(40, 6)
    assert shown.press()[0].startswith("needs 60 x 9 ")


def test_run_without_a_step(tmp_path, show):
    """Before the store exists, and before the first step, every table shows a message."""
    shown = show(tmp_path)
    for key in "oprmtls":
        assert any(line for line in shown.press(key))


def test_keys_come_by_name(tmp_path, show, terminal):
    """A sequence that arrives in parts is one key, not Escape; several keys at once are all kept."""
    shown = show(rich_run(tmp_path / "run"))
    os.write(terminal.master, b"\x1b[6~jj")

    assert [shown.screen.key(5.0) for _ in range(3)] == ["pagedown", "j", "j"]
    assert shown.screen.key(0.0) is None
    os.write(terminal.master, b"\x1b")
    assert shown.screen.key(5.0) == "escape"
