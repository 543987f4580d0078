"""A training that shares its core with other processes: these are named, by who has started them."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.end_to_end.conftest import Traceml

NAME = "takes-the-core"
TAKER = f"""
import os
os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}})
open("/proc/self/comm", "w").write("{NAME}")
print("ready", flush=True)
while True:
    pass
"""
SCRIPT = """
import os, time, torch
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 256))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
end_s = time.monotonic() + 15
while time.monotonic() < end_s:
    model(torch.randn(128, 256)).pow(2).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
"""


@pytest.mark.timeout(300)
def test_processes_that_take_the_cores_are_named(traceml: Traceml, tmp_path: Path) -> None:
    """Three of them on one core leave the training a quarter of it."""
    script = tmp_path / "starves.py"
    script.write_text(SCRIPT)
    with ExitStack() as takers:
        for _ in range(3):
            taker = takers.enter_context(
                subprocess.Popen([sys.executable, "-c", TAKER], stdout=subprocess.PIPE, text=True)
            )
            takers.callback(taker.kill)
            assert taker.stdout is not None
            taker.stdout.readline()

        ended = traceml("run", script)

    found = next(each for each in ended.report["findings"] if each["kind"] == "CPU_CONTENTION")
    assert NAME in found["evidence"]["competing_processes"]
    assert NAME in found["summary"]


@pytest.mark.timeout(300)
def test_processes_that_the_script_starts_are_its_own(traceml: Traceml, tmp_path: Path) -> None:
    """Programs that make samples for it, on its core."""
    script = tmp_path / "augments.py"
    script.write_text(
        f"import subprocess, sys\nstarted = [subprocess.Popen([sys.executable, '-c', {TAKER!r}]) for _ in range(3)]\n"
        f"{SCRIPT}\nfor each in started:\n    each.kill()\n"
    )

    ended = traceml("run", script)

    found = next(each for each in ended.report["findings"] if each["kind"] == "CPU_CONTENTION")
    assert NAME in found["evidence"]["started_processes"]
    assert NAME not in found["evidence"].get("competing_processes", {})
    assert "processes that it started used" in found["summary"]
