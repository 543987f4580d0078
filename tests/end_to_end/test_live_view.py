"""The live view of a real run on a real (pseudo-)terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.display.screen import Screen
from tests.end_to_end.conftest import TINY
from tests.forked import client as forked


class OnTerminal:
    """`traceml run` on a terminal of 80 x 24."""

    def __init__(self, folder: Path, *words: str | Path) -> None:
        self.screen = Screen(80, 24)
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
        environ = {key: value for key, value in os.environ.items() if not key.startswith("TRACEML_")}
        self.process = forked.Popen(
            [sys.executable, "-m", "traceml", "run", *map(str, words)],
            cwd=folder,
            env={**environ, "TERM": "xterm-256color", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"},
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            forks=True,
        )
        os.close(slave)

    def until(self, condition: Callable[[list[str]], bool], timeout_s: float = 120.0) -> list[str]:
        """Follow the screen until it looks as wanted; return its lines."""
        deadline = time.monotonic() + timeout_s
        while not condition(lines := self.screen.lines()):
            assert time.monotonic() < deadline, "\n".join(lines)
            if select.select([self.master], [], [], 0.1)[0]:
                self.screen.feed(os.read(self.master, 65536))

        return lines

    def end(self, timeout_s: float = 240.0) -> list[str]:
        """Follow the screen to the end; return everything that was on it, the history first."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            try:
                self.screen.feed(os.read(self.master, 65536))
            except OSError:  # EIO: the last process has closed the terminal
                break

        self.process.wait(timeout_s)
        return self.screen.history + self.screen.lines()

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.master)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[..., OnTerminal]]:
    """Start `traceml run` on a terminal; whatever happens it does not outlive the test."""
    started: list[OnTerminal] = []

    def start(*words: str | Path) -> OnTerminal:
        started.append(OnTerminal(tmp_path, *words))
        return started[-1]

    yield start
    for each in started:
        each.close()


def shows_speed(lines: list[str]) -> bool:
    return any("steps/s" in line and "- steps/s" not in line for line in lines)


def test_view_is_below_the_output_and_the_card_comes_after(terminal, tmp_path: Path) -> None:
    """While the job runs its view is at the bottom; at the end the view is gone, output and card are there."""
    looked_at = tmp_path / "looked_at"
    shown = terminal("--run-name", "seen", TINY, "--steps", "5000", "--pause", "0.02", "--until", looked_at)

    # What has been read of a frame may be its first lines only.
    lines = shown.until(lambda lines: shows_speed(lines) and lines[-1].startswith(" tracing no row lost"))
    assert lines[0].startswith("traceml: tracing this run; results in traceml_runs/")
    assert "rank 0 trains" in lines
    assert any(line.startswith("─ traceml ─ seen ─") for line in lines[-10:])

    looked_at.touch()
    seen = shown.end()
    assert shown.process.returncode == 0
    output = seen[seen.index("rank 0 trains") :]
    assert output[1].startswith("rank 0 loss ")
    assert output[2] == ""
    assert output[3].startswith("─ traceml ─ ")
    assert re.search(r"1 rank, [1-9]\d* steps, finished after", output[3])
    assert not any(line.startswith(" tracing") for line in seen)
    assert shown.screen.bottom == 24


def test_interrupt_leaves_the_terminal_as_it_was(terminal) -> None:
    """Ctrl-C ends the job; the view is taken away and the whole screen scrolls again."""
    shown = terminal(TINY, "--steps", "5000", "--pause", "0.02")
    shown.until(shows_speed)

    os.killpg(shown.process.pid, signal.SIGINT)  # as the terminal does, to the whole foreground group
    seen = shown.end()

    assert shown.process.returncode in (130, -signal.SIGINT), seen
    assert any("KeyboardInterrupt" in line for line in seen)
    assert not any(line.startswith(" tracing") for line in seen)
    assert shown.screen.bottom == 24
