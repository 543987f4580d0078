"""The list of slow hosts in simulated fleets: precision and recall, next to a count; and the time of `traceml fleet`.

    python benchmarks/fleet.py [--fleets 40] [--runs 500] [--json FILE]

A fleet has 64 hosts of 8 ranks. A job runs on 2 to 16 of them, chosen by chance, mostly on few. Each host is some
tenths of a percent faster or slower than others for good, each job disturbs each host anew, each rank has its own
noise, and in one job of ten some host is slow for a while. Three hosts are bad: slower by 4, 8 and 15 % of their work
in 9 jobs of 10. The same fleets without bad hosts count false alarms. The runs of one fleet go through the dataset.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind, Severity
from traceml.runs.fleet.fleet_dataset import FleetDataset
from traceml.runs.fleet.fleet_runs import FleetRun, HostWork
from traceml.runs.fleet.phase_history import run_history
from traceml.runs.fleet.slow_hosts import judge_hosts
from traceml.runs.report.report_types import (
    SCHEMA,
    PhaseSection,
    RankMean,
    RankSection,
    Report,
    RunSection,
    SetupSection,
    StepsSection,
)

HOSTS, RANKS = 64, 8
SIZES = (2, 2, 2, 4, 4, 4, 8, 8, 16)
BAD = {"host-07": 0.04, "host-23": 0.08, "host-41": 0.15}
OFTEN = 0.9
PHASES_MS = {"input_wait": 5.0, "forward": 30.0, "backward": 60.0, "optimizer": 5.0, "comm": 12.0}
LASTING, PER_JOB, PER_RANK, SHOCK = 0.004, 0.01, 0.005, 0.08
MODELS = ("ResNet", "GPT", "ViT", "DLRM")
CHANGES = {"healthy": ("", 1.0), "forward +10 %": ("forward", 1.1), "input_wait x 2": ("input_wait", 2.0)}
STARTED, HOUR = 1_760_000_000.0, 3600.0


def main() -> int:
    options = _options()
    results: dict[str, list[dict[str, list[str]]]] = {"bad": [], "healthy": []}
    for seed in range(options.fleets):
        for kind, bad in (("bad", BAD), ("healthy", {})):
            results[kind].append(_judge(_fleet(options.runs, seed, bad)))

    _tell(options, results["bad"], results["healthy"])
    changes = _history(options.fleets)
    timed = _time_command(options.runs)
    if options.json is not None:
        options.json.write_text(json.dumps({**results, "history": changes, "command": timed}, indent=1))

    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fleets", type=int, default=40, help="simulated fleets, with and without bad hosts")
    parser.add_argument("--runs", type=int, default=500, help="runs of a fleet")
    parser.add_argument("--json", type=Path, help="also write the results here")
    return parser.parse_args()


def _works(runs: int, seed: int, bad: dict[str, float]) -> list[tuple[list[str], np.ndarray]]:
    """Return the hosts of each job, and the factor of each rank's work."""
    random = np.random.default_rng(seed)
    names = np.array([f"host-{number:02}" for number in range(HOSTS)])
    lasting = dict(zip(names, random.normal(0, LASTING, HOSTS), strict=True))
    jobs = []
    for _ in range(runs):
        hosts = random.choice(names, random.choice(SIZES), replace=False).tolist()
        factors = 1 + np.array([lasting[host] for host in hosts]) + random.normal(0, PER_JOB, len(hosts))
        factors += [bad.get(host, 0.0) * (random.random() < OFTEN) for host in hosts]
        if random.random() < 0.1:
            factors[random.integers(len(hosts))] += SHOCK

        jobs.append((hosts, factors[:, None] * (1 + random.normal(0, PER_RANK, (len(hosts), RANKS)))))

    return jobs


def _fleet(runs: int, seed: int, bad: dict[str, float]) -> list[FleetRun]:
    """Return the runs as the dataset gives them; the command reads the dataset itself, see `_time_command`."""
    return [_summary(number, *job) for number, job in enumerate(_works(runs, seed, bad))]


def _summary(number: int, hosts: list[str], factors: np.ndarray) -> FleetRun:
    own = {name: ms for name, ms in PHASES_MS.items() if name != "comm"}
    ranks = factors.copy()
    ranks[0, 0] = 0  # rank 0 is left out
    slowest = ranks.max(axis=1)
    works = tuple(
        HostWork(host, sum(own.values()) * factor, {name: ms * factor for name, ms in own.items()}, RANKS)
        for host, factor in zip(hosts, slowest.tolist(), strict=True)
    )
    return FleetRun(
        run=f"run-{number:05}", name="train", project="fleet", month="2025-10", started=STARTED + number * HOUR,
        state="finished", verdict="HEALTHY", script="train.py", model="GPT", parameters=10**9, dtype="float32",
        device="cuda", parallel="ddp", compiled=False, batch_size=32, world_size=len(hosts) * RANKS, steps=1000,
        step_ms=112.0, phases=dict(PHASES_MS), hosts=works,
    )  # fmt: skip


def _judge(runs: Sequence[FleetRun]) -> dict[str, list[str]]:
    """Return the hosts that are listed, and those that a count would list: the three most often slowest ones."""
    slowest = Counter(max(run.hosts, key=lambda host: host.work_ms).host for run in runs)
    return {
        "listed": [slow.host for slow in judge_hosts(runs).slow],
        "counted": [host for host, _ in slowest.most_common(len(BAD))],
    }


def _tell(options: argparse.Namespace, bad: Sequence[dict], healthy: Sequence[dict]) -> None:
    print(f"{options.fleets} fleets of {options.runs} runs on {HOSTS} hosts, three of them bad")
    for name, words in (("listed", "traceml fleet"), ("counted", "the three most often slowest")):
        hits = sum(len(BAD.keys() & set(each[name])) for each in bad)
        told = sum(len(each[name]) for each in bad)
        print(f"  {words}: precision {hits / max(told, 1):.3f}, recall {hits / (len(BAD) * len(bad)):.3f}")

    for host, share in BAD.items():
        found = sum(host in each["listed"] for each in bad)
        print(f"  slower by {share:.0%}: listed in {found} of {len(bad)}")

    alarms = sum(bool(each["listed"]) for each in healthy)
    print(f"  without bad hosts: {alarms} of {len(healthy)} lists are not empty")


def _history(fleets: int) -> dict[str, float]:
    """Print how often a healthy run is called unusual, and one with a slower phase is found."""
    random = np.random.default_rng(7)
    found: dict[str, list[bool]] = {name: [] for name in CHANGES}
    for _ in range(max(fleets * 10, 100)):
        count = int(random.integers(8, 40))
        fleet = [_summary(number, ["a", "b"], np.ones((2, RANKS))) for number in range(count + 1)]
        fleet = [_with_phases(run, random) for run in fleet]
        for name, (phase, factor) in CHANGES.items():
            last = fleet[-1]
            changed = {key: ms * (factor if key == phase else 1) for key, ms in last.phases.items()}
            phases = run_history(_replaced(last, changed), fleet).phases
            outcomes = {each.phase: each.outcome for each in phases}
            found[name].append(outcomes[phase] == "slower" if phase else set(outcomes.values()) != {"same"})

    shares = {name: float(np.mean(values)) for name, values in found.items()}
    told = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    print(f"next to 8 to 39 earlier runs whose phases differ by 2 %, called unusual: {told}")
    return shares


def _with_phases(run: FleetRun, random: np.random.Generator) -> FleetRun:
    return _replaced(run, {name: ms * random.normal(1, 0.02) for name, ms in PHASES_MS.items()})


def _replaced(run: FleetRun, phases: dict[str, float]) -> FleetRun:
    return replace(run, phases=phases)


def _time_command(runs: int) -> dict[str, float]:
    """Print the time of writing the dataset, of the command that reads it, and its size."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = FleetDataset(Path(folder, "fleet"))
        began = time.process_time()
        for number, (hosts, factors) in enumerate(_works(runs, 0, BAD)):
            dataset.add(_report(number, hosts, factors))

        write_s = time.process_time() - began
        size = sum(file.stat().st_size for file in dataset.files())
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        began = time.perf_counter()
        command = [sys.executable, "-m", "traceml", "fleet", "--json", "--dataset", str(dataset.folder)]
        done = subprocess.run(command, capture_output=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        took = time.perf_counter() - began
        after = resource.getrusage(resource.RUSAGE_CHILDREN)

    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    listed = [slow["host"] for slow in json.loads(done.stdout)["hosts"]["slow"]]
    print(
        f"{runs} runs through the dataset: {1e3 * write_s / runs:.1f} ms of CPU to add one, {size / runs / 1e3:.1f} kB "
        f"each; traceml fleet {took:.2f} s, CPU {cpu:.2f} s; listed: {', '.join(listed)}"
    )
    return {"add_ms": 1e3 * write_s / runs, "bytes_per_run": size / runs, "command_s": took, "command_cpu_s": cpu}


def _report(number: int, hosts: list[str], factors: np.ndarray) -> Report:
    verdict = Finding(kind=Kind.HEALTHY, severity=Severity.INFO, summary="", next="")
    works = factors.ravel()
    phases = []
    for name, ms in PHASES_MS.items():
        means = np.full(len(works), ms) if name == "comm" else ms * works
        by_rank = [RankMean(rank, mean) for rank, mean in enumerate(means.tolist())]
        phases.append(PhaseSection(phase=name, mean_ms=float(means.mean()), by_rank=by_rank))

    started = STARTED + number * HOUR
    return Report(
        schema=SCHEMA,
        run=RunSection(
            id=f"run-{number:05}", name="train", project="fleet", state="finished", started=started,
            ended=started + HOUR, duration_s=HOUR, world_size=len(works), command="train.py",
        ),
        verdict=verdict,
        findings=[verdict],
        steps=StepsSection(count=1000, mean_ms=112.0),
        phases=phases,
        ranks=[RankSection(rank=rank, host=hosts[rank // RANKS]) for rank in range(len(works))],
        setup=SetupSection(model={"model": MODELS[number % len(MODELS)], "device": "cuda:0"}, batch_size=32),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
