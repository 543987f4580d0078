"""How fast what was logged reaches each tracker: our delivery process, and the tracker's own calls.

    python benchmarks/delivery.py [BACKEND ...] [--rows 60000] [--rounds 3] [--json FILE]

Ours is the real process over a real store, `python -m traceml.track.delivery`, to the real tracker, timed from its
first confirmed batch to its end, the run's finish included; imports and connecting are told apart. The bare calls run
in a process of their own, timed from the first call until the tracker has finished the run: one call per value, as a
script logs, and for MLflow also the most that its client can do, `log_batch` of 1,000 that are ready in memory. All
take turns, at the same priority. Trackers that are not installed are left out and said.

Tracelet 0.0.9 would be the peer, but its wheel and its source distribution on PyPI hold no code, so there is nothing to
install and measure.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.track.fabricated import LoggedRun  # noqa: E402
from tests.track.servers import MLflowServer  # noqa: E402

from traceml.track.tracker_state import TrackerState  # noqa: E402

# Which library, rows for the bare calls (some need milliseconds each), and our goal in rows/s.
TRACKERS: dict[str, tuple[str, int, int | None]] = {
    "mlflow-server": ("mlflow", 400, 10_000),
    "mlflow-sqlite": ("mlflow", 400, 15_000),
    "wandb": ("wandb", 10_000, 12_000),
    "aim": ("aim", 10_000, 10_000),
    "tensorboard": ("tensorboard", 30_000, 25_000),
    "clearml": ("clearml", 2_000, None),
    "jsonl": ("json", 50_000, None),
}

# Rows for the bare calls in batches.
BATCHED_ROWS = 20_000

BARE = {
    "mlflow": """
        import mlflow
        mlflow.set_tracking_uri(sys.argv[3])
        mlflow.set_experiment("bare")
        run = mlflow.start_run()
        begin()
        for i in range(n):
            mlflow.log_metric("loss", i * 0.37, step=i)
        mlflow.end_run()
    """,
    "mlflow-batches": """
        from mlflow import MlflowClient
        from mlflow.entities import Metric
        client = MlflowClient(sys.argv[3])
        run = client.create_run(client.create_experiment(f"batches-{time.time_ns()}")).info.run_id
        begin()
        for first in range(0, n, 1000):
            rows = [Metric("loss", i * 0.37, 1_700_000_000_000 + i, i) for i in range(first, first + 1000)]
            client.log_batch(run, rows)
        client.set_terminated(run)
    """,
    "wandb": """
        import wandb
        run = wandb.init(project="bare", mode="offline", dir=sys.argv[2], settings=wandb.Settings(console="off"))
        begin()
        for i in range(n):
            run.log({"loss": i * 0.37}, step=i)
        run.finish()
    """,
    "aim": """
        import aim
        run = aim.Run(repo=sys.argv[2], system_tracking_interval=None, capture_terminal_logs=False)
        begin()
        for i in range(n):
            run.track(i * 0.37, name="loss", step=i)
        run.close()
    """,
    "tensorboard": """
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
        writer = EventFileWriter(sys.argv[2])
        begin()
        for i in range(n):
            value = Summary.Value(tag="loss", simple_value=i * 0.37)
            writer.add_event(Event(wall_time=time.time(), step=i, summary=Summary(value=[value])))
        writer.close()
    """,
    "clearml": """
        from clearml import Task
        Task.set_offline(True)
        task = Task.init("bare", "bare", auto_connect_frameworks=False, auto_resource_monitoring=False)
        logger = task.get_logger()
        begin()
        for i in range(n):
            logger.report_scalar("loss", "loss", i * 0.37, i)
        task.close()
    """,
    "json": """
        import json
        file = open(sys.argv[2] + "/bare.jsonl", "a")
        begin()
        for i in range(n):
            file.write(json.dumps({"name": "loss", "value": i * 0.37, "step": i, "timestamp": time.time()}) + "\\n")
            file.flush()
        file.close()
    """,
}


def run_of(folder: Path, backend: str, rows: int, uri: str | None) -> Path:
    """Write a finished run that logged so many values of one name."""
    number = time.time_ns()  # each is another run to a server that outlives it
    run = LoggedRun(folder / "runs" / f"20260101-000000-delivery-{number:x}")
    options = {"mlflow": {"tracking_uri": uri}} if uri else {}
    run.experiment([backend], id=f"bench{number:x}", options=options, metrics_interval=1e9, track_system=False)
    run.metrics({"loss": [i * 0.37 for i in range(rows)]})
    return run.end()


def environment(folder: Path) -> dict[str, str]:
    """Return an environment in which trackers stay offline and within a folder."""
    offline = {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "CLEARML_OFFLINE_MODE": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    return {**os.environ, **offline, "CLEARML_CACHE_DIR": str(folder / "cache"), "AIM_UI_TELEMETRY_ENABLED": "0"}


def ours(folder: Path, backend: str, rows: int, uri: str | None) -> tuple[float, float]:
    """Deliver a run of so many rows; return rows per second, and the seconds that are paid once."""
    run_dir = run_of(folder, backend, rows, uri)
    command = [sys.executable, "-m", "traceml.track.delivery", str(run_dir), backend, "--nice", "0"]
    started, first, first_rows = time.perf_counter(), 0.0, 0
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(command, env=environment(folder), stdout=log, stderr=log)
        while process.poll() is None:
            if not first_rows:
                first_rows = TrackerState.load(run_dir, backend).delivered
                first = time.perf_counter()

            time.sleep(0.01)

        ended = time.perf_counter()
        state = TrackerState.load(run_dir, backend)
        if process.returncode != 0 or state.delivered < rows or not 0 < first_rows < rows:
            log.seek(0)
            raise SystemExit(
                f"{backend}: {first_rows}, {state.delivered} of {rows} rows delivered\n{log.read()[-2000:]}"
            )

    rate = (rows - first_rows) / (ended - first)
    return rate, ended - started - rows / rate


def bare(folder: Path, calls: str, rows: int, uri: str | None) -> float:
    """Log rows with the tracker's own calls; return the rows per second from the first call to the finished run."""
    lines = [line.removeprefix("        ") for line in BARE[calls].splitlines()]
    head = "import sys, time\nn = int(sys.argv[1])\ndef begin():\n    global t\n    t = time.perf_counter()\n"
    code = head + "\n".join(lines) + "\nprint('seconds', time.perf_counter() - t)\n"
    command = [sys.executable, "-c", code, str(rows), str(folder), *([uri] if uri else [])]
    out = subprocess.run(
        command, env=environment(folder), cwd=folder, capture_output=True, text=True, check=True
    ).stdout
    return rows / float(out.rpartition("seconds")[2])


def measure(name: str, rows: int, rounds: int, server: MLflowServer | None) -> dict[str, Any]:
    """Return rows per second of both, the median of the rounds."""
    library, bare_rows, goal = TRACKERS[name]
    backend = name.partition("-")[0]
    batched = f"{library}-batches"
    found: dict[str, list[float]] = {"ours": [], "bare": [], "batched": [], "once_s": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            uri = server.url if server is not None else f"sqlite:///{place}/bench.db" if library == "mlflow" else None
            rate, once_s = ours(folder, backend, rows, uri)
            found["ours"].append(rate)
            found["once_s"].append(once_s)
            (folder / "bare").mkdir()
            found["bare"].append(bare(folder / "bare", library, bare_rows, uri))
            if batched in BARE:
                found["batched"].append(bare(folder / "bare", batched, BATCHED_ROWS, uri))

    result: dict[str, Any] = {key: round(statistics.median(values), 1) for key, values in found.items() if values}
    result["ratio"] = round(result["ours"] / result["bare"], 1)
    if batched in BARE:
        result["batched_ratio"] = round(result["ours"] / result["batched"], 2)

    return {"tracker": name, "rows": rows, "goal": goal, **result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backends", nargs="*", metavar="BACKEND", help=", ".join(TRACKERS))
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    if unknown := set(arguments.backends) - set(TRACKERS):
        parser.error(f"no tracker named {', '.join(sorted(unknown))}")

    results = []
    print(f"{arguments.rows} rows, median of {arguments.rounds}")
    print("tracker          ours rows/s   goal     bare rows/s    ratio   in batches   ratio   paid once s")
    for name in arguments.backends or TRACKERS:
        if find_spec(TRACKERS[name][0]) is None:
            print(f"{name:15s}  not installed: pip install 'traceml-torch[{TRACKERS[name][0]}]'")
            continue

        with tempfile.TemporaryDirectory() as place:
            server = MLflowServer(Path(place)).start() if name == "mlflow-server" else None
            try:
                got = measure(name, arguments.rows, arguments.rounds, server)
            finally:
                if server is not None:
                    server.kill()

        results.append(got)
        goal = f"{got['goal']:,}" if got["goal"] else "-"
        batches = (
            f"{got['batched']:10,.0f}   {got['batched_ratio']:5.2f}" if "batched" in got else f"{'-':>10s}{'-':>8s}"
        )
        print(
            f"{name:15s}  {got['ours']:11,.0f}   {goal:>6s}   {got['bare']:11,.0f}   {got['ratio']:6.1f}   {batches}"
            f"   {got['once_s']:8.2f}",
            flush=True,
        )

    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
