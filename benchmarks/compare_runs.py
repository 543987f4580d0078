"""Error rates of `traceml compare`: false differences between equal runs, and changes that it misses.

    python benchmarks/compare_runs.py [--pairs 200] [--starts 6] [--no-peer]

First on fabricated step times with autocorrelated noise, as on real machines. Then on real trainings: the same script
is started several times, and all starts are compared with each other.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.peers import environment
from tests.runs.comparison.test_significance import step_times

from traceml.runs.comparison.compare import compare_runs
from traceml.runs.comparison.significance import difference
from traceml.runs.run import load_run

PEER = "traceml-ai==0.5.0"
PEER_PCT = 3.0  # the change from which the peer reports one
LENGTHS = (200, 1000, 4000)
MEMORIES = (0.0, 0.5, 0.9, 0.98)
CHANGES = (0.0, 0.03, 0.05, 0.10)

_PEER = """
import json, sys
from traceml_ai.reporting.compare.policy import evaluate_step_time_ci_result as evaluate
deltas, percent = json.load(sys.stdin)
json.dump(["WITHIN" not in evaluate(delta_pct=delta, threshold_pct=percent) for delta in deltas], sys.stdout)
"""
_TRAIN = Path(__file__).resolve().parents[1] / "src" / "traceml" / "cli" / "demonstration" / "_demo_train.py"

Times = np.ndarray


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--starts", type=int, default=6)
    parser.add_argument("--no-peer", action="store_true")
    options = parser.parse_args()
    if options.starts < 2:
        parser.error("--starts: at least 2, as runs are compared in pairs")

    fabricated(options.pairs, None if options.no_peer else environment(PEER, "torch") / "python")
    real(options.starts)
    return 0


def mean(blocks: Times) -> Times:
    return blocks.mean(axis=1)


def ours(a: Times, b: Times) -> bool | None:
    return difference(a, b, mean).real


def as_independent(a: Times, b: Times) -> bool:
    """Welch's test at the same 1 %, which treats steps as independent."""
    return abs(b.mean() - a.mean()) > 2.576 * np.sqrt(a.var() / len(a) + b.var() / len(b))


def fabricated(pairs: int, peer: Path | None) -> None:
    print(f"fabricated: share of {pairs} pairs that differ significantly, by the slowdown of B")
    print(
        f"{'steps':>6} {'memory':>7}  {'':<22}"
        + "".join(f"{100 * change:>8.0f} %" for change in CHANGES)
        + "  no answer"
    )
    for length in LENGTHS:
        for memory in MEMORIES:
            random = np.random.default_rng(length)
            made = [(step_times(random, length, memory), step_times(random, length, memory)) for _ in range(pairs)]
            row(length, memory, "traceml", made, ours)
            row(length, memory, "steps as independent", made, as_independent)
            if peer is not None:
                peer_row(length, memory, made, peer)


def row(
    length: int, memory: float, name: str, pairs: list[tuple[Times, Times]], test: Callable[..., bool | None]
) -> None:
    shares = []
    silent = 0
    for change in CHANGES:
        answers = [test(a, b * (1 + change)) for a, b in pairs]
        shares.append(sum(bool(answer) for answer in answers) / len(pairs))
        silent = sum(answer is None for answer in answers)

    told = "".join(f"{100 * share:>8.1f} %" for share in shares)
    print(f"{length:>6} {memory:>7}  {name:<22}{told}{100 * silent / len(pairs):>9.1f} %", flush=True)


def peer_row(length: int, memory: float, pairs: list[tuple[Times, Times]], python: Path) -> None:
    deltas = [100 * (b.mean() * (1 + change) / a.mean() - 1) for change in CHANGES for a, b in pairs]
    run = subprocess.run(
        [str(python), "-c", _PEER], input=json.dumps([deltas, PEER_PCT]), capture_output=True, text=True, check=True
    )
    answers = np.array(json.loads(run.stdout)).reshape(len(CHANGES), -1)
    told = "".join(f"{100 * share:>8.1f} %" for share in answers.mean(axis=1))
    print(f"{length:>6} {memory:>7}  {f'traceml-ai, {PEER_PCT:g} %':<22}{told}{0:>9.1f} %", flush=True)


def real(starts: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        runs = [start(Path(folder), number) for number in range(starts)]
        found = [compare_runs(a, b).to_dict() for a, b in combinations(runs, 2)]

    waits = [[each[side]["core_wait_share"] or 0.0 for side in ("a", "b")] for each in found]
    print(f"\nreal: the same training started {starts} times, {len(found)} pairs")
    print(f"  ranks waited for a core {np.min(waits):.0%} to {np.max(waits):.0%} of their time")
    tell("all pairs", found)
    alike = [each for each in found if not any("waited for a CPU core" in remark for remark in each["remarks"])]
    tell("pairs on a machine that was not busy", alike)


def tell(name: str, found: list[dict]) -> None:
    if not found:
        print(f"  {name}: none")
        return

    changes = np.abs([each["step_time"]["mean"]["change"] for each in found])
    differ = sum(each["outcome"] in ("slower", "faster") for each in found)
    gates = ", ".join(f"{percent} %: {sum(fails(each, percent) for each in found)}" for percent in (3, 5, 10))
    print(
        f"  {name}: {differ} of {len(found)} called different; change of the mean, median {np.median(changes):.1%}, ",
        end="",
    )
    print(f"most {changes.max():.1%}; over the limit of {gates}")


def fails(comparison: dict, percent: float) -> bool:
    mean = comparison["step_time"]["mean"]
    return comparison["outcome"] in ("slower", "faster") and abs(100 * mean["change"]) > percent


def start(folder: Path, number: int) -> Path:
    command = [sys.executable, "-m", "traceml", "run", "--live", "none", str(_TRAIN), "--steps", "400"]
    environ = {
        **os.environ,
        "TRACEML_RUNS_DIR": str(folder),
        "TRACEML_RUN_NAME": f"start{number}",
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run(command, env=environ, cwd=folder, capture_output=True, check=True)
    run = next(folder.glob(f"*-start{number}-*"))
    assert load_run(run).report["steps"]["count"] >= 399, f"steps are missing in {run}"
    return run


if __name__ == "__main__":
    sys.exit(main())
