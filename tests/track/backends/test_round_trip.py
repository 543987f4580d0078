"""Every kind of value, twice under one name, through the real delivery process with restarts, read back equal."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from tests.eventually import eventually
from tests.track.contents import CONTENTS, Contents
from tests.track.fabricated import START_NS, LoggedRun, deliver, delivering, state_of
from traceml.track.tracker_state import EXIT_AGAIN

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"),
    pytest.mark.timeout(240),
]

VERDICTS = ("INSUFFICIENT_DATA", "RESIDUAL_HEAVY", "INPUT_BOUND")
SYSTEM = {"host": "node1", "cores": 8}
GIT = {"commit": "0123abcd", "branch": "main", "remote": "https://example.com/x.git", "dirty": False}
STARTED, ENDED = START_NS / 1e9, START_NS / 1e9 + 0.006  # a millisecond for each value
FACTS = {f"system/{key}": value for key, value in SYSTEM.items()} | {f"git/{key}": each for key, each in GIT.items()}


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
    run.row("params", params={"lr": 0.125 * part, "model": {"depth": part, "name": "x"}})
    run.row("tags", tags={"team": f"vision {part}"})
    run.writer.event("verdict", {"verdict": _verdict(VERDICTS[part - 1]), "step": part})
    run.writer.commit()


def _deliver_until(run: LoggedRun, backend: str, rows: int, ending: signal.Signals) -> None:
    """Let a delivery process follow the run until it has delivered so many rows, then end it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "CLEARML_"))}
    environment |= {"WANDB_MODE": "offline", "CLEARML_OFFLINE_MODE": "1"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    process = delivering(str(run.path), backend, env=environment, **pipes)

    def delivered() -> bool:
        assert process.poll() in {None, EXIT_AGAIN}, state_of(run.path, backend).error
        return process.poll() is not None or state_of(run.path, backend).passed >= rows

    try:
        eventually(delivered, timeout_s=240)
    finally:
        process.send_signal(ending)
        process.communicate()


@pytest.fixture(params=sorted(CONTENTS), scope="module")
def delivered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Contents]:
    """Log in three parts, with a killed and an ended delivery between them; return the tracker and what it holds."""
    backend: str = request.param
    if backend == "aim" and sys.version_info >= (3, 13):
        pytest.skip("there is no Aim for this Python")

    folder = tmp_path_factory.mktemp(backend)
    run = LoggedRun(folder / "runs" / "20260101-000000-round-abcd", ended=None, state="running")
    if backend == "mlflow":
        shutil.copy(request.getfixturevalue("empty_mlflow"), run.path.with_name("mlflow.db"))

    run.experiment([backend], id="x", metrics_interval=1e6, user="ada", source="train.py", tags={"team": "vision 0"})
    run.row("collected", name="system", facts=SYSTEM)
    run.row("collected", name="git", facts=GIT)
    ends = (signal.SIGKILL, signal.SIGTERM)
    for part, ending in enumerate(ends, 1):
        _log(run, part)
        _deliver_until(run, backend, 12 * part + 3, ending)

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
    _, found = delivered
    parts = (1, 2, 3)
    values = [("loss", part + i, part + 0.5 - 0.25 * i) for part in parts for i in (0, 1)]
    assert [row for row in found.metrics if not row[0].startswith("traceml/")] == sorted(values)

    where = [(part, part) for part in parts] + [(7, part) for part in parts]
    texts = [("note", step, f"text {part}") for step, part in where]
    texts += [("loss", part, f"diverged {part}") for part in parts]
    assert [row for row in found.texts if not row[0].startswith("traceml/")] == sorted(texts)
    assert [row for row in found.texts if row[0] == "traceml/verdict"] == [
        ("traceml/verdict", part, f"{kind}: it is {kind} look") for part, kind in enumerate(VERDICTS, 1)
    ]
    assert found.images == sorted(("cat", step, (80 * part, 0, 0)) for step, part in where)
    assert found.histograms == sorted(("h", step, [1.0, part]) for step, part in where)
    assert found.artifacts == {"model/weights.bin": bytes([3]) * 1000}


PARAMS = {
    "aim": {"lr": 0.375, "model": {"depth": 3, "name": "x"}},
    "clearml": {"lr": ("float", "0.375"), "model/depth": ("int", "3"), "model/name": ("str", "x")},
    "jsonl": {"lr": 0.375, "model": {"depth": 3, "name": "x"}},
    "mlflow": {"lr": "0.125", "model.depth": "1", "model.name": "x"},  # the newest are tags
    "tensorboard": {"lr": 0.375, "model/depth": 3.0, "model/name": "x"},
    "trackio": {"lr": 0.375, "model": {"depth": 3, "name": "x"}},
    "wandb": {"lr": 0.375, "model": {"depth": 3, "name": "x"}},
}


def test_parameters_are_found_as_the_trackers_users_search_them(delivered: tuple[str, Contents]) -> None:
    """Nested ones under that tracker's names, numbers as numbers, and the newest where a tracker replaces values."""
    backend, found = delivered
    assert {name: found.params.get(name) for name in PARAMS[backend]} == PARAMS[backend]
    if backend == "mlflow":
        assert {"param.lr: 0.375", "param.model.depth: 3"} <= set(found.tags)


def test_tags_are_peoples_and_the_newest(delivered: tuple[str, Contents]) -> None:
    """A tag has its last value alone, the verdict's too; facts about the machine are no tags."""
    _, found = delivered
    tags = [tag.replace(": ", ":") for tag in found.tags if not tag.startswith(("param.", "traceml/verdict_"))]
    assert tags == ["team:vision 3", "traceml/verdict:COMM_BOUND"]


def test_facts_stand_apart_from_tags(delivered: tuple[str, Contents]) -> None:
    """Facts of collectors are parameters, or have a place of their own; the verdict's words too."""
    backend, found = delivered
    if backend == "aim":
        assert found.facts == {"system": SYSTEM, "git": GIT}
    elif backend == "clearml":
        typed = {name: (type(value).__name__, str(value)) for name, value in FACTS.items()}
        assert {name: found.params[name] for name in FACTS} == typed
    elif backend == "tensorboard":
        assert {name: found.facts[name] for name in FACTS} == {name: str(value) for name, value in FACTS.items()}
        assert found.facts["traceml/verdict_next"] == "look"
    elif backend == "mlflow":
        assert {name: found.params[name] for name in FACTS} == {name: str(value) for name, value in FACTS.items()}
        assert (
            "traceml/verdict_summary: it is COMM_BOUND" in found.tags
        )  # a parameter would keep that of an earlier job
    else:
        among = found.facts if backend == "jsonl" else found.params
        assert {name: among[name] for name in FACTS} == FACTS


def test_a_run_has_the_times_of_the_training(delivered: tuple[str, Contents]) -> None:
    """Not those of the delivery, which may come a night later."""
    backend, found = delivered
    if backend in {"clearml", "wandb"}:
        assert (found.started, found.ended) == (None, None)  # they take none
    else:
        assert (found.started, found.ended) == (pytest.approx(STARTED, abs=1e-3), pytest.approx(ENDED, abs=1e-3))

    ended = {"mlflow": "FAILED", "wandb": "1"}
    assert found.state == ended.get(backend, "failed")


def test_texts_have_the_times_of_the_training(delivered: tuple[str, Contents]) -> None:
    """As values have: beside them, texts and images of a late delivery seemed to be days younger."""
    backend, found = delivered
    logged = [STARTED + 0.002 * part for part in (1, 2, 3) for _ in range(2)]
    assert found.times == pytest.approx([] if backend == "mlflow" else logged, abs=1e-3)


def test_fields_that_trackers_show_themselves(delivered: tuple[str, Contents]) -> None:
    """MLflow's columns of user and source; TensorBoard's name of the run."""
    backend, found = delivered
    if backend == "mlflow":
        assert found.system == found.system | {
            "mlflow.user": "ada",
            "mlflow.source.name": "train.py",
            "mlflow.source.type": "LOCAL",
            "mlflow.source.git.commit": "0123abcd",
            "mlflow.source.git.branch": "main",
            "mlflow.source.git.repoURL": "https://example.com/x.git",
        }
    elif backend == "tensorboard":
        assert found.system["folder"].startswith("exp-")
        assert found.system["status"] == 2
