"""`traceml top` in tmux, beside a real training."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from tests.end_to_end.conftest import TINY

_COLOR = re.compile(r"\x1b\[(?:[\d;]*;)?(?:3[0-7]|4[0-7]|9[0-7])m")


class Tmux:
    """A terminal of 80 x 24 in a server of its own."""

    def __init__(self, folder) -> None:
        self.socket = str(folder / "tmux")
        self("-f", "/dev/null", "new-session", "-d", "-s", "top", "-x", "80", "-y", "24", "-c", str(folder), "sh")

    def __call__(self, *words: str) -> str:
        command = ["tmux", "-S", self.socket, *words]
        environ = {key: value for key, value in os.environ.items() if key != "TMUX" and not key.startswith("TRACEML_")}
        return subprocess.run(command, check=True, capture_output=True, text=True, env=environ).stdout

    def type(self, *keys: str) -> None:
        self("send-keys", "-t", "top", *keys)

    def until(self, condition: Callable[[list[str]], bool], *, colors: bool = False) -> list[str]:
        """Look until the screen is as wanted; return its lines."""
        deadline = time.monotonic() + 120
        while not condition(lines := self("capture-pane", "-p", *(["-e"] if colors else []), "-t", "top").split("\n")):
            assert time.monotonic() < deadline, "\n".join(lines)
            time.sleep(0.05)

        return lines


@pytest.fixture
def tmux(tmp_path) -> Iterator[Tmux]:
    shown = Tmux(tmp_path)
    yield shown
    shown("kill-server")


def has(text: str) -> Callable[[list[str]], bool]:
    return lambda lines: any(text in line for line in lines)


def test_top_beside_a_running_job(tmp_path, tmux, traceml):
    """Every table of two live ranks, by keys, at 80 x 24 and after a resize; without colours where none are wanted.

    When the job ends, the screen is left and its card stands in the terminal.
    """
    words = ["run", "--nproc-per-node", "2", "--live", "none", TINY, "--steps", "50000", "--pause", "0.01"]
    job = traceml.start(*words, "--marker", "marker")
    job.pid_of(1)
    tmux.type(f"NO_COLOR=1 {shlex.quote(sys.executable)} -m traceml top", "Enter")

    overview = tmux.until(lambda lines: has("so far")(lines) and has("steps/s")(lines) and has(" 1    ")(lines))
    assert "2 ranks, running" in overview[0]
    tmux.type("r")
    ranks = tmux.until(lambda lines: "[ranks]" in lines[2] and " running" in lines[5])
    assert [line.split()[0] for line in ranks[4:6]] == ["0", "1"]
    tmux.type("p")
    assert tmux.until(has("backward"))[2].startswith(" overview [phases]")
    tmux.type("m")
    tmux.until(lambda lines: "[memory]" in lines[2] and "MiB" in lines[4])
    tmux.type("Right")
    tmux.until(has("traceml/loss"))
    tmux.type("Right")
    tmux.until(lambda lines: "[logs]" in lines[2] and has("DataLoader")(lines))
    tmux.type("s")
    system = tmux.until(lambda lines: "[system]" in lines[2] and "%" in lines[4])
    assert not _COLOR.search(tmux("capture-pane", "-p", "-e", "-t", "top"))
    assert "q quits; the job continues" in system[23]

    tmux("resize-window", "-t", "top", "-x", "110", "-y", "30")
    tmux.until(lambda lines: "q quits" in lines[29] and len(lines[0]) == 110)
    tmux.type("?")
    tmux.until(has("PgDn PgUp"))
    tmux.type("q", "q")
    tmux.until(lambda lines: not has("traceml ─")(lines))
    assert job.process.poll() is None

    tmux.type(f"env -u NO_COLOR {shlex.quote(sys.executable)} -m traceml top", "Enter")
    tmux.until(lambda lines: has("q quits")(lines) and has("so far")(lines))
    assert _COLOR.search(tmux("capture-pane", "-p", "-e", "-t", "top"))
    tmux.type("p")
    tmux.until(lambda lines: "[phases]" in lines[2])
    job.process.send_signal(signal.SIGINT)
    job.end()
    tmux.until(has("traceml report"))
