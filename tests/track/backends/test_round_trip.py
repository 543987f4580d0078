"""Every kind of value, twice under one name, through the real delivery process with restarts, read back equal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.track.contents import CONTENTS, Contents
from tests.track.fabricated import LoggedRun, deliver, eventually, state_of
from traceml.track.tracker_state import EXIT_AGAIN

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"),
    pytest.mark.timeout(240),
]

VERDICTS = ("INSUFFICIENT_DATA", "RESIDUAL_HEAVY", "INPUT_BOUND")
# What a tracker cannot hold: it keeps the newest under a name and step, or one of each name.
KEEPS_NEWEST = {"mlflow"}


def _verdict(kind: str) -> dict[str, object]:
    return {"kind": kind, "summary": f"it is {kind}", "next": "look", "ranks": [], "phase": None}


def _log(run: LoggedRun, part: int) -> None:
    """Log every kind of value once, under the names of the parts before."""
    from PIL import Image

    artifacts = run.path / "artifacts"
    artifacts.mkdir(exist_ok=True)
    Image.new("RGB", (3, 2), (80 * part, 0, 0)).save(artifacts / f"cat{part}.png")
    (artifacts / f"weights{part}.bin").write_bytes(bytes([part]) * 1000)
    run.metrics({"loss": [part + 0.5, part + 0.25]}, first_step=part)
    run.row("value", name="loss", value=f"diverged {part}", step=part)
    for step in (part, 7):  # the second is the same in each part
        run.row("text", name="note", text=f"text {part}", step=step)
        run.row("image", name="cat", path=f"artifacts/cat{part}.png", step=step)
        run.row("histogram", name="h", counts=[1.0, part], edges=[0.0, 0.5, 1.0], step=step)

    run.row("artifact", name="model/weights.bin", path=f"artifacts/weights{part}.bin")
    run.row("params", params={"lr": 0.1 * part, "model": {"depth": part, "name": "x"}})
    run.row("tags", tags={"team": f"vision {part}"})
    run.writer.event("verdict", {"verdict": _verdict(VERDICTS[part - 1]), "step": part})
    run.writer.commit()


def _deliver_until(run: LoggedRun, backend: str, rows: int, ending: signal.Signals) -> None:
    """Let a delivery process follow the run until it has delivered so many rows, then end it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "CLEARML_"))}
    environment |= {"WANDB_MODE": "offline", "CLEARML_OFFLINE_MODE": "1"}
    command = [sys.executable, "-m", "traceml.track.delivery", str(run.path), backend]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def delivered() -> bool:
        assert process.poll() in {None, EXIT_AGAIN}, state_of(run.path, backend).error
        return process.poll() is not None or state_of(run.path, backend).passed >= rows

    try:
        eventually(delivered, 100)
    finally:
        process.send_signal(ending)
        process.communicate()


@pytest.fixture(params=sorted(CONTENTS))
def delivered(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Contents]:
    """Log in three parts, with a killed and an ended delivery between them; return the tracker and what it holds."""
    backend: str = request.param
    if backend == "aim" and sys.version_info >= (3, 13):
        pytest.skip("there is no Aim for this Python")

    run = LoggedRun(tmp_path / "runs" / "20260101-000000-round-abcd", ended=None, state="running")
    run.experiment([backend], id="x", metrics_interval=1e6)
    ends = (signal.SIGKILL, signal.SIGTERM)
    for part, ending in enumerate(ends, 1):
        _log(run, part)
        _deliver_until(run, backend, 12 * part + 1, ending)

    _log(run, 3)
    run.row("end", state="failed", values=6)
    run.end("failed")
    report = {"verdict": _verdict("COMM_BOUND"), "run": {"state": "failed"}}
    (run.path / "report.json").write_text(json.dumps(report))
    for _ in range(4):  # W&B starts over after a restart
        done = deliver(run.path, backend, WANDB_MODE="offline", CLEARML_OFFLINE_MODE="1")
        if done.returncode == 0:
            break

    state = state_of(run.path, backend)
    assert (done.returncode, state.failed, state.error) == (0, 0, ""), done.stderr[-3000:]
    (kept,) = state.experiments.values()
    return backend, CONTENTS[backend](run.path, kept["id"])


def test_everything_twice_under_one_name(delivered: tuple[str, Contents]) -> None:
    """Nothing is missing, nothing is there twice, and the newest of what can only be once."""
    backend, found = delivered
    parts = (1, 2, 3)
    values = [("loss", part + i, part + 0.5 - 0.25 * i) for part in parts for i in (0, 1)]
    assert [row for row in found.metrics if not row[0].startswith("traceml/")] == sorted(values)

    at_once = parts[-1:] if backend in KEEPS_NEWEST else parts
    where = [(part, part) for part in parts] + [(7, part) for part in at_once]
    texts = [("note", step, f"text {part}") for step, part in where]
    texts += [("loss", part, f"diverged {part}") for part in parts]
    assert [row for row in found.texts if not row[0].startswith("traceml/")] == sorted(texts)
    assert [row for row in found.texts if row[0] == "traceml/verdict"] == [
        ("traceml/verdict", part, f"{kind}: it is {kind} look") for part, kind in enumerate(VERDICTS, 1)
    ]
    assert found.images == sorted(("cat", step, (80 * part, 0, 0)) for step, part in where)
    assert found.histograms == sorted(("h", step, [1.0, part]) for step, part in where)
    assert found.artifacts == {"model/weights.bin": bytes([3]) * 1000}
