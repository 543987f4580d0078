"""A process that is told to end, in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

SCRIPT = """
import multiprocessing, signal, subprocess, time
from traceml.recorder.process_abort import abort_process

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
