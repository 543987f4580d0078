"""The real delivery process, killed while it delivers to a real tracker: nothing is missing, nothing is there twice."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.eventually import eventually
from tests.track.fabricated import LoggedRun, delivering, state_of
from tests.track.readers import READERS, Value

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"),
    pytest.mark.timeout(240),
]

STEPS = 3_000
KILLS = 2
# After a death W&B's run is written anew from its first row; one death shows it.
ONCE = {"wandb"}


def _logged(tmp_path: Path, backend: str) -> tuple[LoggedRun, list[Value]]:
    """Write a run of two ranks that goes on: float32 values, steps that come twice and go back."""
    values = [float(np.float32(i / 7)) for i in range(STEPS)]
    run = LoggedRun(tmp_path / "runs" / "20260101-000000-exact-abcd", ended=None, state="running")
    expected: list[Value] = []
    for rank in range(2):
        run.experiment([backend], rank=rank, id="x", metrics_interval=1e6)
        for part, first_step in enumerate((0, STEPS // 2)):
            series = [value + part for value in values]
            run.metrics({"loss": series, "val/acc": series[: STEPS // 5]}, rank=rank, first_step=first_step)
            suffix = f"/rank_{rank}" if rank else ""
            expected += [(f"loss{suffix}", first_step + i, value) for i, value in enumerate(series)]
            expected += [(f"val/acc{suffix}", first_step + i, value) for i, value in enumerate(series[: STEPS // 5])]

    return run, sorted((name, step, float(np.float32(value))) for name, step, value in expected)


@pytest.mark.parametrize("backend", sorted(READERS))
def test_a_killed_delivery_is_exact(backend: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Killed after some rows have arrived, again and again; the last one finishes."""
    if backend == "aim" and sys.version_info >= (3, 13):
        pytest.skip("there is no Aim for this Python")

    run, expected = _logged(tmp_path, backend)
    if backend == "mlflow":
        shutil.copy(request.getfixturevalue("empty_mlflow"), run.path.with_name("mlflow.db"))

    environment = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "CLEARML_"))}
    environment |= {"WANDB_MODE": "offline", "CLEARML_OFFLINE_MODE": "1"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    kills_left = 1 if backend in ONCE else KILLS
    for attempt in range(40):
        before = state_of(run.path, backend).delivered if attempt else 0
        process = delivering(str(run.path), backend, env=environment, **pipes)
        if kills_left:  # it does not end well before the run does
            wanted = min(before + 1, len(expected))  # the one before it may have left it nothing
            eventually(lambda: process.poll() is not None or _has_delivered(run, backend, process.pid, wanted))  # noqa: B023
            time.sleep(0.01 * kills_left)  # into the next batch
            process.kill()
            kills_left -= process.wait() == -signal.SIGKILL
            if not kills_left:
                run.end()

        _, errors = process.communicate()
        if process.returncode == 0:
            break
    else:
        raise AssertionError(errors.decode()[-2000:])

    assert not kills_left
    run_dir = run.path
    state = state_of(run_dir, backend)
    (kept,) = state.experiments.values()
    found = [row for row in READERS[backend](run_dir, kept["id"]) if not row[0].startswith(("traceml/", "system/"))]
    assert sorted((name, step, float(np.float32(value))) for name, step, value in found) == expected


def _has_delivered(run: LoggedRun, backend: str, pid: int, wanted: int) -> bool:
    state = state_of(run.path, backend)
    return state.pid == pid and state.delivered >= wanted
