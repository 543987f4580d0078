"""A training that shares its core with other processes: these are named, by who has started them."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.conftest import Traceml
from traceml.database.store.reader import StoreReader
from traceml.run_folder import STORE_NAME

NAME = "takes-the-core"
TAKER = f"""
import os
os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}})
open("/proc/self/comm", "w").write("{NAME}")
print("ready", flush=True)
while True:
    pass
"""
# It trains until the test has seen the live verdict that names them.
SCRIPT = """
import os, torch
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 256))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
while not os.path.exists("seen"):
    model(torch.randn(128, 256)).pow(2).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
"""


def contention(findings: list[dict[str, Any]]) -> dict[str, Any] | None:
    return next((each for each in findings if each["kind"] == "CPU_CONTENTION"), None)


def contention_of(traceml: Traceml, script: Path, evidence: str) -> dict[str, Any]:
    """Run the script until the processes are in that evidence of the live finding; return the report's finding."""
    running = traceml.start("run", script)
    store = running.folder / "traceml_runs" / "latest" / STORE_NAME

    def is_named() -> bool:
        if not store.exists():
            return False

        with StoreReader(store) as reader:
            event = reader.last_event("verdict")

        found = contention(event.data["findings"]) if event is not None else None
        return found is not None and NAME in found["evidence"].get(evidence, {})

    running.wait_for(is_named, "the processes to be named", 200)
    (running.folder / "seen").touch()
    found = contention(running.end().report["findings"])
    assert found is not None
    return found


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

        found = contention_of(traceml, script, "competing_processes")

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

    found = contention_of(traceml, script, "started_processes")

    assert NAME in found["evidence"]["started_processes"]
    assert NAME not in found["evidence"].get("competing_processes", {})
    assert "processes that it started used" in found["summary"]
