"""What logging costs the training process, and whether what was logged arrives; with the libraries themselves beside.

    python benchmarks/tracking.py [--only caller memory steps delivered] [--json FILE]

Every library and every case has a process of its own. `caller` times each call of a library as a training makes it;
`memory` is what the training process grows by, over torch; `steps` compares a training's steps while all five trackers
deliver and while they are halted, block by block; `delivered` counts the values in an MLflow database after calls back
to back, an exit without stop, a SIGKILL, forked children, and a tracker that was down for the whole run.

The peer, tracelet 0.0.9, cannot be installed: neither its wheel nor its source archive holds a module. The figures of
its page in the documentation come from its repository.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

PYTHON = sys.executable
BACKENDS = ("mlflow", "wandb", "clearml", "aim", "tensorboard")

CALLER_HEAD = """
import json, os, sys, time
folder, count, pause = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
clock = time.perf_counter_ns

def measure(call, finish=lambda: None):
    took = [0] * count
    for i in range(count // 10):
        call("warm", 0.5, i)
    for i in range(count):
        value = i * 0.001
        start = clock()
        call("loss", value, i)
        took[i] = clock() - start
        if pause:
            time.sleep(pause)
    finish()
    took.sort()
    print(json.dumps({"p50": took[count // 2] / 1e3, "p99": took[count * 99 // 100] / 1e3, "max": took[-1] / 1e3}))
    sys.stdout.flush()
"""

# name -> (calls, code)
CALLERS: dict[str, tuple[int, str]] = {
    "traceml": (
        200_000,
        """
import traceml
traceml.log_metric("first", 1.0, 0)
measure(traceml.log_metric, traceml.shutdown)
""",
    ),
    "traceml, Experiment, mlflow + tensorboard on": (
        200_000,
        """
import traceml
with traceml.Experiment("caller", backend=["mlflow", "tensorboard"]) as experiment:
    measure(experiment.log_metric)
""",
    ),
    "list.append (floor)": (
        200_000,
        """
rows = []
measure(lambda name, value, step: rows.append((name, value, step)))
""",
    ),
    "wandb offline": (
        20_000,
        """
import wandb
run = wandb.init(project="p", mode="offline", dir=folder, settings=wandb.Settings(console="off"))
measure(lambda name, value, step: run.log({name: value}), run.finish)
""",
    ),
    "mlflow, sqlite": (
        200,
        """
import mlflow
mlflow.set_tracking_uri(f"sqlite:///{folder}/m.db")
mlflow.set_experiment("p")
mlflow.start_run()
measure(lambda name, value, step: mlflow.log_metric(name, value, step), mlflow.end_run)
""",
    ),
    "clearml offline": (
        1_000,
        """
from clearml import Task
Task.set_offline(True)
task = Task.init("p", "t", auto_connect_frameworks=False, auto_connect_arg_parser=False, auto_resource_monitoring=False)
logger = task.get_logger()
measure(lambda name, value, step: logger.report_scalar(name, name, value, step), task.close)
""",
    ),
    "aim": (
        5_000,
        """
import aim
run = aim.Run(repo=folder, system_tracking_interval=None, log_system_params=False, capture_terminal_logs=False)
measure(lambda name, value, step: run.track(value, name=name, step=step), run.close)
""",
    ),
    "SummaryWriter (torch)": (
        20_000,
        """
from torch.utils.tensorboard import SummaryWriter
writer = SummaryWriter(folder)
measure(writer.add_scalar, writer.close)
""",
    ),
    "SummaryWriter, captured by traceml": (
        20_000,
        """
import traceml
traceml.init(local=True, backend=["jsonl"])
from torch.utils.tensorboard import SummaryWriter
writer = SummaryWriter(folder)
measure(writer.add_scalar, lambda: (writer.close(), traceml.shutdown()))
""",
    ),
}

# Called back to back only: these hold the caller up for longer than a millisecond.
SLOW = ("mlflow, sqlite", "clearml offline")

MEMORY = """
import json, os, sys, time
import torch
torch.zeros(8).sum()

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

before, start = resident(), time.perf_counter()
import traceml
log = traceml.log_metric
imported = time.perf_counter() - start
with traceml.Experiment("memory", backend=json.loads(sys.argv[1])):
    opened = time.perf_counter() - start - imported
    modules = [name for name in ("mlflow", "wandb", "clearml", "aim", "tensorboard", "pydantic") if name in sys.modules]
    for i in range(100_000):
        log("loss", i * 0.1, i)
    grown = resident() - before
print(json.dumps({"import_ms": imported * 1e3, "open_ms": opened * 1e3, "mb": grown / 1e6, "modules": modules}))
"""

STEPS = """
import glob, json, os, signal, statistics, sys, time
import torch
torch.set_num_threads(1)
import traceml
backends, rounds = json.loads(sys.argv[1]), int(sys.argv[2])
model = torch.nn.Sequential(*[torch.nn.Linear(256, 256) for _ in range(4)])
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
x, y = torch.randn(128, 256), torch.randn(128, 256)
clock, at = time.perf_counter_ns, 0

def block(seconds):
    global at
    took, end = [], clock() + int(seconds * 1e9)
    while clock() < end:
        start = clock()
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        traceml.log_metric("loss", loss, at)
        took.append(clock() - start)
        at += 1
    return statistics.median(took) / 1e3

def states():
    return [json.load(open(path)) for path in glob.glob("traceml_runs/*/trackers/*.state.json")]

def send(number):
    for state in states():
        os.killpg(state["pid"], number)  # a delivery leads its session, with whatever its library starts

traceml.log_metric("first", 0.0, 0)
block(2)
before = block(3)
with traceml.Experiment("steps", backend=backends):
    starting = []
    while len(starting) < 100 and not (len(states()) == len(backends) and all(each["delivered"] for each in states())):
        starting.append(block(0.5))
    with_them, without = [], []
    for _ in range(rounds):
        with_them.append(block(1))
        send(signal.SIGSTOP)
        without.append(block(1))
        send(signal.SIGCONT)
print(json.dumps({"before": before, "starting": starting, "with": with_them, "without": without}))
"""

# name -> (values logged, code); each logs `loss` at steps 0, 1, 2, …
CASES: dict[str, tuple[int, str]] = {
    "2,000 back to back, then stop": (
        2000,
        """
with traceml.Experiment("case", backend=["mlflow"]) as experiment:
    for i in range(2000):
        experiment.log_metric("loss", i * 0.1, i)
""",
    ),
    "1,000 at 1 kHz, exit without stop": (
        1000,
        """
traceml.start_logging("case", backend=["mlflow"])
for i in range(1000):
    traceml.log_metric("loss", i * 0.1, i)
    time.sleep(0.001)
""",
    ),
    "SIGKILL after 1,000 at 1 kHz": (
        1000,
        """
traceml.start_logging("case", backend=["mlflow"])
for i in range(1000):
    traceml.log_metric("loss", i * 0.1, i)
    time.sleep(0.001)
os.kill(os.getpid(), 9)
""",
    ),
    "100 from 4 forked children": (
        100,
        """
with traceml.Experiment("case", backend=["mlflow"]) as experiment:
    for child in range(4):
        if os.fork() == 0:
            for i in range(child * 25, child * 25 + 25):
                experiment.log_metric("loss", i * 0.1, i)
            os._exit(0)
    for child in range(4):
        os.wait()
""",
    ),
    "tracker down for the whole run, then traceml sync": (
        1000,
        """
with traceml.Experiment("case", backend=["mlflow"]) as experiment:
    for i in range(1000):
        experiment.log_metric("loss", i * 0.1, i)
""",
    ),
}

READ = """
import json, sys
import mlflow
client = mlflow.MlflowClient(sys.argv[1])
values = []
for experiment in client.search_experiments():
    for run in client.search_runs([experiment.experiment_id]):
        names = [name for name in run.data.metrics if name == "loss" or name.startswith("loss/")]
        values += [(row.step, row.value) for name in names for row in client.get_metric_history(run.info.run_id, name)]
print(json.dumps(sorted(values)))
"""


def main() -> int:
    options = _options()
    found: dict[str, Any] = {}
    parts: dict[str, Callable[[argparse.Namespace], Any]] = {
        "caller": measure_callers,
        "memory": measure_memory,
        "steps": measure_steps,
        "delivered": measure_delivered,
        "files": measure_files,
    }
    for name in options.only or parts:
        found[name] = parts[name](options)

    if options.json:
        options.json.write_text(json.dumps(found))

    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=["caller", "memory", "steps", "delivered", "files"])
    parser.add_argument(
        "--rounds", type=int, default=5, help="processes for memory; four pairs of blocks each for steps"
    )
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def measure_callers(_: argparse.Namespace) -> dict[str, Any]:
    """Every library, called back to back and every millisecond."""
    found = {}
    for name, (count, code) in CALLERS.items():
        paces = (("back to back", 0.0, count), ("every ms", 0.001, 2000))
        for pace, pause, calls in paces[: 1 if name in SLOW else 2]:
            with tempfile.TemporaryDirectory() as folder:
                one = _run(CALLER_HEAD + code, Path(folder), folder, str(calls), str(pause))

            found[f"{name}, {pace}"] = one
            print(
                f"{name:45} {pace:13} p50 {one['p50']:10.2f} us   p99 {one['p99']:10.1f} us   max {one['max']:10.0f} us"
            )

    ours = found["traceml, back to back"]["p50"]
    ratios = ", ".join(f"{name} {found[f'{name}, back to back']['p50'] / ours:,.0f} x" for name in list(CALLERS)[3:8])
    print(f"ratios of the medians to ours (goal: 1 us, p99 10 us): {ratios}")
    return found


def measure_memory(options: argparse.Namespace) -> dict[str, Any]:
    """What a training process grows by over torch."""
    rounds = []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            rounds.append(_run(MEMORY, Path(folder), json.dumps(list(BACKENDS))))
            _end_deliveries(folder)  # they would take the cores from the next process

    found = {key: statistics.median(one[key] for one in rounds) for key in ("import_ms", "open_ms", "mb")}
    libraries = sorted({module for one in rounds for module in one["modules"]})
    print(
        f"training process: import {found['import_ms']:.1f} ms (goal 50), opened in {found['open_ms']:.0f} ms, "
        f"{found['mb']:.1f} MB more than torch (goal 10), libraries of trackers imported: {libraries or 'none'}"
    )
    return found


def measure_steps(options: argparse.Namespace) -> dict[str, Any]:
    """One training with all five trackers on, whose deliveries are halted every other second."""
    with tempfile.TemporaryDirectory() as folder:
        one: dict[str, Any] = _run(STEPS, Path(folder), json.dumps(list(BACKENDS)), str(options.rounds * 4))

    base = statistics.median(one["without"])
    added = statistics.median(a - b for a, b in zip(one["with"], one["without"], strict=True))
    starting = statistics.median(one["starting"]) - one["before"]
    print(
        f"step of {base:.0f} us: all five trackers add {added:+.1f} us ({added / base:+.2%}, median of "
        f"{len(one['with'])} pairs of blocks; goal: no change), {starting:+.1f} us in the "
        f"{len(one['starting']) * 0.5:.0f} s in which their libraries start"
    )
    return one


def measure_delivered(_: argparse.Namespace) -> dict[str, Any]:
    """Values in MLflow's database against values logged, for each case."""
    found = {}
    for name, (count, code) in CASES.items():
        with tempfile.TemporaryDirectory() as path:
            folder = Path(path)
            database = folder / "m.db"
            is_down = "down" in name
            uri = f"sqlite:///{folder / 'away' / 'm.db' if is_down else database}"
            if is_down:
                (folder / "away").write_text("")  # a file where a folder must be: the database cannot be opened

            head = "import os, time, traceml\n"
            (folder / "traceml.toml").write_text(f'[backends.mlflow]\ntracking_uri = "{uri}"\n')
            _run(head + code, folder, check=name.startswith("SIGKILL") is False)
            if is_down:
                (folder / "away").unlink()
                (folder / "away").mkdir()
                database = folder / "away" / "m.db"

            values = _arrived(folder, database)
            expected = [[i, i * 0.1] for i in range(count)]
            right = sum(value in values for value in expected)
            found[name] = {"logged": count, "delivered": len(values), "equal": right}
            print(f"{name:52} logged {count:5}, delivered {len(values):5}, equal {right:5}")

    return found


def measure_files(_: argparse.Namespace) -> dict[str, Any]:
    """What compressing artifacts at rest would save and cost: beside it, how an artifact comes into the folder now."""
    import numpy as np
    import zstandard

    generator = np.random.default_rng(0)
    lines = (json.dumps({"step": i, "loss": value}) for i, value in enumerate(generator.random(1_500_000).tolist()))
    kinds = {
        "weights, float32": generator.standard_normal(16_000_000, dtype=np.float32).tobytes(),
        "a log, JSON lines": "\n".join(lines).encode(),
        "a PNG-like file": generator.bytes(64_000_000),
    }
    found = {}
    for name, data in kinds.items():
        pack_s, packed = _processor_s(partial(zstandard.ZstdCompressor(level=1).compress, data))
        unpack_s, _ = _processor_s(partial(zstandard.ZstdDecompressor().decompress, packed))
        gb = len(data) / 1e9
        found[name] = told = {
            "share": len(packed) / len(data), "pack_s_per_gb": pack_s / gb, "unpack_s_per_gb": unpack_s / gb,
        }  # fmt: skip
        print(
            f"{name}: zstd leaves {told['share']:.0%}; processor time per GB: {told['pack_s_per_gb']:.1f} s once, "
            f"{told['unpack_s_per_gb']:.1f} s per tracker and try"
        )

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "spooled")
        path.write_bytes(kinds["weights, float32"])
        move_s, _ = _processor_s(partial(path.replace, Path(folder, "artifact")))

    print(f"now: moved into the run's folder in {1e6 * move_s:.0f} us, and given to each tracker as it lies there")
    return found


def _processor_s(call: Callable[[], Any]) -> tuple[float, Any]:
    """Return the processor time of a call, and what it returned."""
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def _arrived(folder: Path, database: Path) -> list[list[float]]:
    """Return what is in the database once everything is delivered, by itself or by `traceml sync`."""
    for is_synced in (False, True):
        if is_synced:
            command = [PYTHON, "-m", "traceml", "sync"]
            subprocess.run(command, cwd=folder, env=_environ(folder), capture_output=True, check=False, timeout=300)

        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not _is_done(folder):
            time.sleep(0.2)

        if _is_done(folder):
            break

    return _run(READ, folder, f"sqlite:///{database}") if database.exists() else []


def _is_done(folder: Path) -> bool:
    states = [json.loads(path.read_text()) for path in folder.glob("traceml_runs/*/trackers/mlflow.state.json")]
    return bool(states) and all(state["phase"] == "done" for state in states)


def _environ(folder: Path) -> dict[str, str]:
    dropped = ("TRACEML_", "WANDB_", "MLFLOW_", "CLEARML_", "AIM_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    own = {"TRACEML_PORT": str(_free_port()), "XDG_CONFIG_HOME": str(folder), "OMP_NUM_THREADS": "1"}
    quiet = {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    offline = {"WANDB_MODE": "offline", "CLEARML_OFFLINE_MODE": "1", "CLEARML_CACHE_DIR": str(folder / "clearml")}
    return kept | own | quiet | offline | {"AIM_UI_TELEMETRY_ENABLED": "0"}


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _end_deliveries(folder: str) -> None:
    """End the processes that still deliver what was logged in a folder."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            if folder.encode() in path.read_bytes():
                os.kill(int(path.parent.name), signal.SIGKILL)


def _run(code: str, folder: Path, *arguments: str, check: bool = True) -> Any:
    """Run code as a script of its own; return what its last line says as JSON."""
    script = folder / "script.py"
    script.write_text(code)
    done = subprocess.run(
        [PYTHON, str(script), *arguments],
        cwd=folder, env=_environ(folder), capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    if check and done.returncode != 0:
        raise SystemExit(f"{code}\nfailed with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")

    lines = [line for line in done.stdout.splitlines() if line.startswith(("{", "["))]
    return json.loads(lines[-1]) if lines else None


if __name__ == "__main__":
    sys.exit(main())
