"""What a rank of a job that hangs does when the aggregator tells it to."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from traceml.recorder.hang_commands import print_stuck

SCRIPT = """
import multiprocessing, signal, subprocess, time
from traceml.recorder.hang_commands import abort_process

def wait():
    signal.pause()

worker = multiprocessing.get_context("fork").Process(target=wait, daemon=True)
worker.start()
subprocess.Popen(["sh", "-c", "sleep 600 & wait"])
print(worker.pid, flush=True)
calls = []
abort_process(lambda delay_s, call: calls.append((delay_s, call)))
assert [delay_s for delay_s, _ in calls] == sorted(delay_s for delay_s, _ in calls)
calls[0][1]()
signal.pause()
"""


@pytest.mark.process
def test_the_process_ends_with_its_workers_and_programs():
    """By SIGTERM; one that is stuck would keep the output open for ever."""
    ended = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=240, check=False)

    assert ended.returncode == -signal.SIGTERM, ended.stderr
    assert ended.stdout.strip().isdecimal()


def test_a_hang_is_told_on_standard_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Also what a terminal would take for its own commands, as it comes over a wire."""
    printed: list[str] = []
    for facts in ({"kind": "HANG", "headline": "Rank 1 blocks the others, in a.py:3\x1b[2J"}, {}):
        assert print_stuck({**facts, "run_dir": str(tmp_path / "a run")}, lambda: printed.append("")) == {}
        for thread in threading.enumerate():
            if thread.name == "traceml-notice":
                thread.join()

    assert len(printed) == 2
    first, second = capsys.readouterr().err.splitlines()
    command = f"`traceml report '{tmp_path}/a run'`"
    assert first.startswith("traceml: HANG: Rank 1 blocks the others, in a.py:3")
    assert first.endswith(f"; {command} says why and what to do")
    assert second == f"traceml: the job continues; {command} says what it waited for"
    assert "\x1b" not in first
