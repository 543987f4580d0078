"""What tracing costs around the training: imports, disabled calls, init, shutdown, memory, the recorder's thread, the
commands that show runs, and how much longer a job takes from the command line to the prompt.

    python benchmarks/startup.py [--peer] [--rounds 7] [--seconds 10] [--only NAME ...] [--json FILE]

Everything runs in fresh processes against real aggregators; what is compared alternates within one run. `--peer` adds
traceml-ai 0.5.0, installed under .bench/.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from peers import environment

BIN = Path(sys.executable).parent
PEER = "traceml-ai==0.5.0"
FORBIDDEN = ("torch", "numpy", "pydantic")

IMPORT = """
import sys, time
before = set(sys.modules)
start = time.perf_counter()
import traceml
took = time.perf_counter() - start
import json
print(json.dumps({"ms": took * 1e3, "modules": sorted(set(sys.modules) - before)}))
"""

DISABLED = """
import json, timeit, traceml
traceml.init(enabled=False)
data = [1]
@traceml.trace
def traced(): pass
def plain(): pass
def step():
    with traceml.trace_step(): pass
def phase():
    with traceml.phase("x"): pass
calls = {"is_enabled()": traceml.is_enabled, "with phase(...)": phase, "with trace_step()": step,
         "trace_data(...)": lambda: traceml.trace_data(data), "@trace function": traced,
         "log_metric(...)": lambda: traceml.log_metric("x", 1.0), "log_text(...)": lambda: traceml.log_text("x", "y")}
cost = lambda call: min(timeit.repeat(call, number=100_000, repeat=7)) / 100_000 * 1e9
base = cost(plain)
print(json.dumps({name: cost(call) - base for name, call in calls.items()}))
"""

# One Linear(64, 64) on a fixed batch: the smallest step there is, so that rows come as fast as they can.
LOOP = """
import json, os, sys, time, torch
torch.set_num_threads(1)
model = torch.nn.Linear(64, 64)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
x, y = torch.randn(32, 64), torch.randn(32, 64)
def steps(count):
    for _ in range(count):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
steps(3000)
"""

LIFE = (
    LOOP
    + """
start = time.perf_counter()
import traceml
imported = time.perf_counter()
recorder = traceml.init()
ready = time.perf_counter()
steps(1000)
stopping = time.perf_counter()
traceml.shutdown()
end = time.perf_counter()
print(json.dumps({"import_ms": (imported - start) * 1e3, "init_ms": (ready - imported) * 1e3,
                  "shutdown_ms": (end - stopping) * 1e3}))
"""
)

MEMORY = (
    LOOP
    + """
names = [sys.intern(f"a name of another library {number}") for number in range(int(sys.argv[2]))]
before = resident()
if sys.argv[1] == "traced":
    import traceml
    traceml.init()
steps(70_000)  # the ring of 65,536 rows has been written to its last page
print(json.dumps({"bytes": resident() - before}))
"""
)

THREAD = (
    LOOP
    + """
import traceml
pause, seconds = float(sys.argv[1]), float(sys.argv[2])
recorder = traceml.init()
began, done = time.perf_counter(), 0

def steps_until(end):
    global done
    while time.perf_counter() - began < end:
        steps(1)
        done += 1
        if pause:
            time.sleep(pause)

steps_until(10)
first = recorder.statistics().cpu_ns / 1e9 / 10
steps_until(10 + seconds)
took = time.perf_counter() - began
traceml.shutdown()
after = recorder.statistics()
print(json.dumps({"steps_per_s": done / took, "us_per_1000_rows": after.cpu_ns / 1e3 / after.rows_appended * 1e3,
                  "first_pct": first * 100, "later_pct": (after.cpu_ns / 1e9 - first * 10) / (took - 10) * 100,
                  "rows_lost": after.rows_lost,
                  "samplers": {s.name: s.total_ns / max(s.samples, 1) / 1e3 for s in after.samplers if s.samples}}))
"""
)

INTERNED = 4000  # more than are free in the table of interned strings after `import torch`

SCRIPT = LOOP.replace("steps(3000)", "steps(50)").replace("import json, os, sys, time, torch", "import torch")


def main() -> int:
    options = _options()
    parts: dict[str, Callable[[argparse.Namespace, Path], Any]] = {
        "import": measure_import,
        "disabled": measure_disabled,
        "life": measure_life,
        "memory": measure_memory,
        "thread": measure_thread,
        "commands": measure_commands,
        "run": measure_run,
    }
    results = {}
    for name in options.only or parts:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = parts[name](options, Path(folder))

    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1))

    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="store_true", help="also measure traceml-ai 0.5.0")
    parser.add_argument("--rounds", type=int, default=7, help="repetitions of what is measured once per process")
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="how long the recorder's thread is watched after 10 s"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="import, disabled, life, memory, thread, commands, run"
    )
    parser.add_argument("--json", type=Path, help="also write the results here")
    return parser.parse_args()


def measure_import(options: argparse.Namespace, folder: Path) -> Any:
    """`import traceml` in a bare interpreter."""
    results = [_python(IMPORT, folder) for _ in range(options.rounds)]
    took, modules = statistics.median(r["ms"] for r in results), results[0]["modules"]
    found = [name for name in FORBIDDEN if name in modules]
    print(f"import traceml: {took:.1f} ms, {len(modules)} modules, of torch, numpy, pydantic: {found or 'none'}")
    return {"ms": took, "modules": modules}


def measure_disabled(_options: argparse.Namespace, folder: Path) -> Any:
    """Calls of a script that is not traced."""
    result = _python(DISABLED, folder)
    print("disabled, ns a call: " + ", ".join(f"{name} {cost:.0f}" for name, cost in result.items()))
    return result


def measure_life(options: argparse.Namespace, folder: Path) -> Any:
    """Import, init and shutdown with torch loaded and an aggregator running."""
    with _Aggregator(folder) as environ:
        results = [_python(LIFE, folder, environ=environ) for _ in range(options.rounds)]

    medians = {name: statistics.median(r[name] for r in results) for name in results[0]}
    print("with torch loaded: " + ", ".join(f"{name.removesuffix('_ms')} {ms:.1f} ms" for name, ms in medians.items()))
    return medians


def measure_memory(options: argparse.Namespace, folder: Path) -> Any:
    """Resident memory that tracing adds to a rank, its ring written to the end.

    Python's table of interned strings grows to twice its size when it is full, which happens within the next thousand
    names after `import torch` (2.13): by tracing, or by any other library. So it is also measured where it has grown.
    """
    samples: dict[tuple[str, int], list[float]] = {
        (mode, names): [] for names in (0, INTERNED) for mode in ("plain", "traced")
    }
    with _Aggregator(folder) as environ:
        for _ in range(max(options.rounds // 2, 1)):
            for (mode, names), values in samples.items():
                values.append(_python(MEMORY, folder, mode, str(names), environ=environ)["bytes"] / 1e6)

    medians = {key: statistics.median(values) for key, values in samples.items()}
    added = {names: medians["traced", names] - medians["plain", names] for names in (0, INTERNED)}
    print(
        f"resident memory added over 70,000 steps: {added[INTERNED]:.1f} MB; {added[0]:.1f} MB where the table of "
        "interned strings grows meanwhile"
    )
    return {"grown_mb": added[INTERNED], "growing_mb": added[0]}


def measure_thread(options: argparse.Namespace, folder: Path) -> Any:
    """CPU time of the recorder's thread, at the highest rate and at about 100 steps a second."""
    results = []
    with _Aggregator(folder) as environ:
        for pause in (0.0, 0.01):
            result = _python(THREAD, folder, str(pause), str(options.seconds), environ=environ)
            results.append(result)
            samplers = ", ".join(f"{name} {cost:.0f}" for name, cost in result["samplers"].items())
            print(
                f"recorder's thread at {result['steps_per_s']:,.0f} steps/s: "
                f"{result['first_pct']:.2f} % of a core in the first 10 s, {result['later_pct']:.2f} % later, "
                f"{result['us_per_1000_rows']:.0f} us per 1,000 rows, "
                f"{result['rows_lost']} rows lost (us per sample: {samplers})"
            )

    return results


def measure_commands(options: argparse.Namespace, folder: Path) -> Any:
    """Time of commands on a run of 50 steps, their CPU time too, as other programs on the machine disturb it less."""
    (folder / "train.py").write_text(SCRIPT)
    job = [str(BIN / "traceml"), "run", "--live", "none", "train.py"]
    subprocess.run(job, cwd=folder, env=_environ(), capture_output=True, check=True)
    commands = {
        "python -c pass": ["python", "-c", "pass"],
        "traceml report": ["traceml", "report"],
        "traceml runs": ["traceml", "runs"],
    }
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for number in range(options.rounds + 1):
        for name, words in commands.items():
            taken = _times([str(BIN / words[0]), *words[1:]], folder)
            if number:
                samples[name].append(taken)

    for name, taken_s in samples.items():
        whole, cpu = (statistics.median(values) for values in zip(*taken_s, strict=True))
        print(f"{name}: {whole:.2f} s, CPU {cpu:.2f} s")

    return samples


def _times(command: Sequence[str], folder: Path) -> tuple[float, float]:
    """Run a command; return its seconds, and its CPU seconds."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, cwd=folder, env=_environ(), capture_output=True, check=True)
    took, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return took, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure_run(options: argparse.Namespace, folder: Path) -> Any:
    """From the command line to the prompt: a job of 50 tiny steps."""
    script = folder / "train.py"
    script.write_text(SCRIPT)
    torchrun = ["torchrun", "--standalone", "--nproc-per-node", "2", str(script)]
    commands: dict[str, tuple[Path, list[str]]] = {
        "python": (BIN, ["python", str(script)]),
        "traceml run": (BIN, ["traceml", "run", "--live", "none", str(script)]),
        "torchrun, 2 ranks": (BIN, torchrun),
        "traceml run, 2 ranks": (BIN, ["traceml", "run", "--live", "none", "--nproc-per-node", "2", str(script)]),
    }
    if options.peer:
        peer = environment(PEER, "torch")
        commands |= {
            "peer's python": (peer, ["python", str(script)]),
            "peer": (peer, ["traceml", "run", str(script)]),
            "peer's torchrun, 2 ranks": (peer, torchrun),
            "peer, 2 ranks": (peer, ["traceml", "run", "--nproc-per-node", "2", str(script)]),
        }

    samples = _alternate(commands, folder, options.rounds)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    names = list(commands)
    for base, traced in zip(names[::2], names[1::2], strict=True):
        added = statistics.median(t - b for t, b in zip(samples[traced], samples[base], strict=True))
        print(f"{traced}: {medians[traced]:.2f} s; {base}: {medians[base]:.2f} s; added {added:+.2f} s")

    return samples


def _alternate(commands: dict[str, tuple[Path, list[str]]], folder: Path, rounds: int) -> dict[str, list[float]]:
    """Run all commands in turn, once to warm the disk's cache and then `rounds` times; return their seconds."""
    samples: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for name, (folder_bin, words) in commands.items():
            command = [str(folder_bin / words[0]), *words[1:]]
            began = time.perf_counter()
            done = subprocess.run(command, cwd=folder, env=_environ(), capture_output=True, text=True, check=False)
            took = time.perf_counter() - began
            if done.returncode != 0:
                raise SystemExit(f"{name} failed with {done.returncode}:\n{done.stderr}")
            if number:
                samples[name].append(took)

    return samples


def _python(code: str, folder: Path, *arguments: str, environ: dict[str, str] | None = None) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env=_environ() | (environ or {}),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(done.stderr)

    return json.loads(done.stdout.splitlines()[-1])


def _environ() -> dict[str, str]:
    # Compiled modules are kept between processes, as they are for users.
    left_out = ("TRACEML_", "PYTHONDONTWRITEBYTECODE")
    chosen = ("TRACEML_NATIVE",)  # the form of the hooks
    kept = {key: value for key, value in os.environ.items() if key in chosen or not key.startswith(left_out)}
    return kept | {"OMP_NUM_THREADS": "1"}


class _Aggregator:
    """A real aggregator; entering gives the variables by which scripts find it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> dict[str, str]:
        import socket

        ready, tell = os.pipe()
        with socket.create_server(("127.0.0.1", 0), backlog=64) as sock:
            command = self._command(sock.fileno(), tell)
            environ = _environ() | {"TRACEML_TOKEN": "benchmark"}
            self._process = subprocess.Popen(
                command, env=environ, pass_fds=(sock.fileno(), tell), stderr=subprocess.DEVNULL
            )
            port = sock.getsockname()[1]

        os.close(tell)
        os.read(ready, 16)
        os.close(ready)
        return {"TRACEML_PORT": str(port), "TRACEML_TOKEN": "benchmark"}

    def __exit__(self, *_exc: object) -> None:
        assert self._process is not None
        self._process.terminate()
        self._process.wait()

    def _command(self, fd: int, ready: int) -> Sequence[str]:
        runs = str(self._folder / "runs")
        serve = ["serve", "--fd", str(fd), "--ready-fd", str(ready), "--runs-dir", runs]
        return [sys.executable, "-m", "traceml", *serve]


if __name__ == "__main__":
    sys.exit(main())
