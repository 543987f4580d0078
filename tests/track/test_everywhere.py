"""One script logs to all five trackers at once, and each has all of it, once: tried as a new user would."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.track.jobs import Job
from tests.track.readers import READERS, Value, mlflow
from tests.track.servers import MLflowServer
from traceml.track.tracker_state import DeliveryPhase, states_of

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"),
    pytest.mark.timeout(400),
]

BACKENDS = ("aim", "clearml", "mlflow", "tensorboard", "wandb")
# A user's script: values of every sort, from three sources, as fast as it can, until it is told to stop.
SCRIPT = """
    import json, os, sys, time
    import numpy as np, torch, traceml

    backends = json.loads(sys.argv[1])
    tags = {"team": "vision"}
    with traceml.Experiment("everywhere", backend=list(backends), options=backends, tags=tags) as experiment:
        traceml.log_params({"lr": 0.1, "layers": [64, 64], "api_key": "sk-proj-abcdefghijklmnop0123456789ABCDEF"})
        i = 0
        while i < 1_000 or not os.path.exists("enough"):
            traceml.log_metrics({"train/loss": 1 / (i + 1), "train/accuracy %": i / 8}, step=i)
            experiment.log_metric("tensor", torch.tensor(i / 4), step=i)
            experiment.log_metric("scalar", np.float32(i / 2), step=i)
            experiment.log_metric("Größe 🙂", i, step=i)
            i += 1
            if i >= 1_000:
                time.sleep(0.02)

            with open("count.new", "w") as file:
                file.write(str(i))

            os.rename("count.new", "count")

        traceml.log_text("note", "all is well", step=i)
"""


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory, empty_mlflow: Path) -> Iterator[MLflowServer]:
    made = MLflowServer(tmp_path_factory.mktemp("mlflow"), database=empty_mlflow).start()
    yield made
    made.kill()


def expected(count: int) -> dict[str, list[tuple[int, float]]]:
    series = {
        "train/loss": [1 / (i + 1) for i in range(count)],
        "train/accuracy %": [i / 8 for i in range(count)],
        "tensor": [i / 4 for i in range(count)],
        "scalar": [i / 2 for i in range(count)],
        "Größe 🙂": [float(i) for i in range(count)],
    }
    return {name: list(enumerate(values)) for name, values in series.items()}


def by_name(values: list[Value]) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for name, step, value in values:
        if not name.startswith(("traceml/", "system/")):
            found.setdefault(name, []).append((step, value))

    return found


def single(series: list[list[tuple[int, float]]]) -> list[list[tuple[int, float]]]:
    """Return the values as float32, as TensorBoard has them, in an order that does not depend on names."""
    return sorted([(step, float(np.float32(value))) for step, value in sorted(each)] for each in series)


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="there is no Aim for this Python")
def test_one_script_and_five_trackers(server: MLflowServer, tmp_path: Path) -> None:
    """The MLflow server is killed and started again under it; nothing is missing, nothing is there twice."""
    options = {name: {} for name in BACKENDS} | {"mlflow": {"tracking_uri": server.url}}
    job = Job(tmp_path, options, code=SCRIPT, WANDB_MODE="offline", CLEARML_OFFLINE_MODE="1")
    try:
        job.wait_for(lambda: job.state("mlflow").delivered > 0, 200)
        server.kill()
        job.wait_for(lambda: job.state("mlflow").phase in {DeliveryPhase.WAITING, DeliveryPhase.OPEN})
        job.goes_on()
        server.start()
        for backend in BACKENDS:
            job.wait_for(lambda: job.state(backend).delivered > 2_000, 200)  # noqa: B023

        job.finish(timeout_s=200)
    finally:
        job.close()

    wanted = expected(job.logged)
    states = {state.backend: state for state in states_of(job.run_dir)}
    assert {name: state.phase for name, state in states.items()} == dict.fromkeys(BACKENDS, DeliveryPhase.DONE)
    for backend in BACKENDS:
        assert states[backend].delivered == 5 * job.logged + 2, backend
        (kept,) = states[backend].experiments.values()
        uri = (server.url,) if backend == "mlflow" else ()
        read = mlflow if backend == "mlflow" else READERS[backend]
        found = by_name(read(job.run_dir, kept["id"], *uri))
        assert single(list(found.values())) == single(list(wanted.values())), backend
        assert found["train/loss"][0] == (0, 1.0), backend

    audit = [json.loads(line) for line in (job.run_dir / "trackers" / "audit.jsonl").read_text().splitlines()]
    assert {line["backend"] for line in audit} == set(BACKENDS)
    assert "sk-proj" not in "".join(path.read_text() for path in (job.run_dir / "trackers").glob("*.json*"))
