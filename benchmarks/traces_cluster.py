"""Traces on a Dask cluster of two worker processes: total duration by name, next to one process and to dftracer-utils.

    python benchmarks/traces_cluster.py [--events 2000000] [--rounds 5] [--json FILE]

The file is `members` of traces.py: 4 MiB gzip members. Times are from query to result, medians of
alternating rounds; clusters are warm, nothing is cached, every result is compared with the content of the file. `cold`
is the peer's first result, for which it creates its index; the other rounds use it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peers import environment
from traces import PEER, Answer, members

DISTRIBUTED = "distributed==2026.8.0"

ASK_PEER = """
import json, sys, time
from dask.distributed import Client, LocalCluster
from dftracer.utils.dask import DaskTraceViewer
if __name__ == "__main__":
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
        print("ready", flush=True)
        for line in sys.stdin:
            start = time.perf_counter()
            viewer = DaskTraceViewer([sys.argv[1]], client=client)
            found = viewer.group_by("name").agg("count", "sum:dur").collect().to_dict()
            took = time.perf_counter() - start
            rows = zip(found["name"], found["count"], found["sum_dur"])
            print(json.dumps([took, {name: [count, total] for name, count, total in rows}]), flush=True)
"""


class Peer:
    """The peer's cluster, in a separate environment: it runs the query for each line on its stdin."""

    def __init__(self, path: Path) -> None:
        script = path.with_name("ask_peer.py")
        script.write_text(ASK_PEER)
        command = [str(environment(DISTRIBUTED, PEER, "pyarrow", "dask[dataframe]") / "python"), str(script), str(path)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._line()

    def __call__(self) -> tuple[float, dict[str, Any]]:
        """Return the duration in seconds, and the result."""
        assert self._process.stdin is not None
        print("again", file=self._process.stdin, flush=True)
        seconds, answer = json.loads(self._line())
        return seconds, answer

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


def main() -> int:
    options = _options()
    from distributed import Client, LocalCluster

    from traceml.traces.query.summary import summarize

    with tempfile.TemporaryDirectory() as folder:
        path, truth, _ = members(Path(folder), options.events)
        with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as ours, Client(ours) as client:
            peer = Peer(path)
            cold = peer()
            askers: dict[str, Callable[[], tuple[float, dict[str, Any]]]] = {
                "ours, Dask, 2 workers": lambda: _timed(lambda: summarize([path], cached=False, dask=client)),
                "ours, one process": lambda: _timed(lambda: summarize([path], cached=False)),
                "dftracer-utils, Dask, 2 workers": peer,
            }
            askers["ours, Dask, 2 workers"]()  # workers import what they need
            taken: dict[str, list[tuple[float, bool]]] = {name: [] for name in askers}
            for _ in range(options.rounds):
                for name, ask in askers.items():
                    seconds, answer = ask()
                    taken[name].append((seconds, _is_right(answer, truth)))

            peer.close()

    taken["dftracer-utils, Dask, cold"] = [(cold[0], _is_right(cold[1], truth))]
    return _print(taken, options.json)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=2_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the results here")
    return parser.parse_args()


def _timed(ask: Callable[[], dict[str, Any]]) -> tuple[float, dict[str, Any]]:
    start = time.perf_counter()
    answer = ask()
    return time.perf_counter() - start, {row["name"]: [row["count"], row["sum_us"]] for row in answer["groups"]}


def _is_right(answer: dict[str, Any], truth: Answer) -> bool:
    return {name: tuple(row) for name, row in answer.items()} == {
        name: (count, total) for name, (count, total) in truth.items()
    }


def _print(taken: dict[str, list[tuple[float, bool]]], where: Path | None) -> int:
    print("| asked | s | times ours | answer |\n|---|---|---|---|")
    medians = {name: statistics.median(seconds for seconds, _ in rounds) for name, rounds in taken.items()}
    ours = next(iter(medians.values()))
    right = {name: all(each for _, each in rounds) for name, rounds in taken.items()}
    for name, seconds in medians.items():
        print(f"| {name} | {seconds:.2f} | {seconds / ours:.1f} x | {'right' if right[name] else 'wrong'} |")

    if where is not None:
        where.write_text(json.dumps({name: {"s": medians[name], "right": right[name]} for name in medians}, indent=1))

    return 0 if all(each for name, each in right.items() if name.startswith("ours")) else 1


if __name__ == "__main__":
    sys.exit(main())
