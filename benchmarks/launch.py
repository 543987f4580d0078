"""Cost of a launch: start-up, memory, large tensors, errors, logs, many hosts; traceml and torchrunx in one run.

    python benchmarks/launch.py [--rounds 5] [--only NAME ...] [--no-peer] [--json FILE]

Both run the same scripts, in turns, each in fresh processes. torchrunx 0.4.0 is installed under .bench/. `hosts` needs
root: it makes namespaces with an sshd each.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]

from peers import environment  # noqa: E402

PEER = "torchrunx==0.4.0"
MB = 1e6

# How each launches `func` on local workers; the rest of a script is the same for both.
HEADS = {
    "traceml": """
import traceml
def launch(func, *args, workers=2, hosts=("localhost",), ssh_config=None):
    return traceml.launch(func, args, hostnames=list(hosts), workers_per_host=workers, backend="gloo",
                          ssh_config_file=ssh_config).results
""",
    "torchrunx": """
import torchrunx
def launch(func, *args, workers=2, hosts=("localhost",), ssh_config=None):
    launcher = torchrunx.Launcher(hostnames=list(hosts), workers_per_host=workers, backend="gloo",
                                  ssh_config_file=ssh_config)
    return launcher.run(func, *args).results
""",
}

TRIVIAL = """
import sys
def trivial():
    return 1
if __name__ == "__main__":
    assert launch(trivial, workers=int(sys.argv[1])) == {"localhost": [1] * int(sys.argv[1])}
"""

AGAIN = """
import json, sys, time
def trivial():
    return 1
if __name__ == "__main__":
    launch(trivial, workers=int(sys.argv[1]))
    start = time.perf_counter()
    launch(trivial, workers=int(sys.argv[1]))
    print(json.dumps(time.perf_counter() - start))
"""

# While all workers wait, the launcher adds up the proportional memory of all that it has started.
MEMORY = """
import json, os, sys, threading, time
from pathlib import Path
def hold(folder, tensor=None):
    if tensor is not None:
        assert float(tensor.sum()) > 0
    Path(folder, "ready." + os.environ["RANK"]).touch()
    while not Path(folder, "go").exists():
        time.sleep(0.02)
def below(pid):
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            found[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    mine = {pid}
    while more := {child for child, parent in found.items() if parent in mine} - mine:
        mine |= more
    return mine - {pid}
def pss(pid):
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
def watch(folder, workers, told):
    while len(list(Path(folder).glob("ready.*"))) < workers:
        time.sleep(0.02)
    time.sleep(0.3)
    told.append(sum(map(pss, below(os.getpid()))))
    Path(folder, "go").touch()
if __name__ == "__main__":
    folder, workers, payload = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "payload"
    args, told = [folder], []
    if payload:
        import torch
        args.append(torch.ones(125_000_000))
    watcher = threading.Thread(target=watch, args=(folder, workers, told))
    watcher.start()
    launch(hold, *args, workers=workers)
    watcher.join()
    print(json.dumps(told[0]))
"""

# What stands between the launcher and a worker: each the only child of the one before.
PROCESSES = """
import json, os, sys, threading, time
from pathlib import Path
def hold(folder):
    Path(folder, "ready").touch()
    while not Path(folder, "go").exists():
        time.sleep(0.02)
def look(pid):
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    pss = sum(int(line.split()[1]) * 1024 for line in rollup if line.startswith("Pss:"))
    return {"pss": pss, "cpu_s": sum(map(int, times)) / os.sysconf("SC_CLK_TCK")}
def watch(folder, told):
    while not Path(folder, "ready").exists():
        time.sleep(0.02)
    pid = os.getpid()
    for name in ("reaper", "agent", "zygote", "worker"):
        tasks = Path(f"/proc/{pid}/task").glob("*/children")
        (pid,) = [int(child) for task in tasks for child in task.read_text().split()]
        told[name] = look(pid)
    Path(folder, "go").touch()
if __name__ == "__main__":
    told = {}
    watcher = threading.Thread(target=watch, args=(sys.argv[1], told))
    watcher.start()
    launch(hold, sys.argv[1], workers=1)
    watcher.join()
    print(json.dumps(told))
"""

PAYLOAD = """
import json, sys, time, torch
def memory(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))
def nothing():
    return None
def touch(tensor):  # every page of it
    return float(tensor[::1024].sum())
def make():
    import torch
    torch.ones(125_000_000)
def give():
    import torch
    return torch.ones(125_000_000)
if __name__ == "__main__":
    what, workers = sys.argv[1], int(sys.argv[2])
    func = {"nothing": nothing, "argument": touch, "made": make, "result": give}[what]
    args = [torch.ones(125_000_000)] if what == "argument" else []
    before = memory("VmRSS")
    start = time.perf_counter()
    results = launch(func, *args, workers=workers)["localhost"]
    if what == "result":
        assert [touch(result) for result in results] == [122_071] * workers
    took = time.perf_counter() - start
    print(json.dumps({"s": took, "grown": memory("VmHWM") - before}))
"""

# One worker of two raises after a second; the other goes on for 20 s.
RAISING = """
import json, os, time
def work():
    time.sleep(1)
    if os.environ["RANK"] == "1":
        raise ValueError(str(time.time()))
    time.sleep(20)
if __name__ == "__main__":
    try:
        launch(work)
    except ValueError as error:
        print(json.dumps(time.time() - float(str(error).split()[0])))
"""

LINES = """
import json, os, sys, time
def chat(lines):
    start = time.perf_counter()
    for i in range(lines):
        print(f"{i:06d} " + "x" * 64)
    return time.perf_counter() - start
if __name__ == "__main__":
    start = time.perf_counter()
    loops = launch(chat, int(sys.argv[1]))["localhost"]
    print(json.dumps({"loop_s": max(loops), "launch_s": time.perf_counter() - start}), file=sys.stderr)
"""

LAST_WORDS = """
import ctypes, faulthandler, os
def crash():
    faulthandler.enable()
    if os.environ["RANK"] == "0":
        for i in range(2000):
            print("word", i)
        ctypes.string_at(0)
    import time
    time.sleep(5)
if __name__ == "__main__":
    try:
        launch(crash)
    except Exception:
        pass
"""

TWO_HOSTS = """
import sys, time
def reduce():
    import torch, torch.distributed as dist
    value = torch.ones(1000)
    dist.all_reduce(value)
    return float(value[0])
if __name__ == "__main__":
    hosts = sys.argv[2:]
    assert launch(reduce, hosts=hosts, ssh_config=sys.argv[1]) == {host: [2.0 * len(hosts)] * 2 for host in hosts}
"""

# The control channels alone: until each host's agent has answered, before anything is imported there.
CHANNELS = """
import json, os, selectors, sys, time
from traceml.launch.launcher.hosts.agent_connection import AgentConnection
from traceml.launch.launcher.hosts.hosts import resolve_hosts
config, hosts = sys.argv[1], sys.argv[2:]
start = time.perf_counter()
links = [AgentConnection(spec, sys.executable, config) for spec in resolve_hosts(hosts, 1, config, os.environ)]
with selectors.DefaultSelector() as selector:
    for link in links:
        selector.register(link.channel.read_fd, selectors.EVENT_READ, link)
        selector.register(link.channel.write_fd, selectors.EVENT_WRITE, link)
    while not all(link.hello for link in links):
        for key, events in selector.select():
            link = key.data
            if events & selectors.EVENT_WRITE:
                link.channel.flush()
                if not link.channel.wants_write:
                    selector.unregister(key.fd)
                continue
            for message in link.channel.receive():
                if message.t == "package":  # its host has other files
                    link.send_package()
                    selector.register(link.channel.write_fd, selectors.EVENT_WRITE, link)
                elif message.t == "hello":
                    link.hello = message
print(json.dumps(time.perf_counter() - start))
for link in links:
    link.close()
"""

# What ssh itself takes: all hosts at once, and nothing to do there.
SSH = """
import json, subprocess, sys, time
start = time.perf_counter()
running = [subprocess.Popen(["ssh", "-F", sys.argv[1], host, "true"]) for host in sys.argv[2:]]
assert not any([process.wait() for process in running])
print(json.dumps(time.perf_counter() - start))
"""


def main() -> int:
    options = _options()
    parts: dict[str, Callable[[Bench], Any]] = {
        "start": measure_start,
        "again": measure_again,
        "memory": measure_memory,
        "processes": measure_processes,
        "payload": measure_payload,
        "error": measure_error,
        "logs": measure_logs,
        "hosts": measure_hosts,
    }
    results = {}
    bench = Bench(options)
    for name in options.only or parts:
        results[name] = parts[name](bench)

    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1))

    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of each measurement")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="start, again, memory, processes, payload, error, logs, hosts"
    )
    parser.add_argument("--no-peer", action="store_true", help="leave torchrunx out")
    parser.add_argument("--json", type=Path, help="also write the results here")
    return parser.parse_args()


class Bench:
    """The two launchers, and how their scripts are run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.rounds: int = options.rounds
        self.pythons = {"traceml": Path(sys.executable)}
        if not options.no_peer:
            self.pythons["torchrunx"] = environment(PEER) / "python"

    def run(self, who: str, body: str, *arguments: object, on: Any = None) -> Outcome:
        """Run a script with `who`'s launcher in a folder of its own; on a host, where one is given."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            script = folder / "script.py"
            script.write_text(HEADS.get(who, "") + body)
            words = [str(self.pythons.get(who, sys.executable)), str(script), *map(str, arguments)]
            began = time.perf_counter()
            done = subprocess.run(
                words if on is None else on.command(*words),
                cwd=folder,
                env=_environ(folder),
                capture_output=True,
                text=True,
                check=False,
                timeout=300,
            )
            took = time.perf_counter() - began
            if done.returncode != 0:
                raise SystemExit(f"{who} failed with {done.returncode}:\n{done.stdout}\n{done.stderr}")

            logs = {path.name: path.read_text() for path in folder.glob("logs/*/*.log")}
            return Outcome(took, done.stdout, done.stderr, logs)

    def each(self, body: str, *arguments: object, on: Any = None, beside: str = "") -> dict[str, list[Outcome]]:
        """Run a script with both launchers in turns, once to warm up and then for each round; `beside`, too."""
        outcomes: dict[str, list[Outcome]] = {who: [] for who in [*(["beside"] if beside else []), *self.pythons]}
        for number in range(self.rounds + 1):
            for who, found in outcomes.items():
                outcome = self.run(who, beside if who == "beside" else body, *arguments, on=on)
                if number:
                    found.append(outcome)

        return outcomes


class Outcome:
    """Return a script's output and logs, and its duration."""

    def __init__(self, seconds: float, stdout: str, stderr: str, logs: dict[str, str]) -> None:
        self.seconds, self.logs = seconds, logs
        self._lines = [line for line in (stdout + stderr).splitlines() if line.strip()]

    @property
    def told(self) -> Any:
        """The JSON that the script printed last."""
        for line in reversed(self._lines):
            try:
                return json.loads(line)
            except ValueError:
                continue

        raise SystemExit(f"a script printed no result: {self._lines}")


def measure_start(bench: Bench) -> Any:
    """A trivial function, from the command line to the prompt."""
    results: dict[str, Any] = {}
    for workers in (2, 4):
        medians = _medians(bench.each(TRIVIAL, workers, beside="import torch"), lambda outcome: outcome.seconds)
        results[f"{workers} workers"] = medians
        ours, floor = medians["traceml"], medians["beside"]
        print(
            f"{workers} workers, whole process: {ours:.2f} s = {ours / floor:.2f} x `import torch` ({floor:.2f} s; "
            f"goal 1.25 x){_against(medians, '{:.2f} s', 'goal 3 x')}"
        )

    return results


def measure_again(bench: Bench) -> Any:
    """A second launch in the same script."""
    results = {}
    for workers in (2, 4):
        results[workers] = medians = _medians(bench.each(AGAIN, workers), lambda outcome: outcome.told)
        ours = medians["traceml"]
        print(f"second launch, {workers} workers: {ours:.3f} s (goal 0.2){_against(medians, '{:.2f} s')}")

    return results


def measure_memory(bench: Bench) -> Any:
    """Proportional memory of all that a launch has started, by the number of workers."""
    results: dict[str, Any] = {}
    for payload in ("nothing", "payload"):
        totals: dict[int, dict[str, float]] = {1: {}, 4: {}}
        for workers, found in totals.items():
            for who in bench.pythons:
                samples = []
                for _ in range(max(bench.rounds // 2, 1)):
                    with tempfile.TemporaryDirectory() as folder:
                        samples.append(bench.run(who, MEMORY, folder, workers, payload).told / MB)

                found[who] = statistics.median(samples)

        results[payload] = totals
        more = {who: (totals[4][who] - totals[1][who]) / 3 for who in bench.pythons}
        with_it = "with a 500 MB argument, " if payload == "payload" else ""
        goal = "" if payload == "payload" else " (goal 10)"
        print(
            f"memory (PSS) {with_it}1 worker {totals[1]['traceml']:.0f} MB, each further one "
            f"{more['traceml']:.1f} MB{goal}{_against(more, '{:.0f} MB')}"
        )

    return results


def measure_processes(bench: Bench) -> Any:
    """Memory and processor time of each process of a host, and that of an import of torch."""
    found = []
    for _ in range(bench.rounds):
        with tempfile.TemporaryDirectory() as folder:
            found.append(bench.run("traceml", PROCESSES, folder).told)

    results: dict[str, Any] = {}
    for name in found[0]:
        results[name] = told = {key: statistics.median(each[name][key] for each in found) for key in ("pss", "cpu_s")}
        print(f"{name}: {told['pss'] / MB:.1f} MB (PSS), {told['cpu_s']:.2f} s of processor time until a worker ran")

    code = "import time; start = time.process_time(); import torch; print(time.process_time() - start)"
    command = [str(bench.pythons["traceml"]), "-c", code]
    imports = [float(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(bench.rounds)]
    results["import_torch_s"] = statistics.median(imports)
    print(f"import torch: {results['import_torch_s']:.2f} s of processor time")
    return results


def measure_payload(bench: Bench) -> Any:
    """A tensor of 500 MB as argument and as result: what it adds to a launch, and to the launcher's memory."""
    results: dict[str, Any] = {}
    for workers in (1, 2):
        found: dict[str, dict[str, list[dict[str, float]]]] = {}
        names = ("nothing", "argument", "made", "result")
        for _ in range(bench.rounds):  # in turns: what is subtracted was measured beside it
            for who in bench.pythons:
                for name in names:
                    told = bench.run(who, PAYLOAD, name, workers).told
                    found.setdefault(who, {}).setdefault(name, []).append(told)

        results[str(workers)] = found
        for name, base in (("argument", "nothing"), ("result", "made")):
            added = {who: _median(f[name], "s") - _median(f[base], "s") for who, f in found.items()}
            grown = {who: _median(f[name], "grown") / 500e6 for who, f in found.items()}
            goal = " (goal 0.6)" if workers == 1 else ""
            time_told = f"{added['traceml']:+.2f} s{goal}{_against(added, '{:+.2f} s')}"
            theirs = f"; torchrunx {grown['torchrunx']:.2f} x" if "torchrunx" in grown else ""
            memory_told = f"{grown['traceml']:.2f} x the tensor (goal 1.3 for one result){theirs}"
            print(f"500 MB as {name}, {workers} worker(s): {time_told}; launcher's memory grows by {memory_told}")

    return results


def measure_error(bench: Bench) -> Any:
    """One worker raises while the other runs for 19 s more: until `launch` raises."""
    results = {}
    for who in bench.pythons:
        rounds = bench.rounds if who == "traceml" else 1
        results[who] = statistics.median(bench.run(who, RAISING).told for _ in range(rounds))

    print(f"an exception is raised after {results['traceml']:.2f} s (goal 2){_against(results, '{:.1f} s')}")
    return results


def measure_logs(bench: Bench) -> Any:
    """Two workers print 100,000 lines each; a worker prints 2,000 and crashes."""
    results: dict[str, Any] = {}
    for who in bench.pythons:
        quiet, loud = [], []
        for _ in range(bench.rounds):
            quiet.append(bench.run(who, LINES, 0).told["launch_s"])
            loud.append(bench.run(who, LINES, 100_000))

        added = statistics.median(outcome.told["launch_s"] for outcome in loud) - statistics.median(quiet)
        loop = statistics.median(outcome.told["loop_s"] for outcome in loud)
        lost = max(200_000 - sum(text.count(" " + "x" * 64) for text in outcome.logs.values()) for outcome in loud)
        crashed = bench.run(who, LAST_WORDS).logs
        words = sum(text.count("word ") for text in crashed.values())
        fatal = any("Fatal Python error" in text for text in crashed.values())
        results[who] = {"lines_per_s": 200_000 / added, "loop_s": loop, "lost": lost, "words": words, "fatal": fatal}
        print(
            f"{who}: 2 x 100,000 lines: {200_000 / added:,.0f} lines/s to the end of the launch (goal 150,000), "
            f"workers' loops {loop:.2f} s, {lost} lost; of 2,000 last words {words} arrive, "
            f"faulthandler's {'do' if fatal else 'do not'}"
        )

    return results


def measure_hosts(bench: Bench) -> Any:
    """Several hosts through ssh: channels alone, and a whole launch on two."""
    if os.geteuid() != 0:
        print("hosts: needs root, as it makes namespaces; left out")
        return None

    from tests.launch.hosts import Hosts

    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, Hosts(Path(folder), 8) as hosts:
        told: dict[str, dict[int, list[float]]] = {"channels": {1: [], 8: []}, "ssh true": {1: [], 8: []}}
        for number in range(bench.rounds + 1):
            for count in (1, 8):
                for name, body in (("channels", CHANNELS), ("ssh true", SSH)):
                    found = bench.run("traceml", body, hosts.ssh_config, *hosts.names[:count], on=hosts.launcher).told
                    if number:
                        told[name][count].append(found)

        for name, samples in told.items():
            one, eight = (statistics.median(samples[count]) for count in (1, 8))
            results[name] = {"1": one, "8": eight}
            goal = " (goal 2 x)" if name == "channels" else ""
            print(f"{name}: 1 host {one:.2f} s, 8 hosts {eight:.2f} s = {eight / one:.2f} x{goal}")

        outcomes = bench.each(TWO_HOSTS, hosts.ssh_config, *hosts.names[:2], on=hosts.launcher)
        results["two"] = medians = _medians(outcomes, lambda outcome: outcome.seconds)
        print(
            f"2 hosts x 2 workers by ssh, all-reduce, whole process: {medians['traceml']:.2f} s"
            f"{_against(medians, '{:.2f} s')}"
        )

    return results


def _medians(outcomes: dict[str, list[Outcome]], value: Callable[[Outcome], float]) -> dict[str, float]:
    return {who: statistics.median(map(value, found)) for who, found in outcomes.items()}


def _median(told: list[dict[str, float]], name: str) -> float:
    return statistics.median(each[name] for each in told)


def _against(values: dict[str, float], layout: str, goal: str = "") -> str:
    if "torchrunx" not in values:
        return ""

    theirs, ours = values["torchrunx"], values["traceml"]
    ratio = f", {theirs / ours:.1f} x ours" if ours > 0 else ""
    return f"; torchrunx {layout.format(theirs)}{ratio}{f' ({goal})' if goal and ratio else ''}"


def _environ(folder: Path) -> dict[str, str]:
    # Compiled modules are kept between processes, as they are for users.
    left_out = ("TRACEML_", "TORCHRUNX_", "SLURM_", "PYTHONDONTWRITEBYTECODE")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(left_out)}
    return kept | {"TRACEML_LOG_DIR": str(folder / "logs"), "TORCHRUNX_LOG_DIR": str(folder / "logs")}


if __name__ == "__main__":
    sys.exit(main())
